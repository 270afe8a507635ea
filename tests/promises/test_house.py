'''The house: imports point down, in no circle, and the public names are what they are said to be.'''
from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import zennit_prune

PACKAGE = Path(zennit_prune.__file__).parent
ROOMS = ('cli', 'pipeline', 'looking', 'repairs', 'planning', 'relevance', 'graph', 'surgery', 'tracing', 'util',
         'errors')
FILES = sorted(path for path in PACKAGE.rglob('*.py') if path.name != '__init__.py')


def module_of(path: Path) -> str:
    '''The dotted name of a file within the package.'''
    return '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)


def imports(path: Path) -> Iterator[str]:
    '''The files of the package that a file imports anywhere in it, for types alone included.'''
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[:len(here) - node.level + 1], *(node.module or '').split('.')]
            base = [part for part in base if part]
            for name in node.names:
                inner = '.'.join([*base, name.name])
                yield inner if (PACKAGE / (inner.replace('.', '/') + '.py')).exists() else '.'.join(base)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else [node.module or '']
            assert not any(name.split('.')[0] == 'zennit_prune' for name in names), f'{path}: relative imports only'


def test_imports_point_down() -> None:
    up = [f'{module_of(path)} -> {other}' for path in FILES for other in imports(path) if other
          and ROOMS.index(other.split('.')[0]) < ROOMS.index(module_of(path).split('.')[0])]
    assert not up


def test_no_circles() -> None:
    arrows = {module_of(path): set(imports(path)) for path in FILES}
    free: set[str] = {''}
    while True:
        fresh = {name for name, others in arrows.items() if name not in free and others <= free}
        if not fresh:
            break
        free |= fresh
    assert not arrows.keys() - free


def test_every_file_is_in_a_room() -> None:
    assert {path.relative_to(PACKAGE).parts[0] for path in FILES} == {*ROOMS[:-1], 'errors.py'}
    assert all(path.name.startswith('_') for path in FILES if path.parent != PACKAGE)


@pytest.mark.parametrize('room', ROOMS[:-1])
def test_rooms_say_what_they_are_for(room: str) -> None:
    text = ast.get_docstring(ast.parse((PACKAGE / room / '__init__.py').read_text())) or ''
    assert 'may import' in text and 'Start with' in text and len(text.split('\n')) >= 4


def test_the_root_shows_public_names_and_rooms() -> None:
    names = dir(zennit_prune)
    assert set(ROOMS[:-1]) < set(names) and not [name for name in names if name.startswith('_')]
    assert all(getattr(zennit_prune, name) is not None for name in names)
    assert not {*ROOMS, *(path.stem for path in PACKAGE.glob('*.py'))} & ({*names} - {*ROOMS[:-1]})


def test_importing_the_root_imports_nothing_else() -> None:
    code = 'import sys, zennit_prune; dir(zennit_prune); zennit_prune.PruneError; assert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)

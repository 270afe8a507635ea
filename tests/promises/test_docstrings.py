'''Every public name has a docstring and a page of the reference; ``make lint`` says what the docstrings lack.'''
from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

DOCS = Path(__file__).parents[2] / 'docs'


def loaded() -> Any:
    '''The file that finds the public names, which is in no package.'''
    spec = spec_from_file_location('docstrings', DOCS / 'docstrings.py')
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_public_names_have_docstrings() -> None:
    docstrings = loaded()
    missing = []
    for names in docstrings.public_names().values():
        for name, value in names.items():
            if isinstance(value, type):
                missing += [name] if not value.__dict__.get('__doc__') else []
                missing += [f'{name}.{inner}' for inner, member in docstrings.members(value) if not member.__doc__]
            elif callable(value) or isinstance(value, ModuleType):
                missing += [name] if not value.__doc__ else []
    assert not missing


def test_rooms_with_public_names_have_a_page() -> None:
    index = (DOCS / 'index.md').read_text()
    for room in loaded().public_names():
        assert f'\napi/{room}\n' in index
        assert re.search(rf'^\.\. room:: {room}$', (DOCS / 'api' / f'{room}.rst').read_text(), re.MULTILINE)


def test_types_are_written_as_numpydoc_wants_them() -> None:
    spaced = loaded().spaced
    assert spaced('Do.\n\nParameters\n----------\nx, y: int\n    Note: two.\n*names: str\nz:\n    It.\n\nNotes\n'
                  '-----\na: b') == ('Do.\n\nParameters\n----------\nx, y : int\n    Note: two.\n*names : str\nz\n'
                                     '    It.\n\nNotes\n-----\na: b')

'''The public names of the library, and what their docstrings lack: ``make lint`` runs this file.

Public is what ``zennit_prune.__all__`` and the ``__all__`` of its rooms list, with the public methods and properties of
the classes among them. The checks are those of numpydoc, but for the ones in :data:`IGNORED`.
'''
from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules
from types import FunctionType, ModuleType
from typing import Any

import zennit_prune

PACKAGE = zennit_prune.__name__
IGNORED = {
    'GL01', 'GL02',  # quotes share a line with the text
    'SS05',  # a summary may be a noun: a property is something
    'ES01', 'SA01',  # neither an extended summary nor cross-references are demanded
}
SECTIONS = ('Parameters', 'Other Parameters', 'Attributes', 'Returns', 'Yields')
MEMBERS = (FunctionType, classmethod, staticmethod, property)


def rooms() -> list[str]:
    '''Return the names of the rooms, the sub-packages of the library.'''
    return [info.name for info in iter_modules(zennit_prune.__path__) if info.ispkg]


def public_names() -> dict[str, dict[str, Any]]:
    '''Return every public object by room and by the shortest name that users may import it under.

    Returns
    -------
    dict of str to dict of str to object
        The objects by room (``'errors'`` for what is in no room), each under ``'zennit_prune.name'`` where the root
        exports it, and under ``'zennit_prune.room.name'`` elsewhere.
    '''
    found: dict[str, dict[str, Any]] = {'errors': {}}
    for room in rooms():
        package = import_module(f'{PACKAGE}.{room}')
        found[room] = {f'{PACKAGE}.{name}' if name in zennit_prune.__all__ else f'{PACKAGE}.{room}.{name}':
                       getattr(package, name) for name in getattr(package, '__all__', ())}
    elsewhere = {name for names in found.values() for name in names}
    for name in zennit_prune.__all__:
        if f'{PACKAGE}.{name}' not in elsewhere:
            found['errors'][f'{PACKAGE}.{name}'] = getattr(zennit_prune, name)
    return {room: names for room, names in found.items() if names}


def members(cls: type) -> Iterator[tuple[str, Any]]:
    '''Yield the public methods and properties that a class gets from this library, each with its name.

    A method that overrides one of another library is documented there.
    '''
    foreign = {name for base in cls.__mro__ if not base.__module__.startswith(PACKAGE) for name in vars(base)}
    for name in sorted({*dir(cls)} - foreign):
        value = inspect.getattr_static(cls, name)
        if not name.startswith('_') and isinstance(value, MEMBERS) and getattr(value, '__name__', '') != '<lambda>':
            owner = next(base for base in cls.__mro__ if name in base.__dict__)
            function = value.fget if isinstance(value, property) else getattr(value, '__func__', value)
            if owner.__module__.startswith(PACKAGE) and getattr(function, '__module__', '').startswith(PACKAGE):
                yield name, value if isinstance(value, property) else function


def spaced(text: str) -> str:
    '''Put a space before the colon between name and type, where numpydoc wants one and this library writes none.'''
    lines, section = text.split('\n'), ''
    for number, line in enumerate(lines):
        if line and not set(line) - {'-'} and number:
            section = lines[number - 1]
        elif section in SECTIONS and not line.startswith(' '):
            lines[number] = re.sub(r'^(\*{0,2}\w+(?:, \*{0,2}\w+)*):($| )', r'\1 :\2', line).removesuffix(' :')
    return '\n'.join(lines)


def mistakes(name: str, value: Any, shown: str = '') -> Iterator[str]:
    '''Yield everything that the docstring of one object lacks.

    Parameters
    ----------
    name: str
        The object's full name.
    value: object
        A class, a function or a property.
    shown: str
        The docstring of its class, whose examples may show a method.
    '''
    from numpydoc.docscrape import get_doc_object
    from numpydoc.validate import validate
    text = inspect.getdoc(value) if isinstance(value, property) or not inspect.isclass(value) else inspect.cleandoc(
        value.__dict__.get('__doc__') or '')
    if not text:
        yield f'{name}: GL08 The object does not have a docstring'
        return
    short = name.rpartition('.')[2]
    has_example = isinstance(value, property) or re.search(rf'>>>.*\.{short}\(|\.\.\. .*\.{short}\(', shown)
    attributes = set(re.findall(r'\w+', ' '.join(
        re.findall(r'^(\w+(?:, \w+)*):', text.partition('Attributes\n---')[2], re.MULTILINE))))
    for code, message in validate(get_doc_object(value, doc=spaced(text)))['errors']:
        documented = code == 'PR01' and set(re.findall(r"'(\*{0,2}\w+)'", message)) <= attributes
        if code not in IGNORED and not documented and not (code == 'EX01' and has_example):
            yield f'{name}: {code} {message}'
    if isinstance(value, FunctionType) and 'Raises\n---' not in text \
            and re.search(r'^\s+raise \w*(Error|Warning)\(', inspect.getsource(value), re.MULTILINE):
        yield f'{name}: RS01 No Raises section found'


def all_mistakes() -> list[str]:
    '''Return everything that the docstrings of public names lack, those of methods and properties included.'''
    found: list[str] = []
    for names in public_names().values():
        for name, value in names.items():
            if isinstance(value, ModuleType):
                found += [] if value.__doc__ else [f'{name}: GL08 The object does not have a docstring']
            elif isinstance(value, (type, FunctionType)):  # what is left are aliases of types
                found += mistakes(name, value)
            for inner, member in members(value) if isinstance(value, type) else ():
                found += mistakes(f'{name}.{inner}', member, value.__doc__ or '')
    return found


if __name__ == '__main__':
    found = all_mistakes()
    print(*found, f'{len(found)} mistakes in the docstrings of public names', sep='\n')
    sys.exit(bool(found))

'''Which output of a network belongs to which folder of images: never guessed where it could be wrong.'''
from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from .errors import PruneError

RULES = ('auto', 'sorted', 'numbers', 'names', 'none')
NUMBER = re.compile(r'(\d+)(?![^\W_])')  # '7', '7_rose', '07-rose', but not '7up'
WAYS = ('--classes numbers if folders begin with the number of their output, --classes names if they are called as '
        "torchvision's classes, --classes FILE with the names of the outputs, line by line, or as JSON "
        '{"folder": number}, or --classes none to go by what the network predicts')


def class_outputs(names: Sequence[str], rule: str, outputs: int, categories: Sequence[str] = ()) -> tuple[int, ...]:
    '''The output of the network for every folder.

    Parameters
    ----------
    names: sequence of str
        The folders.
    rule: str
        ``'sorted'``: outputs are numbered as the sorted folders, as in training with torchvision's ``ImageFolder``;
        there are as many. ``'auto'``: the same, unless numbers in the names say otherwise. ``'numbers'``: a folder's
        name begins with its output. ``'names'``: it is that of a category. Else the path of a file: one name a line,
        in the order of the outputs, where a folder is a whole line or the first word of one; or a JSON object of
        outputs by folder.
    outputs: int
        How many outputs the network has.
    categories: sequence of str
        The names of the outputs, for ``'names'``.

    Raises
    ------
    PruneError
        If a folder has no output, or two have the same, or ``'auto'`` cannot tell.
    '''
    if rule in ('auto', 'sorted'):
        found = _in_order(names, rule, outputs)
    elif rule == 'numbers':
        found = {name: int(match[1]) for name in names if (match := NUMBER.match(name))}
    elif rule == 'names':
        if not categories:
            raise PruneError(f'--classes names needs the names of the {outputs} outputs, which are known for networks '
                             'of torchvision with its own classes: give them by --classes FILE, line by line.')
        found = _by_line(names, categories, 'the categories of torchvision')
    else:
        found = _from_file(names, Path(rule), outputs)
    return _checked(names, found, rule, outputs)


def _in_order(names: Sequence[str], rule: str, outputs: int) -> dict[str, int]:
    if len(names) != outputs:
        raise PruneError(f'there are {len(names)} folders of images, but the network has {outputs} outputs: say which '
                         f'belong together. Give {WAYS}.')
    numbers = [int(match[1]) if (match := NUMBER.match(name)) else None for name in names]
    if rule == 'auto' and None not in numbers and numbers != list(range(outputs)):
        wrong = next(place for place, number in enumerate(numbers) if number != place)
        raise PruneError(f'is folder {names[wrong]!r} output {wrong}, by the order of names, or output '
                         f'{numbers[wrong]}? Give --classes sorted, as in training with ImageFolder, or --classes '
                         'numbers.')
    return {name: number for number, name in enumerate(names)}


def _from_file(names: Sequence[str], path: Path, outputs: int) -> dict[str, int]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PruneError(f'--classes {str(path)!r} is neither a file that can be read nor one of '
                         f'{", ".join(RULES)}.') from error
    if path.suffix != '.json':
        lines = [line.strip() for line in text.splitlines()]
        while lines and not lines[-1]:
            lines.pop()
        if len(lines) != outputs:
            raise PruneError(f'{str(path)!r} has {len(lines)} lines, but the network has {outputs} outputs: one line '
                             'each, in their order.')
        return _by_line(names, lines, repr(str(path)))
    try:
        found = json.loads(text)
    except ValueError as error:
        raise PruneError(f'{str(path)!r} is no JSON: {error}.') from error
    if not isinstance(found, dict) or not all(type(value) is int for value in found.values()):
        raise PruneError(f'{str(path)!r} does not say which output belongs to which folder: give an object like '
                         '{"daisy": 0, "rose": 3}.')
    return found


def _by_line(names: Sequence[str], lines: Sequence[str], where: str) -> dict[str, int]:
    '''Each name's only line: the whole of it, or its first word.'''
    found = {}
    for name in names:
        wanted = _plain(name)
        whole = [number for number, line in enumerate(lines) if _plain(line) == wanted]
        first = [number for number, line in enumerate(lines) if line and _plain(line.split()[0].rstrip(',')) == wanted]
        places = whole or first
        if len(places) > 1:
            raise PruneError(f'{name!r} is the name of outputs {", ".join(map(str, places))} in {where}: say which, by '
                             '--classes FILE.json with {"folder": number}.')
        if places:
            found[name] = places[0]
    return found


def _plain(name: str) -> str:
    return name.strip().lower().replace('_', ' ')


def _checked(names: Sequence[str], found: dict[str, int], rule: str, outputs: int) -> tuple[int, ...]:
    owner: dict[int, str] = {}
    for name in names:
        number = found.get(name)
        if number is None:
            raise PruneError(f'--classes {rule} does not say which output folder {name!r} belongs to. Give {WAYS}.')
        if not 0 <= number < outputs:
            raise PruneError(f'--classes {rule}: folder {name!r} is said to be output {number}, but the network has '
                             f'outputs 0 to {outputs - 1}.')
        if number in owner:
            raise PruneError(f'--classes {rule}: folders {owner[number]!r} and {name!r} are both said to be output '
                             f'{number}.')
        owner[number] = name
    return tuple(owner)

'''Errors for names that are not known, with the nearest that is.'''
from __future__ import annotations

import difflib
from collections.abc import Iterable

from ..errors import PruneError


def unknown(what: str, value: object, known: Iterable[str], remedy: str = '') -> PruneError:
    '''The error for a value that is none of the known names; it names the nearest one.'''
    names = list(known)
    near = difflib.get_close_matches(str(value), names, 1)
    hint = f'; did you mean {near[0]!r}?' if near else '.'
    return PruneError(f'{what}={value!r} is unknown: use one of {", ".join(map(repr, names))}{hint}'
                      f'{" " * bool(remedy)}{remedy}')

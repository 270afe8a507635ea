'''Error messages for unknown names and options, with the nearest known one suggested.'''
from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from ..errors import PruneError


def nearest(value: object, known: Iterable[str]) -> str:
    '''Return ``"; did you mean 'x'?"`` for the known name most similar to ``value``, or ``''`` where none is near.'''
    names = {name.lower(): name for name in known}
    found = get_close_matches(str(value).lower(), names, 1)
    return f'; did you mean {names[found[0]]!r}?' if found else ''


def unknown(what: str, value: object, known: Iterable[str], remedy: str = '') -> PruneError:
    '''Return the error for an unknown value of an option.

    Parameters
    ----------
    what: str
        The name of the option.
    value: object
        The value given.
    known: iterable of str
        The names that are allowed.
    remedy: str
        The other values that are allowed, to follow the list of names, e.g. ``', or a function of the output'``.

    Returns
    -------
    PruneError
        Says what was given and what is allowed; the caller raises it.

    Examples
    --------
    >>> print(unknown('aggregate', 'sum_abs', ('abs', 'sumabs')))
    aggregate='sum_abs' is unknown: use one of 'abs', 'sumabs'; did you mean 'sumabs'?
    '''
    known = list(known)
    return PruneError(f'{what}={value!r} is unknown: use one of {", ".join(map(repr, known))}{remedy}'
                      f'{nearest(value, known) or "."}')

'''The errors and warnings users meet; each message names the thing, the value, what is allowed and what to do.'''
from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class PruneError(ValueError):
    '''Anything that keeps a network from being pruned exactly, or an argument that cannot be honoured.

    Its message names the thing, the value that was given, what is allowed, and what to do.

    Examples
    --------
    >>> try:
    ...     zp.Plan(graph, {'conv1': [8]})
    ... except zp.PruneError as error:
    ...     print(error)
    position 8 is out of range for group 'conv1': it has positions 0 to 7.
    '''


class VerificationError(PruneError):
    '''A pruned network does not compute what the masked original computes.

    Examples
    --------
    A pruned network that was changed afterwards no longer passes the comparison:

    >>> plan = zp.Plan(graph, {'conv1': [0, 1]})
    >>> small = plan.apply(model)
    >>> _ = nn.init.zeros_(small.conv2.weight)
    >>> try:
    ...     zp.verify(model, small, plan, example)
    ... except zp.VerificationError:
    ...     print('the networks differ')
    the networks differ
    '''


class PruneWarning(UserWarning):
    '''Something the user should know, although the result is still exact.

    Examples
    --------
    Warnings can be turned into errors, e.g. in a script that nobody watches:

    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter('error', zp.PruneWarning)
    ...     small = zp.Plan(graph, {'conv1': [0, 1]}).apply(model)
    >>> small.conv1.out_channels
    6
    '''


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


def warn(message: str) -> None:
    '''Issue a :class:`PruneWarning` that points to the user's line, from however deep in the package it comes.

    That is the innermost frame outside of this package, with the decorators and contexts of PyTorch and of the standard
    library left out.
    '''
    inside = (str(Path(__file__).parent), contextlib.__file__)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and (frame.f_code.co_filename.startswith(inside)
                                        or '_contextlib' in frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, PruneWarning, stacklevel=level)

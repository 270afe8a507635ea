'''The errors and warnings users meet, and the checks of names and values that raise them.

Each message names the thing, the value, what is allowed and what to do.
'''
from __future__ import annotations

import contextlib
import inspect
import reprlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec('Arguments')
Returned = TypeVar('Returned')
OWNERS: dict[str, list[str]] = {}  # by option, the functions and methods that have it
BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


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


def shown(value: object) -> str:
    '''Return a value as errors show it: a short text or number as it is written, anything else by its type.'''
    if value is None or isinstance(value, (str, bytes, int, float, complex)):
        return reprlib.repr(value)
    name = value.__name__ if isinstance(value, type) else type(value).__name__
    return f'the class {name}' if isinstance(value, type) else f'{"an" if name[0] in "AEIOU" else "a"} {name}'


def check_callable(name: str, value: object, remedy: str = 'give a function, or leave it out') -> None:
    '''Refuse what is neither a function nor None.'''
    if value is not None and not callable(value):
        raise PruneError(f'{name}={shown(value)} is no function: {remedy}.')


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


def names_options(*passed_on: Callable[..., Any], usage: str = ''
                  ) -> Callable[[Callable[Arguments, Returned]], Callable[Arguments, Returned]]:
    '''Let calls whose arguments do not fit the signature raise a PruneError that names the function and the argument.

    Parameters
    ----------
    passed_on: callable
        Other functions with such a check, to which ``**options`` go.
    usage: str
        A call that is right, for errors about arguments by position; by default, the order of the arguments.

    Returns
    -------
    callable
        A decorator of functions, methods and ``__init__``; it keeps the signature.

    Examples
    --------
    >>> @names_options()
    ... def scaled(value, factor=2):
    ...     return value * factor
    >>> try:
    ...     scaled(3, facter=4)
    ... except PruneError as error:
    ...     print(error)
    scaled: option='facter' is unknown: use one of 'value', 'factor'; did you mean 'factor'?
    '''
    def decorate(function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
        called = function.__qualname__.removesuffix('.__init__')
        parameters = list(inspect.signature(function).parameters.values())
        options = tuple(dict.fromkeys([*_optional(parameters), *(name for other in passed_on
                                                                 for name in options_of(other))]))
        own = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        names = [name for name in dict.fromkeys([*own, *options]) if name not in ('self', 'cls')]
        for name in _optional(parameters):
            OWNERS.setdefault(name, []).append(called)

        @wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
            check_names(called, kwargs, names)
            _check_order(usage or _order(called, parameters), parameters, len(args), kwargs)
            return function(*args, **kwargs)

        vars(call)['options'] = options
        return call

    return decorate


def options_of(function: Callable[..., Any]) -> tuple[str, ...]:
    '''Return the names of the options of a function or class, those included that it passes on.'''
    if 'options' in vars(function):
        return tuple(vars(function)['options'])
    return tuple(_optional(inspect.signature(function).parameters.values()))


def options_for(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    '''Return those of some options that a function or class has.'''
    known = options_of(function)
    return {name: value for name, value in options.items() if name in known}


def check_names(called: str, names: Iterable[str], known: Iterable[str]) -> None:
    '''Refuse names that are not among the known options of what was called.'''
    known = list(known)
    for name in names:
        if name not in known:
            owners = ', '.join(OWNERS.get(name, [])[:3])
            hint = f' {name!r} is an option of {owners}.' if owners else ''
            raise PruneError(f'{unknown(f"{called}: option", name, known)}{hint}')


def _optional(parameters: Iterable[inspect.Parameter]) -> list[str]:
    '''Return the names of the parameters that have a default.'''
    return [parameter.name for parameter in parameters if parameter.default is not inspect.Parameter.empty]


def _order(called: str, parameters: Iterable[inspect.Parameter]) -> str:
    '''Return a call with the names of the arguments that are given by position, in their order.'''
    shown = [parameter for parameter in parameters if parameter.name not in ('self', 'cls')]
    names = [parameter.name for parameter in shown if parameter.kind in BY_POSITION]
    return f'{called}({", ".join([*names, *["..."] * (len(names) < len(shown))])})'


def _check_order(usage: str, parameters: Iterable[inspect.Parameter], given: int, names: Iterable[str]) -> None:
    '''Refuse too many arguments by position, and an argument that is given by position and by name, or not at all.'''
    by_position = [parameter for parameter in parameters if parameter.kind in BY_POSITION]
    called = usage.partition('(')[0]
    if given > len(by_position) and not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        raise PruneError(f'{called}: there are more arguments without a name than it takes: call {usage}.')
    for number, parameter in enumerate(by_position):
        if number < given and parameter.name in names:
            raise PruneError(f'{called}: {parameter.name!r} is given twice, by position and by name: call {usage}.')
        if number >= given and parameter.name not in names and parameter.default is parameter.empty:
            raise PruneError(f'{called}: {parameter.name!r} is not given: call {usage}.')

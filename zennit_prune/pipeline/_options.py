'''Options by name: checked when a method is called, before any data are read, and filled in from a preset.'''
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import nn

from ..errors import PruneError, unknown
from ..graph._graph import ChannelGraph
from ..planning._allocate import check_limits
from ..planning._cost import Budget
from ..relevance._collect import check_settings
from ..relevance._criteria import CRITERIA, Criterion, uses_data
from ..relevance._initial import check_target
from ..relevance._relevance import Relevance
from ..repairs._repair import checked_method

AnyCriterion = str | Criterion | Callable[[ChannelGraph, nn.Module, Any], Relevance]
Arguments = ParamSpec('Arguments')
Returned = TypeVar('Returned')
OF_THE_CRITERION = ('aggregate', 'initial')  # options that mean something for one criterion
OWNERS: dict[str, list[str]] = {}  # by option, the functions and methods that have it


def takes_options(*passed_on: Callable[..., Any]) -> Callable[[Callable[Arguments, Returned]],
                                                              Callable[Arguments, Returned]]:
    '''Let calls with an unknown option raise a PruneError, and let a pruner's preset set what a call leaves open.

    Parameters
    ----------
    passed_on: callable
        Other functions with such a check, to which ``**options`` go.
    '''
    def decorate(function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
        called = function.__qualname__.removesuffix('.__init__')
        parameters = inspect.signature(function).parameters.values()
        own = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        optional = [parameter.name for parameter in parameters if parameter.default is not inspect.Parameter.empty]
        options = tuple(dict.fromkeys([*optional, *(name for other in passed_on for name in options_of(other))]))
        names = [name for name in dict.fromkeys([*own, *options]) if name != 'self']
        for name in optional:
            OWNERS.setdefault(name, []).append(called)

        @wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
            check_names(called, kwargs, names)
            if own[0] == 'self':
                given = {**dict(zip(own, args)), **kwargs}
                preset = _fitting(getattr(args[0], '_defaults', {}), given, 'criterion' in options)
                kwargs.update({name: value for name, value in preset.items() if name in options and name not in given})
            return function(*args, **kwargs)

        vars(call)['options'] = options
        return call

    return decorate


def _fitting(preset: Mapping[str, Any], given: Mapping[str, Any], scores: bool) -> Mapping[str, Any]:
    '''Return a preset without what is for its own criterion, where a call is of another one, or of none.'''
    own = preset.get('criterion', 'relevance')
    if scores and given.get('criterion', own) == own:
        return preset
    return {name: value for name, value in preset.items() if name not in OF_THE_CRITERION}


def options_of(function: Callable[..., Any]) -> tuple[str, ...]:
    '''Return the names of the options of a function or class, those included that it passes on.'''
    if 'options' in vars(function):
        return tuple(vars(function)['options'])
    parameters = inspect.signature(function).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.default is not inspect.Parameter.empty)


def check_names(called: str, names: Iterable[str], known: Iterable[str]) -> None:
    '''Refuse names that are not among the known options of what was called.'''
    known = list(known)
    for name in names:
        if name not in known:
            hint = f' {name!r} is an option of {", ".join(OWNERS[name])}.' if name in OWNERS else ''
            raise PruneError(f'{unknown(f"{called}: option", name, known)}{hint}')


def check_budget(budget: object) -> None:
    '''Refuse what is not a budget.'''
    if not isinstance(budget, Budget):
        raise PruneError(f'a Budget is needed, not {budget!r}: e.g. Budget(flops=0.5).')


def check_criterion(criterion: object, automatic: bool = False) -> None:
    '''Refuse what is no criterion, function, or name of a criterion; ``'auto'`` is for whole runs only.'''
    if criterion == 'auto' and not automatic:
        raise PruneError("criterion='auto' depends on the budget: give it to Pruner.prune or Pruner.iterate, whose "
                         'result says what was chosen (result.choice).')
    known = [*CRITERIA, *['auto'] * automatic]
    if not callable(criterion) and not isinstance(criterion, Criterion) and criterion not in known:
        raise unknown('criterion', criterion, known, ', or a function of (graph, model, loader)')


def check_scoring(criterion: object, **options: Any) -> None:
    '''Refuse wrong values of the options of :meth:`Pruner.collect`, whatever the network and the data are.'''
    settings = {name: value for name, value in options.items() if name in options_of(check_settings)}
    found = check_settings(**{**settings, 'criterion': criterion if uses_data(criterion) else 'relevance'})
    initial = options.get('initial', 'auto')
    check_target(options.get('target'), found.initial if initial == 'auto' else initial)


def check_values(budget: object, criterion: object = 'relevance', repair: object = 'refit', **options: Any) -> None:
    '''Refuse wrong values of the options of :meth:`Pruner.prune`, whatever the network and the data are.'''
    check_budget(budget)
    check_criterion(criterion, automatic=True)
    checked_method(repair, 'repair')
    check_scoring(criterion, **options)
    check_limits(**{name: value for name, value in options.items() if name in options_of(check_limits)})

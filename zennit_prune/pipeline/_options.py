'''Options by name: checked when a method is called, before any data are read, and filled in from a preset.'''
from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import nn

from ..errors import PruneError, names_options, options_for, options_of, shown, unknown
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


def takes_options(*passed_on: Callable[..., Any]) -> Callable[[Callable[Arguments, Returned]],
                                                              Callable[Arguments, Returned]]:
    '''Check the names of arguments as ``names_options`` does, and let a pruner's preset set what a call leaves open.

    Parameters
    ----------
    passed_on: callable
        Other functions with such a check, to which ``**options`` go.
    '''
    def decorate(function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
        checked = names_options(*passed_on)(function)
        options, own = options_of(checked), list(inspect.signature(function).parameters)
        if own[0] != 'self':
            return checked

        @wraps(checked)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
            given = {**dict(zip(own, args)), **kwargs}
            preset = _fitting(getattr(args[0], '_defaults', {}), given, 'criterion' in options)
            kwargs.update({name: value for name, value in preset.items() if name in options and name not in given})
            return checked(*args, **kwargs)

        return call

    return decorate


def _fitting(preset: Mapping[str, Any], given: Mapping[str, Any], scores: bool) -> Mapping[str, Any]:
    '''Return a preset without what is for its own criterion, where a call is of another one, or of none.'''
    own = preset.get('criterion', 'relevance')
    if scores and given.get('criterion', own) == own:
        return preset
    return {name: value for name, value in preset.items() if name not in OF_THE_CRITERION}


def check_budget(budget: object) -> None:
    '''Refuse what is not a budget.'''
    if not isinstance(budget, Budget):
        raise PruneError(f'a Budget is needed, not {shown(budget)}: e.g. Budget(flops=0.5).')


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
    settings = options_for(check_settings, options)
    found = check_settings(**{**settings, 'criterion': criterion if uses_data(criterion) else 'relevance'})
    initial = options.get('initial', 'auto')
    check_target(options.get('target'), found.initial if initial == 'auto' else initial)


def check_values(budget: object, criterion: object = 'relevance', repair: object = 'refit', **options: Any) -> None:
    '''Refuse wrong values of the options of :meth:`Pruner.prune`, whatever the network and the data are.'''
    check_budget(budget)
    check_criterion(criterion, automatic=True)
    checked_method(repair, 'repair')
    check_scoring(criterion, **options)
    check_limits(**options_for(check_limits, options))

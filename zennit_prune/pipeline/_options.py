'''Options by name: checked when a method is called, before any data are read, and filled in from a preset.'''
from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import nn

from ..errors import PruneError, names_options, options_of, shown, unknown
from ..graph._graph import ChannelGraph
from ..planning._cost import Budget
from ..relevance._criteria import CRITERIA, Criterion
from ..relevance._relevance import Relevance

AnyCriterion = str | Criterion | Callable[[ChannelGraph, nn.Module, Any], Relevance]
Arguments = ParamSpec('Arguments')
Returned = TypeVar('Returned')


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
            preset: Mapping[str, Any] = getattr(args[0], '_defaults', {})
            given = {*own[:len(args)], *kwargs}
            kwargs.update({name: value for name, value in preset.items() if name in options and name not in given})
            return checked(*args, **kwargs)

        return call

    return decorate


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

'''Prune by several criteria to several budgets, repair in several ways, and evaluate what comes out.'''
from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch import nn
from tqdm.auto import tqdm

from .cost import Budget, CostModel
from .curves import Cell, Row, Sweep
from .errors import PruneError
from .evaluate import evaluated
from .files import check_folder
from .fingerprint import ATOMIC, described, fingerprint, named
from .networks import copied, device_of, tensors_by_module
from .plan import Plan
from .pruner import NAMED, Criterion, Pruner
from .relevance import Relevance
from .repair import METHODS, repaired
from .seeds import seeded

Result = TypeVar('Result')


def sweep(pruner: Pruner, loader: Any, evaluate: Callable[[nn.Module], float], budgets: Sequence[Budget],
          criteria: Sequence[Criterion] | Mapping[str, Criterion | Relevance], repairs: Sequence[str] = ('none',),
          seeds: Sequence[int] = (0,), checkpoint: str | os.PathLike[str] | None = None, progress: bool = True, *,
          collect: Mapping[str, Any] | None = None, plan: Mapping[str, Any] | None = None) -> Sweep:
    '''Accuracy over budget, for every criterion, repair and seed.

    Parameters
    ----------
    pruner: Pruner
        The network and its rules.
    loader: iterable or callable
        Reference data, for criteria and repairs; or a function of the seed that returns them: draws of references.
    evaluate: callable
        Takes a network and returns a number, more is better: the accuracy on test data, say. It is given a copy, which
        it may train on.
    budgets: sequence of Budget
        All in one unit.
    criteria: sequence or mapping
        As for :meth:`Pruner.collect`: names and functions; or a mapping of names to such, or to relevance that is there
        already. Relevance is collected once for each criterion and seed. Include ``'random'``.
    repairs: sequence of str
        Methods of :func:`zennit_prune.repair`, or ``'none'``.
    seeds: sequence of int
        Passed to criteria, and to ``loader`` if it is a function; what a loader shuffles depends on it alone.
    checkpoint: path-like, optional
        A file that always holds what is finished; the same call goes on from there. By what a network, a criterion or
        an option holds, and by the code of functions, it is known whether the call is the same; data are not compared.
    progress: bool
        Show a progress bar on standard error.
    collect, plan: mapping, optional
        Further options of :meth:`Pruner.collect` and :meth:`Pruner.plan`, e.g. ``plan={'round_to': 8}``.

    Returns
    -------
    Sweep
        Where pruning fails (a budget out of reach, a criterion that says nothing about this network), a row has the
        reason in place of a value, and the others go on.

    Raises
    ------
    PruneError
        For nothing to do, something given twice, budgets of several units, or a checkpoint of another sweep.
    '''
    if not isinstance(criteria, Mapping):
        names = _several('criteria', criteria, named)
        criteria = dict(zip(names, criteria))
    _several('criteria', criteria)
    _several('repairs', repairs)
    for what, one, known in [('criteria', each, NAMED) for each in criteria.values()] + \
            [('repairs', each, METHODS) for each in repairs]:
        if not (callable(one) or isinstance(one, Relevance)) and one not in known:
            raise PruneError(f'{what}: {one!r} is unknown, use some of {", ".join(map(repr, known))}.')
    _several('seeds', seeds)
    _several('budgets', budgets)
    seeds = list(map(int, seeds))
    units = {budget.name if isinstance(budget, Budget) else repr(budget) for budget in budgets}
    if len(units) > 1 or not isinstance(budgets[0], Budget):
        raise PruneError(f'budgets are in one unit, e.g. [Budget(flops=0.8), Budget(flops=0.5)]; these are in '
                         f'{", ".join(sorted(units))}.')
    if isinstance(loader, Iterator):
        loader = list(loader)  # it is gone through more than once
    collect, plan = dict(collect or {}), dict(plan or {})
    settings = {
        'network': fingerprint(dict(tensors_by_module(pruner.model))), 'rules': described(pruner.composite),
        'groups': {group.name: group.size for group in pruner.graph.groups},
        'criteria': {name: _known(criterion) for name, criterion in criteria.items()}, 'repairs': list(repairs),
        'seeds': seeds, 'budgets': [repr(budget) for budget in budgets], 'loader': _known(loader),
        'evaluate': _known(evaluate), 'options': {key: described(value) for key, value in
                                                  {**collect, **plan}.items()},
    }
    done = _begun(checkpoint, settings)
    if done is None:
        done = Sweep(units.pop(), _value(evaluate, copied(pruner.model)), (), settings)
    finished = {row.cell for row in done.rows}
    with tqdm(desc='sweep', total=len(seeds) * len(criteria) * len(budgets) * len(repairs), initial=len(finished),
              disable=not progress, leave=False) as bar:
        for row in _rows(pruner, loader, evaluate, budgets, criteria, repairs, seeds, finished, collect, plan):
            done = Sweep(done.unit, done.original, (*done.rows, row), settings)
            if checkpoint is not None:
                done.save(checkpoint)
            bar.update()
    return done


class Attempt(Generic[Result]):
    '''A result, or the reason why there is none, and the seconds it took.'''

    def __init__(self, work: Callable[..., Result], *arguments: Any):
        start = time.perf_counter()
        self.error: PruneError | None = None
        try:
            self._result = work(*arguments)
        except PruneError as error:
            self.error = error
        self.seconds = time.perf_counter() - start

    def result(self) -> Result:
        '''The result; else the reason is raised again.'''
        if self.error is not None:
            raise self.error
        return self._result


def _rows(pruner: Pruner, loader: Any, evaluate: Callable[[nn.Module], float], budgets: Sequence[Budget],
          criteria: Mapping[str, Criterion | Relevance], repairs: Sequence[str], seeds: Sequence[int],
          finished: Collection[Cell], collect: Mapping[str, Any], plan: Mapping[str, Any]) -> Iterator[Row]:
    '''The rows that are missing; relevance, and a network before its repairs, are made once for all that need them.'''
    def missing(seed: int, criterion: str, some: Sequence[Budget]) -> list[Cell]:
        cells = [Cell(criterion, method, seed, budget.value) for budget in some for method in repairs]
        return [cell for cell in cells if cell not in finished]

    def collected(given: Criterion | Relevance, data: Any, seed: int) -> Relevance:
        if isinstance(given, Relevance):
            return given
        with seeded(seed, device_of(pruner.model)):
            return pruner.collect(data, given, **{'seed': seed, 'progress': False, **collect})

    def pruned(relevance: Attempt[Relevance], budget: Budget) -> tuple[Plan, nn.Module]:
        chosen = pruner.plan(relevance.result(), budget, **{'progress': False, **plan})
        return chosen, chosen.apply(pruner.model, progress=False)

    def mended(small: Attempt[tuple[Plan, nn.Module]], data: Any, method: str, seed: int) -> nn.Module:
        chosen, network = small.result()
        if method == 'none':
            return copied(network)  # evaluate may train it on
        with seeded(seed, device_of(pruner.model)):
            return repaired(network, pruner.model, chosen, data, method, False)

    for seed in seeds:
        data = loader
        if callable(loader) and any(missing(seed, criterion, budgets) for criterion in criteria):
            with seeded(seed, device_of(pruner.model)):
                data = loader(seed)
            data = list(data) if isinstance(data, Iterator) else data
        for criterion, given in criteria.items():
            if not missing(seed, criterion, budgets):
                continue
            relevance = Attempt(collected, given, data, seed)
            for budget in budgets:
                if not missing(seed, criterion, [budget]):
                    continue
                small = Attempt(pruned, relevance, budget)
                for cell in missing(seed, criterion, [budget]):
                    network = Attempt(mended, small, data, cell.repair, seed)
                    value = Attempt(lambda network: _value(evaluate, network.result()), network)
                    left = None if small.error else _left(small.result()[0], budget)
                    yield Row(*cell, left, None if value.error else value.result(),
                              relevance.seconds + small.seconds + network.seconds, str(value.error or ''))


def _left(plan: Plan, budget: Budget) -> float:
    '''What a plan leaves of the network, as a share.'''
    if plan.timing is not None:
        return plan.timing.left
    costs = CostModel(plan.graph)
    counts = costs.counts(plan.removed)
    return costs(budget.unit, counts) / costs(budget.unit, 0 * counts)


def _value(evaluate: Callable[[nn.Module], float], network: nn.Module) -> float:
    value = evaluated(evaluate, network)
    if not math.isfinite(value):
        raise PruneError(f'evaluate returned {value}: it must return a finite number.')
    return value


def _several(what: str, given: Any, name: Callable[[Any], str] = repr) -> list[str]:
    '''The names of what is given, at least one and each once.'''
    if isinstance(given, str) or not isinstance(given, Collection) or not given:
        raise PruneError(f'{what}={given!r}: give a list of at least one.')
    names = [name(item) for item in given]
    twice = next((one for one in names if names.count(one) > 1), None)
    if twice is not None:
        raise PruneError(f'{what}: {twice} is given twice. Leave one out, or give criteria as a dict by other names.')
    return names


def _known(value: Any) -> Any:
    '''By what a part of the call is known again; not by the data it holds or encloses, which may change as it runs.'''
    if isinstance(value, ATOMIC):
        return value
    if isinstance(value, Relevance):
        return f'Relevance ({fingerprint(dict(value.items()))})'
    code = getattr(value, '__code__', None)
    return named(value) if code is None else f'{named(value)} ({fingerprint(code)})'


def _begun(checkpoint: str | os.PathLike[str] | None, settings: dict[str, Any]) -> Sweep | None:
    '''What a checkpoint holds, after a check that it is of the same call.'''
    if checkpoint is None:
        return None
    check_folder(checkpoint)
    if not os.path.exists(checkpoint):
        return None
    begun = Sweep.load(checkpoint)
    other = [key for key, value in settings.items() if begun.settings.get(key) != value]
    if other:
        key = other[0]
        raise PruneError(f'{os.fspath(checkpoint)!r} is of another sweep: its {key} was {begun.settings.get(key)!r}, '
                         f'here it is {settings[key]!r}. Give another file, or remove this one.')
    return begun

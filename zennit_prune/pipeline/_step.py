'''One step of pruning: collect, plan, apply and repair.

``prune`` is one such step, and ``iterate`` many of them.
'''
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from zennit.core import Composite

from ..errors import warn
from ..graph._graph import ChannelGraph
from ..planning._carry import scores_for_original, values_for_plan
from ..planning._cost import UNITS, Budget, cost_model
from ..planning._plan import Plan
from ..relevance._criteria import uses_data
from ..relevance._relevance import Relevance
from ..repairs._references import KEPT, References
from ..repairs._repair import repaired
from ..util._distributed import gathered, rank_and_world
from ..util._isolation import seeded
from ..util._networks import device_of
from ._checkpoint import filled
from ._choose import Choice, choose
from ._options import AnyCriterion


class Pruning(Protocol):
    '''A network and its channels, with the methods that score and choose them; :class:`zennit_prune.Pruner` is one.'''

    model: nn.Module
    composite: Composite
    graph: ChannelGraph

    def collect(self, *args: Any, **options: Any) -> Relevance:
        '''Score every channel on reference data.'''

    def plan(self, *args: Any, **options: Any) -> Plan:
        '''Choose the channels to remove.'''

    def on(self, network: nn.Module, progress: bool) -> Pruning:
        '''Return a pruner with these rules and options for a pruned version of the network.'''


class Pruned(NamedTuple):
    '''A pruned network, the plan that leads to it from the original, and the scores that its last step used.'''

    plan: Plan
    network: nn.Module
    relevance: Relevance


@dataclass(frozen=True)
class Recipe:
    '''The settings that all steps of a run share; :meth:`zennit_prune.Pruner.iterate` documents them.

    Every step starts from random states of its own, which depend on the seed and the step's number.
    '''

    pruner: Pruning
    budget: Budget
    criterion: AnyCriterion
    repair: str
    seed: int
    verify: bool
    progress: bool
    collecting: Mapping[str, Any]
    planning: Mapping[str, Any]

    @cached_property
    def device(self) -> torch.device:
        '''The device of the network.'''
        return device_of(self.pruner.model)

    def decided(self, loader: Iterable[Any], choice: Choice | None = None
                ) -> tuple[Recipe, Iterable[Any], Choice | None]:
        '''Return the recipe with a criterion in place of ``'auto'``, a loader with all batches, and the choice.'''
        if self.criterion != 'auto':
            return self, loader, None
        if choice is None:  # else it was recorded by the run that this one goes on with
            loader = list(loader) if isinstance(loader, Iterator) else loader
            collecting = {name: value for name, value in self.collecting.items()
                          if name not in ('checkpoint', 'exemplars')}

            def planned(references: Iterable[Any], criterion: AnyCriterion) -> Plan:
                relevance = self.pruner.collect(references, criterion, seed=self.seed, progress=False, **collecting)
                return self.pruner.plan(relevance, self.budget, progress=False, **self.planning)

            choice = agreed(choose(self.pruner.model, loader, planned, self.repair, self.seed, self.progress),
                            self.device)
        collecting = dict(self.collecting)
        if collecting.get('exemplars') and not uses_data(choice.criterion):
            warn(f"criterion='auto' chose {choice.criterion!r}, which scores no samples: no reference samples are kept "
                 'for the channels.')
            del collecting['exemplars']
        return replace(self, criterion=choice.criterion, collecting=collecting), loader, choice

    def references(self, loader: Iterable[Any]) -> References:
        '''Wrap a loader so that it keeps the inputs that the repair needs.'''
        kept = 0 if self.repair == 'none' else -(-KEPT // rank_and_world()[1])
        return References(loader, kept, self.collecting.get('classes'), self.seed, network=self.pruner.model)

    def step(self, references: References, budget: Budget, number: int = 1, earlier: Pruned | None = None,
             **collecting: Any) -> Pruned:
        '''Collect, plan, apply and repair: prune the network, or what an earlier step left of it, to a budget.

        Parameters
        ----------
        references: References
            Reference data.
        budget: Budget
            How much this step leaves of the original.
        number: int
            Of the step; it says what its random numbers start from.
        earlier: Pruned, optional
            The result of the step before.
        **collecting:
            Options of :meth:`Pruner.collect` for this step.
        '''
        options = {**self.collecting, **collecting, 'seed': self.seed + number - 1, 'progress': self.progress}
        references.forget()
        with seeded(self.seed + number, self.device):  # whoever resumes in the middle of collecting draws less
            pruner = self.pruner if earlier is None else self.pruner.on(earlier.network, self.progress)
            relevance = pruner.collect(references, self.criterion, **options)
        if earlier is None:
            plan = self._first_plan(relevance, budget)
        else:
            plan = self._later_plan(earlier.plan, pruner.graph, relevance, budget)
        small = plan.apply(self.pruner.model, self.verify, self.progress)
        if earlier is not None:
            small = filled(small, values_for_plan(earlier.plan, plan, earlier.network))
        if self.repair != 'none':
            matter = earlier is None and references.classes is None
            small = repaired(self.pruner.model, small, plan, references.inputs(self.device), self.repair, self.progress,
                             in_place=True, classes_matter=matter)
        return Pruned(plan, small, relevance)

    def _planned(self, relevance: Relevance, budget: Budget) -> Plan:
        return self.pruner.plan(relevance, budget, progress=self.progress, **self.planning)

    def _first_plan(self, relevance: Relevance, budget: Budget) -> Plan:
        plan = self._planned(relevance, self.budget)  # what is out of reach in the end is said at once
        return plan if budget is self.budget else self._planned(relevance, budget)

    def _later_plan(self, earlier: Plan, graph: ChannelGraph, relevance: Relevance, budget: Budget) -> Plan:
        '''Make a plan for the original network that removes all channels of ``earlier``, and more.'''
        plan = self._planned(scores_for_original(earlier, graph, relevance), budget)
        for name, positions in earlier.removed.items():
            plan = plan.remove(name, positions)
        return plan


def agreed(value: Any, device: torch.device) -> Any:
    '''Return the value of the first process in all processes, once all of them have called this.'''
    return gathered(value, device)[0] if rank_and_world()[1] > 1 else value


def reliability_of(relevance: Relevance) -> float | None:
    '''Return the split-half rank correlation over the whole network, or None for scores that use no data.'''
    return relevance.reliability().network if relevance.has_halves else None


def costs_left(plan: Plan) -> dict[str, float]:
    '''Return the cost that a plan leaves, by unit.'''
    costs = cost_model(plan.graph)
    removed = costs.counts(plan.removed)
    return {unit: costs(unit, removed) for unit in UNITS}


def shares_left(plan: Plan) -> dict[str, float]:
    '''Return the share of the original's cost that a plan leaves, by unit.'''
    return {unit: cost / (whole or 1.0) for (unit, cost), whole in zip(costs_left(plan).items(),
                                                                     costs_left(Plan(plan.graph)).values())}

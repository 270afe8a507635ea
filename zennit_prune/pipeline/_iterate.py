'''The loop over budget steps: score, prune, repair, fine-tune, evaluate, and go on from the smaller network.'''
from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import PruneError, check_callable, warn
from ..planning._cost import UNITS, Budget
from ..planning._plan import Plan
from ..repairs._references import References
from ..util._distributed import rank_and_world
from ..util._fingerprint import described, fingerprint, named
from ..util._isolation import seeded
from ..util._networks import copied, tensors_by_module, unique_tensors, unwrapped
from ._checkpoint import Checkpoint, State, filled
from ._result import Result, Step, evaluated
from ._step import Pruned, Recipe, agreed, costs_left, reliability_of, shares_left


@dataclass
class Loop:
    '''A run of many steps, with the options of :meth:`zennit_prune.Pruner.iterate`.

    All that a step depends on is in its :class:`State`: the network in it is the original, narrowed by the plan and
    filled with values, as a checkpoint has them.
    '''

    recipe: Recipe
    step: float = 0.05
    finetune: Callable[[nn.Module], nn.Module | None] | None = None
    callback: Callable[[Step], object] | None = None
    evaluate: Callable[[nn.Module], float] | None = None
    min_score: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.step, bool) or not isinstance(self.step, (int, float)) or not 0 < self.step <= 1:
            raise PruneError(f"step={self.step!r}: a step takes a share of the original's cost, between 0 and 1.")
        for name in ('finetune', 'callback', 'evaluate'):
            check_callable(name, getattr(self, name))
        if self.min_score is not None and self.evaluate is None:
            raise PruneError(f'min_score={self.min_score!r} needs evaluate=, a function from a network to the number '
                             'that must not fall below it.')
        self.model, self.budget = self.recipe.pruner.model, self.recipe.budget
        if self.budget.unit not in UNITS and self.step < 1:
            raise PruneError(f'{self.budget!r}: steps are shares of one of {", ".join(UNITS)}. Give a budget in one of '
                             'these, or prune at once.')

    def run(self, loader: Iterable[Any], checkpoint: Any = None) -> Result:
        '''Run all steps, or those that a checkpoint lacks.'''
        file = None if checkpoint is None else Checkpoint(checkpoint, self._settings())
        state = None if file is None else file.load(Plan(self.recipe.pruner.graph), self.model)
        self._wait()  # all processes have read before one writes
        if state is None:
            state = self._start()
            self._done(state, file)
        self.recipe, loader, choice = self.recipe.decided(loader, state.choice)
        if choice is not state.choice:
            state = state._replace(choice=choice)
            self._save(state, file)
        references = self.recipe.references(loader)
        stopped = f'{self.budget!r} is reached.'
        while (budget := self._next(state.plan)) is not None:
            later = self._advanced(state, budget, references, file)
            if self._too_low(later.history[-1]):
                stopped = self._why(later.history[-1])
                state = state._replace(relevance=later.relevance)
                warn(f'{self.budget!r} is not reached: {stopped}')
                break
            state = later
            self._done(state, file)
        self._wait()
        if file is not None and rank_and_world()[0] == 0:
            file.remove()
        assert state.relevance is not None
        network = state.network if state.plan.removed else copied(self.model)
        return Result(network, state.plan, state.relevance, state.history, stopped, choice)

    def _start(self) -> State:
        began, plan = time.perf_counter(), Plan(self.recipe.pruner.graph)
        with seeded(self.recipe.seed, self.recipe.device):
            state = State(plan, self.model, None, (self._seen(0, plan, self.model, None, began),))
        if self._too_low(state.history[0]):
            raise PruneError(f'the network itself is at {state.history[0].evaluation:.6g}, below '
                             f'min_score={self.min_score}: set a lower one.')
        return state

    def _advanced(self, state: State, budget: Budget, references: References, file: Checkpoint | None) -> State:
        '''Return the state after a step to ``budget``.'''
        began, number = time.perf_counter(), len(state.history)
        earlier: Pruned | None = None
        options: dict[str, Any] = {}
        if number > 1 and state.relevance is not None:
            earlier = Pruned(state.plan, state.network, state.relevance)
            options['exemplars'] = 0  # those of the original are kept
        if file is not None:
            options['checkpoint'] = file.collecting
        with seeded(self.recipe.seed + number, self.recipe.device):
            done = self.recipe.step(references, budget, number, earlier, **options)
            network = self._tuned(done.plan, done.network)
            step = self._seen(number, done.plan, network, reliability_of(done.relevance), began)
        return State(done.plan, network, state.relevance or done.relevance, (*state.history, step), state.choice)

    def _tuned(self, plan: Plan, network: nn.Module) -> nn.Module:
        '''Return the network with the values after ``finetune``; flags, hooks and types stay those of the original.'''
        if self.finetune is None:
            return network
        found = self.finetune(network)
        if found is not None and not isinstance(found, nn.Module):
            raise PruneError(f'finetune returned a {type(found).__name__}: return the network, or None after training '
                             'it in place.')
        values = unique_tensors(unwrapped(network if found is None else found))
        return filled(plan.graph._narrowed(self.model, plan.removed), values)

    def _seen(self, number: int, plan: Plan, network: nn.Module, reliability: float | None, began: float) -> Step:
        '''Return a row of the history; ``evaluate`` gets a copy of the network, so that it may do anything.'''
        value = None if self.evaluate is None else evaluated(self.evaluate, copied(network).eval())
        return Step(number, shares_left(plan), agreed(value, self.recipe.device), reliability,
                    time.perf_counter() - began)

    def _save(self, state: State, file: Checkpoint | None) -> None:
        if file is not None and rank_and_world()[0] == 0:
            file.save(state)

    def _done(self, state: State, file: Checkpoint | None) -> None:
        self._save(state, file)
        if self.callback is not None:
            self.callback(state.history[-1])

    def _wait(self) -> None:
        '''Wait until all processes are here.'''
        agreed(None, self.recipe.device)

    def _too_low(self, step: Step) -> bool:
        return self.min_score is not None and not (step.evaluation is not None and step.evaluation >= self.min_score)

    def _why(self, step: Step) -> str:
        unit = self.budget.unit if self.budget.unit in step.left else 'flops'
        left = f'{step.left[unit]:.1%} of the {unit}'
        return (f'step {step.number} would leave {left} and fall to {step.evaluation:.6g}, below '
                f'min_score={self.min_score}: this is the network before it.')

    def _next(self, plan: Plan) -> Budget | None:
        '''Return the budget of the next step, a multiple of a step, at least half a step further; None at the end.'''
        unit, left = self.budget.unit, shares_left(plan)
        if self.step == 1:
            return None if plan.removed else self.budget
        whole = costs_left(Plan(plan.graph))[unit]
        limit = self.budget.limit(whole)
        if plan.removed and left[unit] * whole <= limit * (1 + 1e-12):
            return None
        share = 1.0 - self.step * (round((1 - left[unit]) / self.step) + 1)
        return self.budget if share * whole <= limit else Budget(**{unit: share})

    def _settings(self) -> dict[str, Any]:
        '''Return the settings that have to be equal for a run to go on.'''
        recipe = self.recipe
        return {'weights': fingerprint(tensors_by_module(self.model)), 'composite': described(recipe.pruner.composite),
                'budget': repr(self.budget), 'step': self.step, 'criterion': described(recipe.criterion),
                'repair': recipe.repair, 'finetune': named(self.finetune), 'evaluate': named(self.evaluate),
                'min_score': self.min_score, 'seed': recipe.seed,
                'options': {key: described(value) for key, value in {**recipe.collecting, **recipe.planning}.items()}}

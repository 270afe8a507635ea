'''The loop: score, prune a step, repair, fine-tune, look, and again from the smaller network.'''
from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import PruneError, PruneWarning
from ..graph._graph import ChannelGraph
from ..planning._carry import scores_for_original, values_for_plan
from ..planning._cost import UNITS, Budget, cost_model
from ..planning._plan import Plan
from ..relevance._relevance import Relevance
from ..repairs._references import KEPT, References, warn_of_missing_classes
from ..repairs._repair import checked_method, repaired
from ..util._distributed import gathered, rank_and_world
from ..util._fingerprint import described, fingerprint, named
from ..util._isolation import seeded
from ..util._networks import copied, device_of, tensors_by_module, unique_tensors, unwrapped
from ._checkpoint import Checkpoint, State, filled
from ._choose import choose
from ._result import Result, Step, evaluated

if TYPE_CHECKING:
    from ._pruner import Criterion, Pruner

COLLECTING = ('aggregate', 'initial', 'target', 'classes', 'attributor', 'nonfinite', 'checkpoint')


@dataclass
class Loop:
    '''What the steps of a run have in common; see :meth:`zennit_prune.Pruner.iterate` for the meaning.

    All that a step depends on is in its :class:`State`: the network in it is the original, narrowed by the plan and
    filled with values, as a checkpoint has them; and every step starts from random states of its own.
    '''

    pruner: Pruner
    budget: Budget
    step: float = 0.05
    criterion: Criterion = 'relevance'
    repair: str = 'refit'
    finetune: Callable[[nn.Module], nn.Module | None] | None = None
    callback: Callable[[Step], object] | None = None
    evaluate: Callable[[nn.Module], float] | None = None
    floor: float | None = None
    seed: int = 0
    verify: bool = True
    progress: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.budget, Budget):
            raise PruneError(f'a Budget is needed, not {self.budget!r}: e.g. Budget(flops=0.5).')
        if isinstance(self.step, bool) or not isinstance(self.step, (int, float)) or not 0 < self.step <= 1:
            raise PruneError(f"step={self.step!r}: a step takes a share of the original's cost, between 0 and 1.")
        checked_method(self.repair, 'repair')
        if self.floor is not None and self.evaluate is None:
            raise PruneError(f'floor={self.floor!r} needs evaluate=, a function from a network to the number that must '
                             'not fall below it.')
        self.collecting = {key: value for key, value in self.options.items() if key in COLLECTING}
        self.planning = {key: value for key, value in self.options.items() if key not in COLLECTING}
        self.model = self.pruner.model
        self.device = device_of(self.model)
        if self.budget.unit not in UNITS and self.step < 1:
            raise PruneError(f'{self.budget!r}: steps are shares of one of {", ".join(UNITS)}. Give a budget in one of '
                             'these, or prune at once.')

    def run(self, loader: Iterable[Any], checkpoint: Any = None) -> Result:
        '''All steps, or those that a checkpoint lacks.'''
        file = None if checkpoint is None else Checkpoint(checkpoint, self._settings())
        state = None if file is None else file.load(Plan(self.pruner.graph), self.model)
        self._agreed(None)  # all processes have read before one writes
        if state is None:
            state = self._start()
            self._done(state, file)
        kept = 0 if self.repair == 'none' else -(-KEPT // rank_and_world()[1])
        if self.criterion == 'auto':
            loader = list(loader) if isinstance(loader, Iterator) else loader
            options = {key: value for key, value in self.collecting.items() if key != 'checkpoint'}
            chosen = choose(self.pruner, loader, self.budget, method=self.repair, seed=self.seed,
                            progress=self.progress, collect=options, plan=self.planning)
            self.criterion = self._agreed(chosen.criterion)
        references = References(loader, kept, self.collecting.get('classes'), self.seed)
        stopped = f'{self.budget!r} is reached.'
        while (budget := self._next(state.plan)) is not None:
            later = self._advanced(state, budget, references, file)
            if self._too_low(later.history[-1]):
                stopped = self._why(later.history[-1])
                state = state._replace(relevance=later.relevance)
                warnings.warn(f'{self.budget!r} is not reached: {stopped}', PruneWarning, stacklevel=3)
                break
            state = later
            self._done(state, file)
        self._agreed(None)
        if file is not None and rank_and_world()[0] == 0:
            file.remove()
        assert state.relevance is not None
        return Result(state.network, state.plan, state.relevance, state.history, stopped)

    def _start(self) -> State:
        began, plan = time.perf_counter(), Plan(self.pruner.graph)
        with seeded(self.seed, self.device):
            network = copied(self.model)
            state = State(plan, network, None, (self._seen(0, plan, network, None, began),))
        if self._too_low(state.history[0]):
            raise PruneError(f'the network itself is at {state.history[0].evaluation:.6g}, below floor={self.floor}: '
                             'set a lower one.')
        return state

    def _advanced(self, state: State, budget: Budget, references: References, file: Checkpoint | None) -> State:
        '''The state after a step to ``budget``.'''
        began, number = time.perf_counter(), len(state.history)
        options = {'progress': self.progress, 'seed': self.seed + number - 1, **self.collecting}
        if file is not None:
            options['checkpoint'] = file.collecting
        references.forget()
        with seeded(self.seed + number, self.device):
            pruner = self.pruner if number == 1 else self.pruner.on(state.network)
            relevance = pruner.collect(references, self.criterion, **options)
        plan = self._planned(state.plan, budget, pruner.graph, relevance)
        with seeded(self.seed + number, self.device):  # anew: whoever resumes in the middle of collecting draws less
            proven = plan.apply(self.model, self.verify, self.progress)
            network = filled(proven, values_for_plan(state.plan, plan, state.network))
            if self.repair != 'none':
                inputs = references.inputs(self.device)
                if number == 1 and self.repair == 'refit' and references.classes is None:
                    warn_of_missing_classes(self.model, inputs, stacklevel=5)
                network = repaired(self.model, network, plan, inputs, self.repair, self.progress)
            values = unique_tensors(self._tuned(network))
            network = filled(plan.graph._narrowed(self.model, plan.removed), values)
            stability = relevance.reliability().network if relevance.has_halves else None
            step = self._seen(number, plan, network, stability, began)
        return State(plan, network, state.relevance or relevance, (*state.history, step))

    def _planned(self, earlier: Plan, budget: Budget, graph: ChannelGraph, relevance: Relevance) -> Plan:
        '''A plan for the original network that removes what ``earlier`` does, and more.'''
        if not earlier.removed:
            plan = self.pruner.plan(relevance, self.budget, **self.planning)  # what is out of reach is said at once
            return plan if budget is self.budget else self.pruner.plan(relevance, budget, **self.planning)
        scores = scores_for_original(earlier, graph, relevance)
        plan = self.pruner.plan(scores, budget, **self.planning)
        for name, positions in earlier.removed.items():
            plan = plan.remove(name, positions)
        return plan

    def _tuned(self, network: nn.Module) -> nn.Module:
        if self.finetune is None:
            return network
        found = self.finetune(network)
        if found is not None and not isinstance(found, nn.Module):
            raise PruneError(f'finetune returned a {type(found).__name__}: return the network, or None after training '
                             'it in place.')
        return unwrapped(network if found is None else found)

    def _seen(self, number: int, plan: Plan, network: nn.Module, stability: float | None, began: float) -> Step:
        '''What is to be known of a network; ``evaluate`` gets a copy, so that it may do anything.'''
        value = None if self.evaluate is None else evaluated(self.evaluate, copied(network).eval())
        return Step(number, _left(plan), self._agreed(value), stability, time.perf_counter() - began)

    def _done(self, state: State, file: Checkpoint | None) -> None:
        if file is not None and rank_and_world()[0] == 0:
            file.save(state)
        if self.callback is not None:
            self.callback(state.history[-1])

    def _agreed(self, value: Any) -> Any:
        '''The first process's value, in all of them; nobody goes on before all are here.'''
        return gathered(value, self.device)[0] if rank_and_world()[1] > 1 else value

    def _too_low(self, step: Step) -> bool:
        return self.floor is not None and not (step.evaluation is not None and step.evaluation >= self.floor)

    def _why(self, step: Step) -> str:
        unit = self.budget.unit if self.budget.unit in step.left else 'flops'
        left = f'{step.left[unit]:.1%} of the {unit}'
        return (f'step {step.number} would leave {left} and fall to {step.evaluation:.6g}, below floor={self.floor}: '
                'this is the network before it.')

    def _next(self, plan: Plan) -> Budget | None:
        '''What the next step is to leave, None at the end: a multiple of a step, at least half a step further.'''
        unit, left = self.budget.unit, _left(plan)
        if self.step == 1:
            return None if plan.removed else self.budget
        whole = costs_left(Plan(plan.graph))[unit]
        limit = self.budget.limit(whole)
        if plan.removed and left[unit] * whole <= limit * (1 + 1e-12):
            return None
        share = 1.0 - self.step * (round((1 - left[unit]) / self.step) + 1)
        return self.budget if share * whole <= limit else Budget(**{unit: share})

    def _settings(self) -> dict[str, Any]:
        '''What has to be equal for a run to go on.'''
        return {'weights': fingerprint(tensors_by_module(self.model)), 'composite': described(self.pruner.composite),
                'budget': repr(self.budget), 'step': self.step, 'criterion': described(self.criterion),
                'repair': self.repair, 'finetune': named(self.finetune), 'evaluate': named(self.evaluate),
                'floor': self.floor, 'seed': self.seed,
                'options': {key: described(value) for key, value in self.options.items()}}


def costs_left(plan: Plan) -> dict[str, float]:
    '''What a plan leaves, by unit.'''
    costs = cost_model(plan.graph)
    removed = costs.counts(plan.removed)
    return {unit: costs(unit, removed) for unit in UNITS}


def _left(plan: Plan) -> dict[str, float]:
    '''The same as shares of the whole.'''
    return {unit: cost / (whole or 1.0) for (unit, cost), whole in zip(costs_left(plan).items(),
                                                                     costs_left(Plan(plan.graph)).values())}

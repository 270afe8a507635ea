'''Latency budgets: the arithmetic with times made up, and one real measurement.'''
from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planning.test_allocate import skewed
from planning.test_plan import NETS, counts
from small import Mixed, Residual, chain, images, same, seeded, snapshot
from torch import nn

import zennit_prune as zp
from zennit_prune.planning import _workload as timing
from zennit_prune.planning._latency import Grid, LatencyModel
from zennit_prune.planning._workload import Call

LATENCY = sys.modules[LatencyModel.__module__]  # the name in the package is the function's


def table(pruner: zp.Pruner, scale: float = 2.0, rest: float = 1e-5, shares: Sequence[float] = (0.25, 0.5, 1.0)
          ) -> zp.planning.LatencyTable:
    '''Every operation takes a microsecond, and ten more for the whole of each axis; between, times are linear.'''
    def seconds(call: Call) -> Any:
        grid = np.ix_(*[np.array(shares)] * len(call.sizes))
        return 1e-6 + 1e-5 * np.broadcast_to(sum(grid), [len(shares)] * len(call.sizes))

    calls = calls_of(pruner)
    grids = {call.key: Grid((np.array(shares),) * len(call.sizes), seconds(call)) for call in calls}
    whole = sum(1e-6 + 1e-5 * len(call.sizes) for call in calls)
    return zp.planning.LatencyTable(timing.device_name(torch.device('cpu')), rest + scale * whole, scale, grids)


def calls_of(pruner: zp.Pruner) -> list[Call]:
    return LatencyModel(pruner.graph, pruner.model, Everything('made up', 1.0, 1.0, {}))._calls


class Everything(zp.planning.LatencyTable):
    '''Knows every operation, and that it takes no time.'''

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.grids = Nothing()


class Nothing(dict[str, Grid]):
    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> Grid:
        return Grid((), np.array(0.0))


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    '''Networks take as many milliseconds as they have parameters.'''
    seen: list[int] = []

    def side_by_side(models: Sequence[nn.Module], *_: Any) -> list[float]:
        seen.extend(sum(parameter.numel() for parameter in model.parameters()) for model in models)
        return [size / 1e3 for size in seen[-len(models):]]

    monkeypatch.setattr(LATENCY, 'side_by_side', side_by_side)
    return seen


# --- budgets


@pytest.mark.parametrize('value', [0, -1.0, True, float('nan'), float('inf'), '1', None, 1j])
def test_seconds_that_say_nothing(value: Any) -> None:
    with pytest.raises(zp.PruneError, match=f'latency={value!r}'.replace('(', '.').replace(')', '.')):
        zp.Budget(latency=value)


@pytest.mark.parametrize('value', [1, 0.0, 1.0, 2, True, -0.5, '0.5'])
def test_fractions_that_say_nothing(value: Any) -> None:
    with pytest.raises(zp.PruneError, match=f'latency_fraction={value!r}.*fraction between 0 and 1'):
        zp.Budget(latency_fraction=value)


def test_latency_budgets() -> None:
    for value in (0.5, 3, np.float64(0.5)):
        budget = zp.Budget(latency=value)
        assert (budget.unit, budget.name, budget.is_fraction, budget.limit(10)) == ('latency', 'latency', False, value)
    budget = zp.Budget(latency_fraction=0.5)
    assert (budget.unit, budget.is_fraction, budget.limit(10)) == ('latency', True, 5)
    assert repr(budget) == 'Budget(latency_fraction=0.5)'


# --- the arithmetic


def test_interpolation() -> None:
    grid = Grid((np.array([0.25, 0.5, 1.0]), np.array([0.5, 1.0])), np.array([[1.0, 2.0], [3.0, 6.0], [5.0, 10.0]]))
    for left, expected in (((1, 1), 10), ((0.25, 0.5), 1), ((0.5, 0.75), 4.5), ((0.75, 1), 8), ((0.375, 0.75), 3),
                           ((0.1, 0.1), 1), ((0.0, 1.0), 2)):
        assert grid(left) == pytest.approx(expected)
    assert Grid((np.array([1.0]),), np.array([7.0]))([0.3]) == 7


def test_prediction_by_hand() -> None:
    '''The chain's first group: its convolution's output, the ReLU and the next convolution's input, one half each.'''
    pruner = zp.Pruner(chain(), None, images())
    costs = LatencyModel(pruner.graph, pruner.model, table(pruner))
    names = [group.name for group in pruner.graph.groups]
    nothing = np.zeros(len(names))
    removed = nothing.copy()
    removed[names.index('0')] = 3
    whole = costs('latency', nothing)
    assert whole == pytest.approx(costs.latencies.original)
    assert whole - costs('latency', removed) == pytest.approx(2.0 * 3 * 0.5e-5)
    removed[names.index('0')] = 5  # one sixth is less than the least width measured
    assert whole - costs('latency', removed) == pytest.approx(2.0 * 3 * 0.75e-5)
    assert costs('flops', removed) < costs('flops', nothing)


def test_every_operation_with_channels_counts() -> None:
    '''Convolutions, norms, activations, concatenations, linear layers; views take no time.'''
    keys = ' '.join(call.key for call in calls_of(zp.Pruner(seeded(Mixed()), None, images())))
    for name in ('convolution', 'native_batch_norm', 'relu', 'cat', 'group_norm', 'addmm'):
        assert f'aten.{name}' in keys or f'aten.native_{name}' in keys
    assert 'view' not in keys and 'aten.t.' not in keys


@pytest.mark.parametrize('net', NETS)
def test_calls_are_those_of_the_pruned_network(net: str) -> None:
    '''Shapes at the width of a plan are the shapes in the network that the plan gives.'''
    model, x = NETS[net](), images(3)
    pruner = zp.Pruner(model, None, x)
    plan = pruner.plan(pruner.collect((), 'random'), zp.Budget(channels=0.75), min_channels=2)
    model_costs = LatencyModel(pruner.graph, model, Everything('made up', 1.0, 1.0, {}))
    small = zp.Pruner(plan.apply(model), None, x)
    left = model_costs._left(counts(plan))
    narrowed, expected = {}, {}
    for found, calls in ((narrowed, model_costs._calls), (expected, calls_of(small))):
        for call in calls:
            shares = call.shares(left) if found is narrowed else np.ones(len(call.sizes))
            exact = shares * call.sizes
            if np.allclose(exact, np.round(exact)) and 'group_norm' not in call.key:  # that has sizes as arguments
                widths = np.round(exact).astype(int).tolist()
                shapes: list[Any] = []
                recorded(call, widths, shapes)
                found.setdefault(str(call.function), []).append(shapes)
    assert narrowed == expected


def recorded(call: Call, widths: list[int], shapes: list[Any]) -> None:
    '''The shapes a call is made with; it has to run.'''
    function = call.function

    def spy(*args: Any, **kwargs: Any) -> Any:
        shapes.append([tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)])
        return function(*args, **kwargs)

    call.function = spy
    with torch.no_grad():
        call.prepared(widths, torch.device('cpu'))()
    call.function = function


@pytest.mark.filterwarnings('ignore:the plan misses its budget')
@pytest.mark.parametrize('net', NETS)
def test_the_prediction_never_exceeds_the_budget(net: str, unmeasured: list[int]) -> None:
    pruner = zp.Pruner(NETS[net](), None, images())
    latencies = table(pruner)
    costs = LatencyModel(pruner.graph, pruner.model, latencies)
    for seed, share in enumerate((0.95, 0.85, 0.75)):
        budgets = zp.Budget(latency_fraction=share), zp.Budget(latency=share * latencies.original)
        plans = [pruner.plan(skewed(pruner, seed), budget, latencies=latencies) for budget in budgets]
        assert plans[0] == plans[1]
        removed = counts(plans[0])
        assert costs('latency', removed) <= share * latencies.original * (1 + 1e-9)
        for row in np.eye(len(removed))[removed > 0]:
            assert costs('latency', removed - row) > share * latencies.original
        found = plans[0].timing
        assert found is not None and found.allowed == pytest.approx(share) and found.predicted <= share + 1e-9


def test_out_of_reach_in_milliseconds(unmeasured: list[int]) -> None:
    pruner = zp.Pruner(chain(), None, images())
    latencies = table(pruner)
    with pytest.raises(zp.PruneError, match=r'latency_fraction=0.05\) is out of reach.* of [\d.]+ ms\)') as error:
        pruner.plan(skewed(pruner, 0), zp.Budget(latency_fraction=0.05), latencies=latencies)
    nearest = float(str(error.value).split('nearest is ')[1].split(' of ')[0])
    assert pruner.plan(skewed(pruner, 0), zp.Budget(latency_fraction=nearest), latencies=latencies).removed
    with pytest.raises(zp.PruneError, match=r'leaves the network as it is: it has .* ms'):
        pruner.plan(skewed(pruner, 0), zp.Budget(latency=2.0), latencies=latencies)


def test_the_plan_says_what_was_measured(unmeasured: list[int]) -> None:
    pruner = zp.Pruner(chain(), None, images())
    plan = pruner.plan(skewed(pruner, 0), zp.Budget(latency_fraction=0.7), latencies=table(pruner))
    size = sum(parameter.numel() for parameter in plan.apply(pruner.model).parameters())
    assert unmeasured == [sum(parameter.numel() for parameter in pruner.model.parameters()), size]
    assert plan.timing is not None and plan.timing.left == size / unmeasured[0]
    assert f'{size:,.3f} ms'.replace(',', '') in str(plan).replace(',', '') and 'budget 70.0%' in str(plan)
    assert plan.keep(*next((name, gone[:1]) for name, gone in plan.removed.items())).timing is None


def test_a_budget_that_is_missed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LATENCY, 'side_by_side', lambda *_: [1.0, 0.9])
    pruner = zp.Pruner(chain(), None, images())
    with pytest.warns(zp.PruneWarning, match=r'misses its budget as measured.*90\.0% left; predicted 6'):
        plan = pruner.plan(skewed(pruner, 0), zp.Budget(latency_fraction=0.7), latencies=table(pruner))
    assert plan.timing is not None and not plan.timing.holds


def test_a_table_of_another_device(unmeasured: list[int]) -> None:
    pruner = zp.Pruner(chain(), None, images())
    latencies = table(pruner)
    latencies.device = 'a telephone'
    plan = pruner.plan(skewed(pruner, 0), zp.Budget(latency_fraction=0.7), latencies=latencies)
    assert plan.timing is not None and plan.timing.left == plan.timing.predicted <= 0.7 and not unmeasured
    assert 'latency on a telephone: predicted' in str(plan) and 'not measured, for this is another device' in str(plan)


# --- measuring


class Clock:
    '''A clock that goes on only when told.'''

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def call(self, *seconds: float) -> Any:
        '''Something that takes so long, in turn.'''
        durations = iter(seconds)

        def run() -> None:
            self.now += next(durations)

        return lambda: run


def test_medians_with_a_fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing, 'clock', clock)
    cpu = torch.device('cpu')
    # for each round one run to warm up and one that counts; a first round that does not
    steady, spiked = clock.call(*[1.0] * 12), clock.call(9, 9, *[9, 2, 9, 3, 9, 100, 9, 2, 9, 1])
    assert timing.medians([steady, spiked], cpu, rounds=5) == [1.0, 2.0]
    assert timing.medians([clock.call(*[1.0] * 8)], cpu, rounds=50, seconds=0.5) == [1.0]  # three rounds all the same
    short = clock.call(*[1e-5] * 1000)
    assert timing.medians([short], cpu, rounds=3) == [pytest.approx(1e-5)]


def test_a_table_from_a_fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    '''Operations take what their elements say, networks 1 ms and three times the sum: the table finds it out.'''
    pruner = zp.Pruner(NETS['residual'](), None, images())
    costs = LatencyModel(pruner.graph, pruner.model, Everything('made up', 1.0, 1.0, {}))

    def operation(call: Call, widths: Sequence[int]) -> float:
        return 1e-6 * sum(width / size for width, size in zip(widths, call.sizes))

    def medians(prepared: Sequence[Any], *_: Any) -> list[float]:
        networks = [work for work in prepared if isinstance(work.args[0], nn.Module)]
        found = [operation(work.func.__self__, work.args[0]) for work in prepared if work not in networks]
        for network in networks:
            sizes = dict(network.args[0].named_parameters())
            removed = np.array([group.size - sizes[group.name + '.weight'].shape[0] for group in pruner.graph.groups])
            left = costs._left(removed.astype(float))
            found.append(1e-3 + 3 * sum(1e-6 * call.shares(left).sum() for call in costs._calls))
        return found

    monkeypatch.setattr(LATENCY, 'medians', medians)
    latencies = pruner.latencies(progress=False)
    assert latencies.scale == pytest.approx(3.0, rel=1e-2)
    assert latencies is pruner.latencies()
    model = LatencyModel(pruner.graph, pruner.model, latencies)
    assert model._rest == pytest.approx(1e-3, rel=1e-2)
    assert pruner.latencies(1.0, progress=False) is not latencies


def test_tables_are_monotone_and_saved(tmp_path: Path) -> None:
    model = seeded(Mixed())
    pruner = zp.Pruner(model, None, images())
    before = snapshot(model)
    latencies = pruner.latencies(0.1, progress=False)
    assert same(before, snapshot(model))
    for grid in latencies.grids.values():
        assert all((np.diff(grid.seconds, axis=axis) >= 0).all() for axis in range(grid.seconds.ndim))
    latencies.save(tmp_path / 'latencies.json')
    again = zp.planning.LatencyTable.load(tmp_path / 'latencies.json')
    assert str(again) == str(latencies) and 'convolution' in str(again) and repr(again) == repr(latencies)
    fresh = zp.Pruner(seeded(Mixed()), None, images())
    first, second = (LatencyModel(some.graph, some.model, found)
                     for some, found in ((pruner, latencies), (fresh, again)))
    for row in np.diag(first.sizes - 1):
        assert first('latency', row) == second('latency', row) <= latencies.original


@pytest.mark.parametrize('change', [
    lambda data: data.update(format='else'), lambda data: data.update(version=2), lambda data: data.pop('grids'),
    lambda data: next(iter(data['grids'].values())).update(seconds=[1.0]), lambda data: data.update(scale='much'),
])
def test_files_that_are_no_tables(change: Any, tmp_path: Path) -> None:
    table(zp.Pruner(chain(), None, images())).save(tmp_path / 'latencies.json')
    data = json.loads((tmp_path / 'latencies.json').read_text())
    change(data)
    (tmp_path / 'latencies.json').write_text(json.dumps(data))
    with pytest.raises(zp.PruneError, match=r'latencies.json.*no table of latencies'):
        zp.planning.LatencyTable.load(tmp_path / 'latencies.json')


def test_a_table_of_another_network() -> None:
    latencies = table(zp.Pruner(chain(), None, images()))
    for model, x in ((seeded(Residual()), images()), (chain(), images(7))):
        pruner = zp.Pruner(model, None, x)
        with pytest.raises(zp.PruneError, match='measured for another network or input: it lacks'):
            pruner.plan(skewed(pruner, 0), zp.Budget(latency_fraction=0.5), latencies=latencies)


def test_a_real_measurement() -> None:
    '''A wide network at half of its time: the plan holds as predicted, and roughly as measured.'''
    model = nn.Sequential(nn.Conv2d(3, 96, 3, padding=1), nn.ReLU(), nn.Conv2d(96, 96, 3, padding=1), nn.ReLU(),
                          nn.Conv2d(96, 96, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(96, 4))
    pruner = zp.Pruner(seeded(model), None, images(2, 24))
    for _ in range(3):  # on a busy machine a measurement may be anything
        pruner.latencies(5.0, progress=False)
        plan = pruner.plan(pruner.collect((), 'l1'), zp.Budget(latency_fraction=0.5))
        assert plan.timing is not None and plan.timing.predicted <= 0.5
        if 0.1 < plan.timing.left < 0.95:
            break
    assert 0.1 < plan.timing.left < 0.95
    assert 0 < zp.latency(plan.apply(pruner.model), images(2, 24)) < 1

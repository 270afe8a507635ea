'''Budgets, plans and masked networks.'''

from __future__ import annotations

import copy
import gc
import json
import math
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import Functional, Mixed, Residual, apart, chain, composite, drawn_of, images, labels, same, seeded, snapshot
from torch import nn
from torch.nn import functional as F

import zennit_prune as zp
from zennit_prune.planning._allocate import check_reachable
from zennit_prune.planning._cost import cost_model

UNITS = ('flops', 'params', 'bytes', 'channels')


class Separable(nn.Module):
    '''Depthwise separable units with a multiplier, a transposed convolution, and two heads.'''

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.point = nn.Conv2d(12, 8, 1)
        self.up = nn.ConvTranspose2d(8, 5, 2, 2)
        self.mask = nn.Conv2d(5, 2, 1)
        self.fc1, self.fc2 = nn.Linear(8 * 16, 11), nn.Linear(11, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.relu(self.point(F.relu(self.deep(F.relu6(self.norm(self.stem(x)))))))
        return self.fc2(F.relu(self.fc1(x.flatten(1)))), self.mask(F.relu(self.up(x)))


NETS: dict[str, Callable[[], nn.Module]] = {
    'chain': chain,
    'residual': lambda: seeded(Residual()),
    'mixed': lambda: seeded(Mixed()),
    'separable': lambda: seeded(Separable()),
    'functional': lambda: seeded(Functional()),
}


def drawn(graph: zp.graph.ChannelGraph, seed: int, share: float = 0.4) -> zp.Plan:
    '''A plan that removes random channels of every group, at least one in all.'''
    random = np.random.default_rng(seed)
    removed = {}
    for group in graph.groups:
        count = min(int(random.binomial(group.size, share)), group.size - 1)
        removed[group.name] = drawn_of(group, random, count)
    plan = zp.Plan(graph, removed)
    return plan if plan.removed else plan.remove(graph.groups[0].name, [0])


def counts(plan: zp.Plan) -> Any:
    return np.array([len(plan.removed.get(group.name, ())) for group in plan.graph.groups], float)


# --- budgets


@pytest.mark.parametrize(
    'amount',
    [
        {'flops': 1},
        {'flops': True},
        {'flops': 0},
        {'flops': 1.5},
        {'flops': -1},
        {'params': -0.5},
        {'bytes': 1.0},
        {'channels': 0.0},
        {'flops': float('nan')},
        {'flops': float('inf')},
        {'flops': '0.5'},
        {'flops': None},
        {'flops': False},
        {'flops': np.bool_(True)},
        {'flops': 100.0},
        {'flops': [0.5]},
        {'flops': 1j},
    ],
)
def test_budgets_that_say_nothing(amount: dict[str, Any]) -> None:
    ((unit, value),) = amount.items()
    with pytest.raises(zp.PruneError) as error:
        zp.Budget(**amount)
    assert unit in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize('amount', [{}, {'flops': 0.5, 'params': 0.5}, {'speed': 0.5}, {'flops': 0.5, 'speed': 1}])
def test_budgets_of_no_or_several_or_unknown_units(amount: dict[str, Any]) -> None:
    known = 'exactly one of flops=, params=, bytes=, channels=|use one of .flops., .params., .bytes., .channels.'
    with pytest.raises(zp.PruneError, match=known):
        zp.Budget(**amount)


@pytest.mark.parametrize(
    ('value', 'limit'),
    [(0.5, 500), (0.999, 999), (np.float32(0.5), 500), (np.float64(0.25), 250), (200, 200), (np.int64(700), 700),
     (2e2, 200), (np.float32(700), 700)],
)
def test_budgets_of_fractions_and_amounts(value: Any, limit: float) -> None:
    for unit in UNITS:
        budget = zp.Budget(**{unit: value})
        assert budget.unit == unit
        assert budget.limit(1000) == pytest.approx(limit)


@pytest.mark.parametrize('value', [2, 70, np.int64(70), 70.0])
def test_budgets_of_few_channels_or_parameters(value: Any) -> None:
    for budget in (zp.Budget(channels=value), zp.Budget(params=value)):
        assert budget.limit(1000) == value and not budget.is_fraction


@pytest.mark.parametrize('value', [70, 70.0, np.int64(70), np.float64(70)])
@pytest.mark.parametrize('unit', ['flops', 'bytes', 'latency_fraction'])
def test_budgets_in_per_cent_are_refused(unit: str, value: Any) -> None:
    with pytest.raises(zp.PruneError, match=rf'Budget\({unit}=.*70.*did you mean 0\.7\?'):
        zp.Budget(**{unit: value})


def test_channels_and_parameters_in_per_cent_are_refused_where_they_cannot_be_meant() -> None:
    pruner = zp.Pruner(chain(), None, images())
    with pytest.raises(zp.PruneError, match=r'leaves the network as it is.*did you mean 0\.7\?'):
        pruner.plan(scores(pruner.graph), zp.Budget(channels=70))
    with pytest.raises(zp.PruneError, match=r'out of reach.*did you mean 0\.4\?'):
        pruner.plan(scores(pruner.graph), zp.Budget(params=40))


@pytest.mark.parametrize(('name', 'nearest'), [('flop', 'flops'), ('param', 'params'), ('latency_part', 'latency')])
def test_unknown_units_name_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(zp.PruneError, match=f"Budget: option='{name}' is unknown.*did you mean '{nearest}"):
        zp.Budget(**{name: 0.5})
    with pytest.raises(zp.PruneError, match=r'^Budget: .*call Budget\(flops=0.5\), which names the unit'):
        zp.Budget(0.5)  # type: ignore[misc]


def scores(graph: zp.graph.ChannelGraph, seed: int = 0) -> zp.Relevance:
    random = np.random.default_rng(seed)
    return zp.Relevance({group.name: torch.from_numpy(random.random(group.size)) for group in graph.groups})


@pytest.mark.parametrize('unit', UNITS)
@pytest.mark.parametrize('net', NETS)
def test_plans_hold_their_budget_and_spend_it(net: str, unit: str) -> None:
    '''The cost of the network really pruned is within the budget, and the budget less than one channel away.'''
    model, x = NETS[net](), images()
    pruner = zp.Pruner(model, None, x)
    whole = cost_of(model, x, unit, pruner.graph)
    for seed, fraction in enumerate((0.85, 0.6, 0.4)):
        for budget in (zp.Budget(**{unit: fraction}), zp.Budget(**{unit: int(whole * fraction)})):
            plan = pruner.plan(scores(pruner.graph, seed), budget)
            left = cost_of(plan.apply(model, verify=False), x, unit, plan=plan)
            assert left <= budget.limit(whole)
            steps = [
                cost_of(None, x, unit, plan=plan.keep(name, one_of_each_block(plan, name)), predicted=True) - left
                for name in plan.removed
            ]
            assert budget.limit(whole) - left < max(steps)


def one_of_each_block(plan: zp.Plan, name: str) -> list[int]:
    '''Removed positions of a group that can stay together.'''
    blocks = plan.graph.group(name).blocks
    return list({0 if blocks is None else blocks[position]: position for position in plan.removed[name]}.values())


def cost_of(
    model: nn.Module | None, x: torch.Tensor, unit: str, graph: Any = None, plan: Any = None, predicted: bool = False
) -> float:
    if unit == 'channels':
        return sum(group.size for group in (graph or plan.graph).groups) - (counts(plan).sum() if plan else 0)
    return cost_model(plan.graph)(unit, counts(plan)) if predicted else getattr(zp.cost(model, x), unit)


@pytest.mark.parametrize('net', NETS)
def test_predicted_cost_is_the_cost_of_the_pruned_network(net: str) -> None:
    model, x = NETS[net](), images()
    graph = zp.trace(model, x)
    costs = cost_model(graph)
    for seed in range(8):
        plan = drawn(graph, seed)
        small = zp.cost(plan.apply(model, verify=False), x)
        assert {unit: costs(unit, counts(plan)) for unit in UNITS[:3]} == pytest.approx(
            {'flops': small.flops, 'params': small.params, 'bytes': small.bytes}, abs=1e-6
        )


def test_cost_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 4)
    )
    found = zp.cost(model, images(5))
    assert found.params == 3 * 6 * 9 + 6 + 12 + 384 * 4 + 4
    assert found.flops == 2 * (3 * 6 * 9 * 64 + 384 * 4)
    assert found.bytes == 4 * (found.params + 12) + 8
    assert zp.cost(model.half(), images(1).half()).bytes == 2 * (found.params + 12) + 8


def test_cost_counts_shared_parameters_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    assert zp.cost(model, torch.ones(2, 6)).params == 36 + 12


def test_cost_leaves_the_network_alone() -> None:
    model = seeded(Residual()).train()
    before = snapshot(model)
    zp.cost(model, images())
    zp.latency(model, images(), repeats=1)
    assert same(before, snapshot(model))


# --- how a budget is spent


@pytest.mark.parametrize('net', ['chain', 'residual', 'mixed'])
def test_limits_are_kept(net: str) -> None:
    model, x = NETS[net](), images()
    pruner = zp.Pruner(model, None, x)
    relevance = scores(pruner.graph)
    budget = zp.Budget(flops=0.8)
    for options in (
        {'min_channels': 3},
        {'min_share': 0.5},
        {'round_to': 2},
        {'round_to': 3, 'min_channels': 2},
        {'min_share': 0.34, 'round_to': 2},
        {'per_cost': False},
    ):
        plan = pruner.plan(relevance, budget, **options)
        for group in pruner.graph.groups:
            gone = len(plan.removed.get(group.name, ()))
            left = group.size - gone
            assert left >= min(options.get('min_channels', 1), group.size)
            assert left >= math.ceil(options.get('min_share', 0) * group.size - 1e-9)
            assert not gone or left % options.get('round_to', 1) == 0
        assert zp.cost(plan.apply(model, verify=False), x).flops <= 0.8 * zp.cost(model, x).flops


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'min_channels': 0}, 'min_channels=0'),
        ({'min_channels': True}, 'min_channels=True'),
        ({'min_channels': 1.5}, 'min_channels=1.5'),
        ({'min_share': -0.1}, 'min_share=-0.1'),
        ({'min_share': 1.1}, 'min_share=1.1'),
        ({'min_share': float('nan')}, 'min_share=nan'),
        ({'round_to': 0}, 'round_to=0'),
        ({'round_to': 1.5}, 'round_to=1.5'),
    ],
)
def test_limits_out_of_range(options: dict[str, Any], message: str) -> None:
    pruner = zp.Pruner(chain(), None, images())
    with pytest.raises(zp.PruneError, match=message):
        pruner.plan(scores(pruner.graph), zp.Budget(flops=0.5), **options)


def test_lowest_scores_go_first() -> None:
    pruner = zp.Pruner(chain(), None, images())
    relevance = scores(pruner.graph)
    plan = pruner.plan(relevance, zp.Budget(flops=0.5))
    for name, removed in plan.removed.items():
        assert set(removed) == set(relevance[name].argsort()[: len(removed)].tolist())


def test_budget_out_of_reach_names_the_nearest() -> None:
    pruner = zp.Pruner(chain(), None, images())
    relevance = scores(pruner.graph)
    for options in ({}, {'min_channels': 4}, {'min_share': 0.7}):
        with pytest.raises(zp.PruneError, match='out of reach') as error:
            pruner.plan(relevance, zp.Budget(params=0.001), **options)
        nearest = int(str(error.value).split('original (')[1].split(' of ')[0].replace(',', ''))
        plan = pruner.plan(relevance, zp.Budget(params=nearest), **options)
        assert zp.cost(plan.apply(pruner.model), images()).params == nearest


@pytest.mark.parametrize('options', [{}, {'min_channels': 4}, {'min_share': 0.7}, {'round_to': 4}])
@pytest.mark.parametrize('net', NETS)
@pytest.mark.parametrize('unit', UNITS)
def test_what_is_out_of_reach_is_known_from_the_graph(net: str, unit: str, options: dict[str, Any]) -> None:
    '''It is refused with the same words without scores, and nothing that can be planned is refused.'''
    pruner = zp.Pruner(NETS[net](), None, images())
    for share in (0.02, 0.5, 0.9):
        budget = zp.Budget(**{unit: share})
        said = []
        for act in (lambda budget=budget: pruner.plan(scores(pruner.graph), budget, **options),
                    lambda budget=budget: check_reachable(pruner.graph, budget, **options)):
            try:
                act()
                said.append('')
            except zp.PruneError as error:
                said.append(str(error))
        assert said[0] == said[1]
        assert not said[0] or ('out of reach' in said[0] and f'min_share={options.get("min_share", 0.0)}' in said[0])


def test_a_budget_for_groups_without_scores_is_out_of_reach() -> None:
    pruner = zp.Pruner(chain(), None, images())
    check_reachable(pruner.graph, zp.Budget(params=0.3))
    for act in (lambda: check_reachable(pruner.graph, zp.Budget(params=0.3), names=['2']),
                lambda: pruner.plan(zp.Relevance({'2': torch.rand(5)}), zp.Budget(params=0.3))):
        with pytest.raises(zp.PruneError, match='out of reach'):
            act()


def test_the_cost_model_of_a_graph_is_made_once() -> None:
    first, second = (zp.trace(chain(), images()) for _ in range(2))
    assert cost_model(first) is cost_model(first) is not cost_model(second)
    graph = weakref.ref(first)
    del first
    gc.collect()
    assert graph() is None


def test_budget_that_holds_already_is_an_error() -> None:
    pruner = zp.Pruner(chain(), None, images())
    with pytest.raises(zp.PruneError, match='leaves the network as it is'):
        pruner.plan(scores(pruner.graph), zp.Budget(flops=10**9))


def test_groups_without_scores_are_kept() -> None:
    pruner = zp.Pruner(chain(), None, images())
    plan = pruner.plan(zp.Relevance({'2': torch.rand(5)}), zp.Budget(flops=0.6))
    assert list(plan.removed) == ['2']


@pytest.mark.parametrize(
    ('relevance', 'message'),
    [
        ({'2': torch.rand(4)}, "4 scores for group '2', which has 5 channels"),
        ({'nowhere': torch.rand(4)}, "'nowhere'"),
        ({'11': torch.rand(4)}, "'11' must stay"),
    ],
)
def test_scores_that_do_not_fit(relevance: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(zp.PruneError, match=message):
        zp.Pruner(chain(), None, images()).plan(zp.Relevance(relevance), zp.Budget(flops=0.6))


def test_budget_of_another_kind() -> None:
    pruner = zp.Pruner(chain(), None, images())
    with pytest.raises(zp.PruneError, match=r'0\.5'):
        pruner.plan(scores(pruner.graph), 0.5)


@pytest.mark.parametrize('criterion', ['relevance', 'random', 'l1', 'l2'])
def test_equal_inputs_give_equal_plans(criterion: str) -> None:
    plans = []
    for _ in range(2):
        pruner = zp.Pruner(seeded(Residual()), composite(), images())
        relevance = pruner.collect([(images(), labels())], criterion=criterion, progress=False)
        plans.append(dict(pruner.plan(relevance, zp.Budget(flops=0.5)).removed))
    assert plans[0] == plans[1]


def test_ties_are_broken_the_same_way() -> None:
    pruner = zp.Pruner(chain(), None, images())
    flat = zp.Relevance({group.name: torch.ones(group.size) for group in pruner.graph.groups})
    plans = {str(dict(pruner.plan(flat, zp.Budget(flops=0.5)).removed)) for _ in range(3)}
    assert len(plans) == 1


# --- editing


def test_edits_return_new_plans() -> None:
    graph = zp.trace(chain(), images())
    empty = zp.Plan(graph)
    one = empty.remove('0', [3, 1])
    more = one.remove('0', [1, 5]).remove('2', np.array([0]))
    less = more.keep('0', [3, 0])
    assert dict(empty.removed) == {}
    assert dict(one.removed) == {'0': (1, 3)}
    assert dict(more.removed) == {'0': (1, 3, 5), '2': (0,)}
    assert dict(less.removed) == {'0': (1, 5), '2': (0,)}
    assert dict(less.keep('0', [1, 5]).removed) == {'2': (0,)}
    assert more == zp.Plan(graph, {'2': [0], '0': (5, 3, 1)}) and hash(more) == hash(
        zp.Plan(graph, {'0': [5, 3, 1], '2': [0]})
    )
    assert more != less
    with pytest.raises(TypeError):
        more.removed['0'] = ()
    with pytest.raises(TypeError):
        more.removed['0'][0] = 2


def test_plans_do_not_share_their_callers_lists() -> None:
    positions = [1, 2]
    given = {'0': positions}
    plan = zp.Plan(zp.trace(chain(), images()), given)
    positions.append(3)
    given['2'] = [0]
    assert dict(plan.removed) == {'0': (1, 2)}


def test_members_name_their_group() -> None:
    graph = zp.trace(seeded(Residual()), images())
    for name in ('stem', 'bn', 'block1.conv2', 'block2.bn2'):
        assert dict(zp.Plan(graph).remove(name, [2]).removed) == {'stem': (2,)}


@pytest.mark.parametrize(
    ('positions', 'message'),
    [
        ([6], 'position 6 is out of range.*0 to 5'),
        ([-1], 'position -1 is out of range'),
        ([1, 1], 'position 1.*twice'),
        ([True], 'True is no position'),
        ([1.0], '1.0 is no position'),
        ([None], 'None'),
        (['1'], "'1'"),
        (3, '3'),
        ('12', "'12'"),
        (np.array([True, False]), 'True'),
        ([np.bool_(False)], 'False'),
        ([[0]], r'\[0\]'),
        (torch.tensor([True, False, True, False, False, False]), 'position'),
    ],
)
def test_positions_that_are_none(positions: Any, message: str) -> None:
    graph = zp.trace(chain(), images())
    for act in (
        lambda: zp.Plan(graph).remove('0', positions),
        lambda: zp.Plan(graph).keep('0', positions),
        lambda: zp.Plan(graph, {'0': positions}),
    ):
        with pytest.raises(zp.PruneError, match=message):
            act()


@pytest.mark.parametrize('positions', [None, torch.tensor([1.0])])
def test_positions_that_are_nothing(positions: Any) -> None:
    with pytest.raises(zp.PruneError):
        zp.Plan(zp.trace(chain(), images())).remove('0', positions)


@pytest.mark.parametrize(
    'positions', [np.array([1, 2]), torch.tensor([1, 2]), (1, 2), range(1, 3), {1, 2}, iter([1, 2])]
)
def test_positions_of_any_kind(positions: Any) -> None:
    plan = zp.Plan(zp.trace(chain(), images())).remove('0', positions)
    assert dict(plan.removed) == {'0': (1, 2)}
    assert all(type(position) is int for position in plan.removed['0'])


def test_emptied_dimension() -> None:
    graph = zp.trace(chain(), images())
    with pytest.raises(zp.PruneError, match=r"all 5 channels along dimension \d of '[25]\.weight'"):
        zp.Plan(graph).remove('2', range(5))
    with pytest.raises(zp.PruneError, match='keep at least one'):
        zp.Plan(graph).remove('2', range(4)).remove('2', [4])


def test_unknown_and_locked_names() -> None:
    graph = zp.trace(chain(), images())
    with pytest.raises(zp.PruneError, match=r"no group 'conv9'.*0, 2, 5, 9"):
        zp.Plan(graph).remove('conv9', [0])
    with pytest.raises(zp.PruneError, match=r"'11' must stay.*output"):
        zp.Plan(graph).remove('11', [0])
    with pytest.raises(zp.PruneError, match='twice'):
        zp.Plan(zp.trace(seeded(Residual()), images()), {'stem': [0], 'bn': [1]})


class Joined(nn.Module):
    '''Two convolutions, one BatchNorm over both.'''

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.out = (
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(3, 5, 1),
            nn.BatchNorm2d(9),
            nn.Conv2d(9, 2, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.relu(self.norm(torch.cat([self.a(x), self.b(x)], 1))))


def test_ambiguous_names_list_the_groups() -> None:
    graph = zp.trace(seeded(Joined()), images())
    assert [group.name for group in graph.groups] == ['a', 'b']
    with pytest.raises(zp.PruneError, match="'norm' holds channels of several groups: 'a', 'b'"):
        zp.Plan(graph).remove('norm', [0])


# --- composing


@pytest.mark.parametrize('net', NETS)
def test_composed_plans_equal_pruning_twice(net: str) -> None:
    model, x = NETS[net]().double(), images(dtype=torch.float64)
    graph = zp.trace(model, x)
    for seed in range(3):
        first = drawn(graph, seed, 0.25)
        small = first.apply(model)
        second = drawn(zp.trace(small, x), seed + 10, 0.3)
        twice, once = second.apply(small), first.compose(second).apply(model)
        expected = once.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in twice.state_dict().items())


def test_plans_of_another_network_do_not_compose() -> None:
    graph = zp.trace(chain(), images())
    plan = zp.Plan(graph).remove('0', [1])
    with pytest.raises(zp.PruneError, match=r"'0\.weight' has 5 indices along dimension 0 after this plan, but 6"):
        plan.compose(plan)
    with pytest.raises(zp.PruneError, match=r'no such dimension in the later one.*another network'):
        plan.compose(zp.Plan(zp.trace(seeded(Residual()), images())).remove('stem', [1]))


# --- files


def test_plans_survive_json(tmp_path: Path) -> None:
    graph = zp.trace(seeded(Mixed()), images())
    for plan in (zp.Plan(graph), drawn(graph, 0), drawn(graph, 1)):
        plan.save(tmp_path / 'plan.json')
        assert zp.Plan.load(tmp_path / 'plan.json', graph) == plan
        assert dict(zp.Plan.load(str(tmp_path / 'plan.json'), zp.trace(seeded(Mixed()), images())).removed) == dict(
            plan.removed
        )
        assert zp.Plan.from_dict(json.loads(json.dumps(plan.to_dict())), graph) == plan


def _edited(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: {**data, **changes}


@pytest.mark.parametrize(
    ('edit', 'message'),
    [
        (lambda data: [data], 'not a plan'),
        (lambda data: {}, 'not a plan'),
        (lambda data: 3, 'not a plan'),
        (_edited(format='other'), 'not a plan'),
        (_edited(version=2), 'version 2'),
        (_edited(version=None), 'version None'),
        (_edited(groups={'0': 7}), "another network.*'0' has 7 channels, here it has 6"),
        (_edited(groups={'other': 7}), "another network.*'other'"),
        (_edited(removed={'other': [1]}), "'other'"),
        (_edited(removed={'0': [6]}), 'out of range'),
        (_edited(removed={'0': [True]}), 'True'),
        (_edited(removed={'0': 3}), '3'),
        (_edited(removed={'0': [0, 1, 2, 3, 4, 5]}), 'keep at least one'),
    ],
)
def test_files_that_are_no_plans_for_the_network(edit: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    graph = zp.trace(chain(), images())
    (tmp_path / 'plan.json').write_text(json.dumps(edit(zp.Plan(graph).remove('0', [1]).to_dict())))
    with pytest.raises(zp.PruneError, match=message):
        zp.Plan.load(tmp_path / 'plan.json', graph)


@pytest.mark.parametrize('content', [b'', b'no json', b'\xff\xfe\x00', b'{"format": '])
def test_files_that_are_no_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / 'plan.json').write_bytes(content)
    with pytest.raises(zp.PruneError, match=r'plan\.json'):
        zp.Plan.load(tmp_path / 'plan.json', zp.trace(chain(), images()))


@pytest.mark.parametrize('changes', [{'removed': [1]}, {'groups': [1]}, {'removed': 'all'}])
def test_files_with_values_of_the_wrong_type(changes: dict[str, Any]) -> None:
    graph = zp.trace(chain(), images())
    with pytest.raises(zp.PruneError):
        zp.Plan.from_dict({**zp.Plan(graph).remove('0', [1]).to_dict(), **changes}, graph)


def test_plans_print_what_they_do() -> None:
    graph = zp.trace(chain(), images())
    plan = zp.Plan(graph).remove('0', [1, 2])
    costs = [zp.cost(model, images()).flops for model in (chain(), plan.apply(chain()))]
    assert f'flops: {costs[0]:,} -> {costs[1]:,}' in str(plan)
    assert '2 channels of 1 groups' in repr(plan)
    assert '-> ' in str(zp.Plan(graph))


# --- applying


def test_empty_plans_are_not_applied() -> None:
    model = chain()
    with pytest.raises(zp.PruneError, match='empty'):
        zp.Plan(zp.trace(model, images())).apply(model)


def test_plans_are_not_applied_to_other_networks() -> None:
    plan = zp.Plan(zp.trace(chain(), images())).remove('0', [1])
    wide = seeded(nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), *list(chain().children())[1:]))
    for act in (plan.apply, plan.masked, plan.apply_):
        with pytest.raises(
            zp.PruneError, match=r"not the network that was traced: '0\.weight' has shape \(9, 3, 3, 3\)"
        ):
            act(wide)
        with pytest.raises(zp.PruneError, match=r"'0\.weight' is missing"):
            act(seeded(Residual()))
        with pytest.raises(zp.PruneError, match='Trace it again'):
            act(plan.apply(chain()))


# --- masked networks


@pytest.mark.parametrize('net', NETS)
def test_masked_networks_compute_what_pruned_ones_do(net: str) -> None:
    model, x = NETS[net]().double(), images(dtype=torch.float64)
    before = snapshot(model)
    graph = zp.trace(model, x)
    for seed in range(4):
        plan = drawn(graph, seed)
        masked, small = plan.masked(model), plan.apply(model)
        outputs = [value if isinstance(value, tuple) else (value,) for value in (masked(x), small(x))]
        assert all(apart(a, b) <= 1e-10 for a, b in zip(*outputs))
        assert [tensor.shape for tensor in masked.state_dict().values()] == [
            tensor.shape for tensor in model.state_dict().values()
        ]
    assert same(before, snapshot(model))


def test_masked_networks_are_separate_networks_of_the_class() -> None:
    model = seeded(Residual())
    plan = zp.Plan(zp.trace(model, images())).remove('stem', [0, 3])
    masked = plan.masked(model)
    assert masked is not model and isinstance(masked, Residual) and type(masked).__name__ == 'Residual'
    assert not {id(tensor) for tensor in masked.state_dict(keep_vars=True).values()} & {
        id(tensor) for tensor in model.state_dict(keep_vars=True).values()
    }
    assert type(masked) is Residual and not hasattr(masked, '__enter__')
    for twin in (copy.deepcopy(masked), pickle.loads(pickle.dumps(masked))):
        assert type(twin) is Residual
        assert torch.equal(twin(images()), masked(images()))
        twin.load_state_dict(masked.state_dict())
        assert torch.equal(twin(images()), masked(images()))
    assert [m.training for m in plan.masked(model.train()).modules()] == [m.training for m in model.modules()]
    assert torch.equal(zp.Plan(plan.graph).masked(model.eval())(images()), model(images()))


@pytest.mark.parametrize('rules', ['epsilon_plus', 'epsilon_alpha2_beta1', 'epsilon'])
@pytest.mark.parametrize('net', ['chain', 'residual', 'mixed', 'functional'])
def test_masked_heatmaps_equal_pruned_ones(net: str, rules: str) -> None:
    model, x = NETS[net]().double(), images(dtype=torch.float64)
    graph = zp.trace(model, x)
    for seed in range(2):
        plan = drawn(graph, seed)
        found, expected = (
            zp.heatmap(network, None if rules == 'epsilon' else composite(rules), x, labels())
            for network in (plan.masked(model), plan.apply(model))
        )
        assert apart(found, expected) <= 1e-6


def test_masked_networks_prune_and_collect_like_others() -> None:
    model, x = seeded(Residual()), images()
    plan = zp.Plan(zp.trace(model, x)).remove('stem', [0, 3])
    relevance = zp.Pruner(plan.masked(model), composite(), x).collect([(x, labels())], progress=False)
    assert relevance['stem'][[0, 3]].abs().sum() == 0
    assert (relevance['stem'][[1, 2, 4, 5]] > 0).all()

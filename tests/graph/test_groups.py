'''Blocks that must stay equally large lose equally many channels, each its own.'''

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small import apart, drawn_of, images, seeded
from torch import nn
from torch.nn import functional as F
from zennit.composites import EpsilonPlus

import zennit_prune as zp
from zennit_prune.pipeline._checkpoint import filled
from zennit_prune.planning._carry import scores_for_original, values_for_plan
from zennit_prune.planning._cost import CostModel
from zennit_prune.planning._latency import LatencyModel


class Net(nn.Module):
    def __init__(self, run: Callable[[Any, torch.Tensor], torch.Tensor], **parts: nn.Module):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def bottleneck() -> Net:
    '''A block of ResNeXt: 12 channels into 3 groups of a convolution, 18 out of them.'''
    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.stem(x)
        inner = F.relu(net.norm(net.mix(F.relu(net.into(x)))))
        return net.fc(F.relu(net.out(inner) + x).mean((2, 3)))

    return seeded(Net(run, stem=nn.Conv2d(3, 8, 1), into=nn.Conv2d(8, 12, 1),
                      mix=nn.Conv2d(12, 18, 3, padding=1, groups=3),
                      norm=nn.BatchNorm2d(18), out=nn.Conv2d(18, 8, 1), fc=nn.Linear(8, 4))).double()


def halves(change: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor], **layers: nn.Module) -> Net:
    '''Eight channels that are cut in half.'''
    return seeded(Net(lambda net, x: net.fc(change(net, *net.conv(x).chunk(2, 1)).mean((2, 3))),
                      conv=nn.Conv2d(3, 8, 1), **layers)).double()


def side_by_side(net: Any, x: torch.Tensor) -> torch.Tensor:
    left, right = torch.cat([net.a(x), net.b(x)], 1).chunk(2, 1)
    return net.fc(torch.cat([right, left], 1).mean((2, 3)))


def x() -> torch.Tensor:
    return images(4, 6, dtype=torch.float64)


def test_each_group_of_a_convolution_loses_channels_of_its_own() -> None:
    model = bottleneck()
    graph = zp.trace(model, x())
    assert {group.name: (group.size, group.step) for group in graph.groups} == {
        'stem': (8, 1), 'into': (12, 3), 'mix': (18, 3)}
    assert graph.group('into').blocks.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    plan = zp.Plan(graph, {'into': [0, 5, 11], 'mix': [1, 3, 6, 11, 12, 13]})
    small = plan.apply(model, verify=False)
    columns = [[1, 2, 3], [0, 2, 3], [0, 1, 2]]
    rows = [[0, 2, 4, 5], [7, 8, 9, 10], [14, 15, 16, 17]]
    by_hand = torch.cat([model.mix.weight[row][:, column] for row, column in zip(rows, columns, strict=True)])
    assert torch.equal(small.mix.weight, by_hand)
    assert (small.mix.groups, small.mix.in_channels, small.mix.out_channels) == (3, 9, 12)
    silent = {'mix': [0, 5, 11], 'out': [1, 3, 6, 11, 12, 13]}  # what each layer reads
    handles = [getattr(model, name).register_forward_pre_hook(
        lambda module, args, at=at: args[0].index_fill(1, torch.tensor(at), 0)) for name, at in silent.items()]
    expected = model(x())
    for handle in handles:
        handle.remove()
    assert apart(small(x()), expected) <= 1e-12
    assert apart(plan.masked(model)(x()), expected) <= 1e-12
    assert apart(model(x()), expected) > 1e-3
    assert zp.cost(small, x()).params == sum(parameter.numel() for parameter in small.parameters())


def test_halves_lose_channels_of_their_own() -> None:
    model = halves(lambda net, a, b: torch.cat([F.relu(b), a], 1), fc=nn.Linear(8, 4))
    graph = zp.trace(model, x())
    assert (graph.group('conv').size, graph.group('conv').step) == (8, 2)
    small = zp.Plan(graph, {'conv': [0, 1, 4, 7]}).apply(model)
    assert torch.equal(small.conv.weight, model.conv.weight[[2, 3, 5, 6]])


def test_unbalanced_plans_are_refused_by_name() -> None:
    graph = zp.trace(bottleneck(), x())
    with pytest.raises(zp.PruneError, match=r"3 blocks of group 'into'.*equally many.*convolution in mix: "
                                            r'block 0 would lose 2, block 1 1.*Block 1 could also lose 4, 6, 7'):
        zp.Plan(graph).remove('into', [0, 1, 5, 8, 9])
    plan = zp.Plan(graph, {'into': [0, 5, 8]})
    with pytest.raises(zp.PruneError, match="blocks of group 'into'"):
        plan.keep('into', [5])
    with pytest.raises(zp.PruneError, match='removes all 12'):
        plan.remove('into', range(12))
    assert not plan.keep('into', [0, 5, 8]).removed
    assert 'in 3 blocks that must lose equally many, for convolution in mix' in graph.why('into')


@pytest.mark.parametrize(('make', 'groups'), [
    (lambda: halves(lambda net, a, b: a * torch.sigmoid(b), fc=nn.Linear(4, 4)), {'conv': (4, 1)}),
    # halves that go different ways
    (lambda: halves(lambda net, a, b: torch.cat([a, net.deep(b)], 1), fc=nn.Linear(8, 4),
                    deep=nn.Conv2d(4, 4, 3, padding=1, groups=4)), {'conv': (4, 1)}),
    (lambda: halves(lambda net, a, b: torch.cat([a, net.next(b)], 1), fc=nn.Linear(7, 4), next=nn.Conv2d(4, 3, 1)),
     {'conv': (4, 1), 'next': (3, 1)}),
    # the halves of two layers side by side: one has no part in the other's half
    (lambda: seeded(Net(side_by_side, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), fc=nn.Linear(8, 4))).double(),
     {'a': (4, 1)}),
    # a half that is cut again: blocks of four and of two
    (lambda: halves(lambda net, a, b: torch.cat([a, net.mix(b)], 1), fc=nn.Linear(8, 4),
                    mix=nn.Conv2d(4, 4, 1, groups=2)), {'conv': (4, 2), 'mix': (4, 2)}),
    # weights that no module knows as grouped
    (lambda: seeded(Net(lambda net, x: net.fc(F.conv2d(net.a(x), net.b.weight[:, :4], groups=2).mean((2, 3))),
                        a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 8, 1), fc=nn.Linear(8, 4))).double(), {}),
    (lambda: seeded(Net(lambda net, x: net.fc(F.conv2d(net.a(x), net.b.weight, groups=2).mean((2, 3))),
                        a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(4, 8, 1), fc=nn.Linear(8, 4))).double(),
     {'a': (4, 1), 'b': (8, 2)}),
], ids=['gate', 'one through a depthwise convolution', 'one read', 'two layers', 'blocks in a block', 'computed',
        'functional'])
def test_where_blocks_differ_equal_positions_go(make: Callable[[], Net], groups: dict[str, tuple[int, int]]) -> None:
    model = make()
    graph = zp.trace(model, x())
    assert {group.name: (group.size, group.step) for group in graph.groups} == groups
    for seed in range(3):
        rng = np.random.default_rng(seed)
        removed = {group.name: drawn_of(group, rng, group.size // 2) for group in graph.groups}
        if removed:
            zp.Plan(graph, removed).apply(model)


def test_the_least_of_each_block_go() -> None:
    pruner = zp.Pruner(bottleneck(), None, x())
    scores = {'into': torch.tensor([1.0, 2, 3, 4, 40, 30, 20, 10, 100, 300, 200, 400]).double()}
    plan = pruner.plan(zp.Relevance(scores), zp.Budget(params=0.8))
    counts = len(plan.removed['into']) // 3
    assert counts and plan.removed['into'] == tuple(sorted(
        position for block in ([0, 1, 2, 3], [7, 6, 5, 4], [8, 10, 9, 11]) for position in block[:counts]))
    kept = pruner.plan(zp.Relevance(scores), zp.Budget(channels=34), round_to=2)
    assert 12 - len(kept.removed['into']) == 6  # a multiple of two and of three


def test_values_and_scores_are_carried_block_by_block() -> None:
    model = bottleneck()
    graph = zp.trace(model, x())
    earlier = zp.Plan(graph, {'into': [0, 5, 11], 'mix': [1, 11, 12]})
    later = earlier.remove('into', [1, 4, 8])
    small = earlier.apply(model)
    smaller = filled(graph._narrowed(model, later.removed), values_for_plan(earlier, later, small))
    expected = later.apply(model).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in smaller.state_dict().items())
    narrow = zp.trace(small, x())
    scores = zp.Relevance({group.name: torch.arange(group.size).double() for group in narrow.groups})
    found = scores_for_original(earlier, narrow, scores)['into']
    kept = [position for position in range(12) if position not in (0, 5, 11)]
    assert found[kept].tolist() == list(range(9)) and (found[[0, 5, 11]] < -1e29).all()


def test_old_plan_files_say_why_they_do_not_fit() -> None:
    graph = zp.trace(bottleneck(), x())
    data = zp.Plan(graph).to_dict()
    data['groups']['into'], data['removed'] = 4, {'into': [1]}
    with pytest.raises(zp.PruneError, match=r'4 channels, here it has 12.*had to lose equal positions, make it again'):
        zp.Plan.from_dict(data, graph)


def upsampled(dim: int, outputs: int, groups: int, inputs: int = 12, **options: Any) -> Net:
    '''A transposed convolution of one, two or three dimensions between two plain ones.'''
    layer, up, norm = (getattr(nn, f'{kind}{dim}d') for kind in ('Conv', 'ConvTranspose', 'BatchNorm'))

    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        return net.fc(F.silu(net.next(F.silu(net.norm(net.up(F.silu(net.into(x))))))).flatten(2).mean(2))

    return seeded(Net(run, into=layer(3, inputs, 1), up=up(inputs, outputs, 3, 2, groups=groups, **options),
                      norm=norm(outputs), next=layer(outputs, 5, 1), fc=nn.Linear(5, 4))).double()


pytestmark = pytest.mark.filterwarnings('ignore:the references show')
TRANSPOSED: dict[str, tuple[int, int, dict[str, Any], dict[str, tuple[int, int]]]] = {
    # outputs, groups, options, expected groups of channels
    'grouped': (18, 3, {}, {'into': (12, 3), 'up': (18, 3), 'next': (5, 1)}),
    'grouped, without bias': (8, 2, {'bias': False, 'dilation': 2}, {'into': (12, 2), 'up': (8, 2), 'next': (5, 1)}),
    'depthwise': (12, 12, {'padding': 1, 'output_padding': 1}, {'into': (12, 1), 'next': (5, 1)}),
    'depthwise, several for each': (36, 12, {'bias': False}, {'into': (12, 1), 'next': (5, 1)}),
    'one for each group': (4, 4, {}, {'into': (12, 4), 'next': (5, 1)}),
}


@pytest.mark.parametrize('dim', [1, 2, 3])
@pytest.mark.parametrize('name', TRANSPOSED)
def test_groups_of_transposed_convolutions(name: str, dim: int) -> None:
    outputs, groups, options, expected = TRANSPOSED[name]
    model: Any = upsampled(dim, outputs, groups, **options)
    x = torch.randn(3, 3, *[4] * dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = zp.trace(model, x)
    assert {group.name: (group.size, group.step) for group in graph.groups} == expected
    rng = np.random.default_rng(dim)
    removed = {group.name: drawn_of(group, rng, group.size // 2) for group in graph.groups}
    plan = zp.Plan(graph, removed)
    small: Any = plan.apply(model, verify=False)
    read = {'up': [] if groups == 12 else removed['into'], 'fc': removed['next'],
            'next': [number * (outputs // 12) + part for number in removed['into'] for part in range(outputs // 12)]
            if groups == 12 else removed.get('up', [])}  # what each layer reads of removed channels, by hand
    handles = [getattr(model, layer).register_forward_pre_hook(
        lambda _, args, at=at: args[0].index_fill(1, torch.tensor(at, dtype=torch.long), 0))
        for layer, at in read.items()]
    silent = model(x)
    for handle in handles:
        handle.remove()
    assert apart(small(x), silent) <= 1e-12
    assert apart(plan.masked(model)(x), silent) <= 1e-12
    assert apart(model(x), silent) > 1e-3
    assert (small.up.in_channels, small.up.out_channels) == (
        12 - len(removed['into']), outputs - len(read['next']))
    costs, found = CostModel(graph), zp.cost(small, x)
    assert [costs(unit, costs.counts(removed)) for unit in ('params', 'flops', 'bytes')] == pytest.approx(
        [found.params, found.flops, found.bytes])
    if name == 'one for each group':
        assert 'one output channel a group' in graph.locked['up.bias']
        return
    again = zp.trace(small, x)
    later = zp.Plan(again, {group.name: group.order_by_block(rng.random(group.size))[:group.step]
                            for group in again.groups})
    both = plan.compose(later)
    assert apart(both.apply(model)(x), later.apply(small)(x)) <= 1e-12


@pytest.mark.parametrize('name', ['grouped', 'depthwise'])
def test_transposed_convolutions_are_scored_and_repaired(name: str) -> None:
    outputs, groups, options, expected = TRANSPOSED[name]
    model: Any = upsampled(2, outputs, groups, **options)
    data = torch.randn(64, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for composite in (None, EpsilonPlus()):
        pruner = zp.Pruner(model, composite, data[:4])
        loader = [(data, torch.arange(64) % 4)]
        relevance = pruner.collect(loader, progress=False)
        assert {found for found, _ in relevance.items()} == set(expected)
        assert all(values.abs().min() > 0 for _, values in relevance.items())
    result = pruner.prune(loader, zp.Budget(flops=0.6), progress=False)
    plain = result.plan.apply(model)
    assert torch.equal(result.model.up.weight, plain.up.weight)  # what reads it is refitted, it is not
    assert not torch.equal(result.model.next.weight, plain.next.weight)
    repaired, alone = ((small(data) - model(data)).pow(2).mean() for small in (result.model, plain))
    assert repaired < 0.5 * alone


def test_latency_of_transposed_convolutions() -> None:
    for outputs, groups, steps in ((18, 3, {4, 6}), (12, 12, {12})):
        model = upsampled(1, outputs, groups)
        costs = LatencyModel(zp.trace(model, torch.zeros(2, 3, 4, dtype=torch.float64)), model, None, 0.01, False)
        (call,) = (call for call in costs._calls if call.key.startswith('aten.convolution') and 'True' in call.key)
        assert set(call.sizes) == steps  # as many of every group
        for widths in itertools.product(*(range(1, size + 1) for size in call.sizes)):
            assert call.prepared(widths, torch.device('cpu'))().shape[1] in range(1, outputs + 1)

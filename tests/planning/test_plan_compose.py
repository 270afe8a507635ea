'''Pruning again and again: exact each time, and one plan for all rounds that counts the original's channels.'''

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from promises.test_properties import assert_exact, case, removable, traced
from small import apart, drawn_of, images, seeded
from torch import nn
from torch.nn import functional as F

import zennit_prune as zp

ROUNDS = 10


def x() -> torch.Tensor:
    return images(4, 6, dtype=torch.float64)


def trained(model: nn.Module, x: torch.Tensor, steps: int = 2) -> None:
    '''A few small steps of SGD, so that every value of the network is another.'''
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(steps):
            optimizer.zero_grad()
            model.train()(x).pow(2).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    model.eval()


def small_plan(graph: zp.graph.ChannelGraph, rng: np.random.Generator) -> zp.Plan:
    '''A channel, or one of each block, of about half of the groups.'''
    groups = [group for group in graph.groups if group.size > group.step]
    chosen = [group for group in groups if rng.random() < 0.5] or groups[:1]
    return zp.Plan(graph, {group.name: drawn_of(group, rng, group.step) for group in chosen})


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class Mixture(nn.Module):
    '''A residual stream with a grouped, a depthwise and a transposed convolution, and attention over its positions.'''

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.into, self.out = nn.Conv2d(16, 36, 1), nn.Conv2d(36, 16, 1)
        self.mix = nn.Conv2d(36, 36, 3, padding=1, groups=3)
        self.wide, self.deep = nn.Conv2d(16, 20, 1), nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.thin = nn.Conv2d(20, 16, 1)
        self.up = nn.ConvTranspose2d(16, 24, 3, padding=1, groups=2)
        self.query, self.key, self.value = nn.Linear(24, 15), nn.Linear(24, 15), nn.Linear(24, 14)
        self.fc = nn.Linear(14, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.silenced(x, {})

    def silenced(self, x: torch.Tensor, gone: dict[str, list[int]]) -> torch.Tensor:
        '''Where channels of these groups, named by hand, are silent to whatever reads them.'''
        def read(h: torch.Tensor, name: str, dim: int = 1) -> torch.Tensor:
            return h.index_fill(dim, torch.tensor(gone[name]), 0) if name in gone else h

        x = F.silu(self.norm(self.stem(x)))
        x = x + self.out(read(F.silu(self.mix(read(F.silu(self.into(read(x, 'stem'))), 'into'))), 'mix'))
        x = x + self.thin(read(F.silu(self.deep(F.silu(self.wide(read(x, 'stem'))))), 'wide'))
        h = read(F.silu(self.up(read(x, 'stem'))), 'up').flatten(2).mT
        scores = read(self.query(h), 'query', 2) @ read(self.key(h), 'query', 2).mT * 0.3
        return self.fc(read(scores.softmax(-1) @ self.value(h), 'value', 2)).mean(1)


def test_ten_rounds_of_a_network_with_everything() -> None:
    original: Any = seeded(Mixture()).double()
    rng = np.random.default_rng(0)
    model, graph = original, zp.trace(original, x())
    assert {group.name: (group.size, group.step) for group in graph.groups} == {
        'stem': (16, 2), 'into': (36, 3), 'mix': (36, 3), 'wide': (20, 1), 'up': (24, 2), 'query': (15, 1),
        'value': (14, 1)}
    total = zp.Plan(graph)
    kept = {group.name: np.arange(group.size) for group in graph.groups}  # by hand, in numbers of the original
    for number in range(ROUNDS):
        graph = zp.trace(model, x())
        plan = small_plan(graph, rng) if number < ROUNDS - 1 else zp.Plan(
            graph, {group.name: drawn_of(group, rng, group.step) for group in graph.groups})
        gone = {name: list(positions) for name, positions in plan.removed.items()}
        small: Any = plan.apply(model, verify=False)
        with torch.no_grad():
            assert apart(small(x()), model.silenced(x(), gone)) <= 1e-10
            assert apart(model(x()), model.silenced(x(), gone)) > 1e-6
        for name, positions in gone.items():
            kept[name] = np.delete(kept[name], positions)
        total = total.compose(plan)
        model = small
        trained(model, x())
    whole = total.apply(original)
    assert shapes(whole) == shapes(model)
    sizes = {'stem': 16, 'into': 36, 'mix': 36, 'wide': 20, 'up': 24, 'query': 15, 'value': 14}
    removed = {name: sorted(set(range(size)) - set(kept[name].tolist())) for name, size in sizes.items()}
    assert {name: list(positions) for name, positions in total.removed.items()} == removed
    with torch.no_grad():
        assert apart(whole(x()), original.silenced(x(), removed)) <= 1e-10


@pytest.mark.parametrize('seed', range(20))
def test_ten_rounds_of_generated_networks(seed: int) -> None:
    found = first = case(seed)
    rng = np.random.default_rng(seed)
    total: zp.Plan | None = zp.Plan(found.graph)
    untrained, small = found.model, found.model
    for _ in range(ROUNDS):
        if not removable(found.graph):
            break
        plan = small_plan(found.graph, rng)
        small = assert_exact(found, plan)
        if total is not None:
            try:
                total = total.compose(plan)
            except zp.PruneError as error:
                assert 'Apply one after the other' in str(error)
                total = None
            else:
                untrained = zp.Plan(zp.trace(untrained, found.x), plan.removed).apply(untrained, verify=False)
        try:
            trained(small, found.x)
        except RuntimeError as error:  # what it overwrites cannot be trained
            assert 'inplace' in str(error) or 'in-place' in str(error)
            small.eval()
        found = traced(small, found.channels, found.size)
    if total is not None and total.removed:
        whole, expected = total.apply(first.model, verify=False).state_dict(), untrained.state_dict()
        assert shapes(untrained) == shapes(small)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in whole.items())


def test_most_generated_networks_go_ten_rounds_in_one_plan() -> None:
    '''The others have convolutions that are left with one channel a group.'''
    joined = 0
    for seed in range(20):
        found = case(seed)
        rng, total = np.random.default_rng(seed), zp.Plan(found.graph)
        try:
            for _ in range(ROUNDS):
                if removable(found.graph):
                    plan = small_plan(found.graph, rng)
                    total = total.compose(plan)
                    found = traced(plan.apply(found.model), found.channels, found.size)  # type: ignore[arg-type]
            joined += 1
        except zp.PruneError:
            pass
    assert joined >= 15


class Staggered(nn.Module):
    '''Sums whose parts overlap, so that groups share producers and whole groups of one layer can go.'''

    def __init__(self) -> None:
        super().__init__()
        for name, width in (('a', 9), ('z', 3), ('b', 6), ('c', 3), ('e', 3)):
            self.add_module(name, nn.Conv2d(3, width, 1))
        self.fc = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        y = torch.cat([self.z(x), a], 1) + torch.cat([self.b(x), self.c(x), self.e(x)], 1)
        return self.fc(F.relu(y).mean((2, 3)))


def test_channels_are_told_by_where_they_sit_not_by_names() -> None:
    model: Any = seeded(Staggered()).double()
    graph = zp.trace(model, x())
    assert {group.name: group.size for group in graph.groups} == {'a#1': 3, 'a#2': 3, 'a#3': 3, 'z': 3}
    first = zp.Plan(graph, {'a#1': [0, 1, 2]})  # the whole group: the numbers of the others change
    small = first.apply(model)
    again = zp.trace(small, x())
    assert {group.name for group in again.groups} == {'a#1', 'a#2', 'z'}
    second = zp.Plan(again, {'a#2': [1]})
    both = first.compose(second)
    assert dict(both.removed) == {'a#1': (0, 1, 2), 'a#3': (1,)}
    twice, once = second.apply(small).state_dict(), both.apply(model).state_dict()
    assert all(torch.equal(tensor, once[name]) for name, tensor in twice.items())


def grouped(outputs: int = 6) -> Any:
    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        return net.fc(F.silu(net.mix(F.silu(net.into(x)))).mean((2, 3)))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.mix = nn.Conv2d(3, 6, 1), nn.Conv2d(6, outputs, 1, groups=3)
            self.fc = nn.Linear(outputs, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return run(self, x)

    return seeded(Net()).double()


@pytest.mark.parametrize(('outputs', 'removed', 'reason'), [
    (6, [0], "removes whole blocks of group 'into', whose 3 blocks must lose equally many channels in the original, "
             r'for convolution in mix.*Apply one after the other'),
    (3, [0], r"'mix.weight'.* must stay in the original \(one output channel a group \(convolution in mix\)\)"),
])
def test_what_a_convolution_with_one_channel_a_group_loses(outputs: int, removed: list[int], reason: str) -> None:
    model = grouped(outputs)
    first = zp.Plan(zp.trace(model, x()), {'into': [0, 3, 5]})
    small: Any = first.apply(model)
    graph = zp.trace(small, x())
    later = zp.Plan(graph, {graph.groups[0].name: removed})
    smaller: Any = later.apply(small)  # a depthwise convolution now
    assert smaller.mix.groups == 2
    with pytest.raises(zp.PruneError, match=reason):
        first.compose(later)


def test_parts_of_channels_of_the_original() -> None:
    '''A depthwise convolution with two outputs for each channel is a plain one when a single channel is left.'''
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.deep, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1, groups=4), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(F.silu(self.deep(F.silu(self.into(x)))).mean((2, 3)))

    model: Any = seeded(Net()).double()
    first = zp.Plan(zp.trace(model, x()), {'into': [0, 1, 3]})
    small = first.apply(model)
    later = zp.Plan(zp.trace(small, x()), {'deep': [0]})
    later.apply(small)
    with pytest.raises(zp.PruneError, match=r"parts of channels of the original, which also sit in 'deep\.weight'"):
        first.compose(later)

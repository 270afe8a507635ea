'''Pruning networks made up at random equals silencing the reads of the removed channels, whatever the networks hold.'''

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from oracles.generated import FIXED, Generated, Generator, Identities, identify
from small import drawn_of
from torch import nn

import zennit_prune as zp
from zennit_prune.surgery._surgery import narrowed_copy

SEEDS = range(150)
PLANS = 3
EXACT = 1e-10


class Case(NamedTuple):
    '''A network, its graph, and what the oracle knows of it.'''

    model: Generated
    graph: zp.graph.ChannelGraph
    identities: Identities
    x: torch.Tensor
    channels: int
    size: int


@contextmanager
def within(seconds: float) -> Iterator[None]:
    '''A trace that does not end fails instead of stopping all tests.'''

    def stop(*_: Any) -> None:
        raise TimeoutError(f'not done after {seconds} s')

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def traced(model: Generated, channels: int, size: int) -> Case:
    x = torch.randn(2, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    with within(seconds=3):
        graph = zp.trace(model, x)
    return Case(model, graph, identify(model, channels, size), x, channels, size)


@cache
def case(seed: int) -> Case:
    generator = Generator(seed)
    return traced(generator.network(), generator.channels, generator.size)


def removable(graph: zp.graph.ChannelGraph) -> bool:
    return any(group.size > group.step for group in graph.groups)


def random_plan(graph: zp.graph.ChannelGraph, rng: np.random.Generator) -> zp.Plan:
    '''From one channel to all but one of some groups, or of each of their blocks.'''
    groups = [group for group in graph.groups if group.size > group.step]
    chosen = [group for group in groups if rng.random() < 0.7] or groups[:1]
    removed = {}
    for group in chosen:
        blocks = group.size // group.step
        count = blocks - 1 if rng.random() < 0.3 else int(rng.integers(1, blocks))
        removed[group.name] = drawn_of(group, rng, count * group.step)
    return zp.Plan(graph, removed)


def removed_identities(case: Case, plan: zp.Plan) -> set[int]:
    '''The identities of the output channels that a plan removes from the layers that bring them forth.'''
    return _produced(case.identities, plan.graph, plan.removed)


def _produced(identities: Identities, graph: zp.graph.ChannelGraph, positions: Mapping[str, Sequence[int]]) -> set[int]:
    '''What the producers of groups bring forth at these positions.'''
    found: set[int] = set()
    for group in graph.groups:
        for member in group.members:
            if member.role == 'producer' and group.name in positions:
                produced = identities.produced[member.layer.removeprefix('layers.')]
                found |= {produced[position] for position in member.index[list(positions[group.name])].reshape(-1)}
    return found


def oracle(case: Case, removed: set[int]) -> torch.Tensor:
    with torch.no_grad():
        return case.model.silenced(case.x, case.identities.masks(removed, case.model))


def error(output: torch.Tensor, expected: torch.Tensor) -> float:
    '''The largest difference over the largest expected value.'''
    assert output.shape == expected.shape
    return float((output - expected).abs().max()) / (float(expected.abs().max()) or 1.0)


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x.clone())


def assert_exact(case: Case, plan: zp.Plan) -> Generated:
    '''Apply a plan and hold the result against the oracle.'''
    state = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    small = plan.apply(case.model, verify=False)
    silent = run(plan.masked(case.model), case.x)
    removed = removed_identities(case, plan)
    classes = case.identities.classes()
    for identity in removed:
        together = classes[case.identities.find(identity)]
        assert FIXED not in together, f'a channel that must stay was removed: {plan.removed}'
        assert together <= removed, f'a channel was removed without those it is added to: {plan.removed}'
    expected = oracle(case, removed)
    assert error(run(small, case.x), expected) <= EXACT
    assert error(silent, expected) <= EXACT
    assert type(small) is Generated
    assert not small.training
    assert state.keys() == case.model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in case.model.state_dict().items())
    return small


@pytest.mark.parametrize('seed', SEEDS)
def test_pruned_network_equals_the_oracle(seed: int) -> None:
    found = case(seed)
    rng = np.random.default_rng(seed)
    for _ in range(PLANS if removable(found.graph) else 0):
        assert_exact(found, random_plan(found.graph, rng))


@pytest.mark.parametrize('seed', SEEDS)
def test_pruning_again_equals_the_oracle(seed: int) -> None:
    found = case(seed)
    rng = np.random.default_rng(seed)
    for _ in range(2):
        if not removable(found.graph):
            return
        small = assert_exact(found, random_plan(found.graph, rng))
        found = traced(small, found.channels, found.size)


# do these tests have teeth?
def test_nearly_every_network_has_something_to_prune() -> None:
    assert np.mean([removable(case(seed).graph) for seed in SEEDS]) > 0.9


def test_blocks_are_among_them_and_unbalanced_plans_are_refused() -> None:
    found = [(case(seed).graph, group) for seed in SEEDS for group in case(seed).graph.groups if group.step > 1]
    assert len(found) > 30
    for graph, group in found:
        with pytest.raises(zp.PruneError, match='must lose equally many'):
            zp.Plan(graph, {group.name: [0]})
        assert len({tuple(group.blocks.tolist().count(block) for block in set(group.blocks.tolist()))}) == 1


def test_most_channels_that_could_go_can_be_removed() -> None:
    free = found = 0
    for seed in SEEDS:
        graph, identities = case(seed).graph, case(seed).identities
        everything = {group.name: range(group.size) for group in graph.groups}
        free += len(identities.free())
        found += len(identities.free() & _produced(identities, graph, everything))
    assert found > 0.85 * free


def test_removed_channels_matter() -> None:
    '''An oracle whose masks changed nothing would accept anything.'''
    changes = []
    for seed in SEEDS:
        found = case(seed)
        if removable(found.graph):
            plan = random_plan(found.graph, np.random.default_rng(seed))
            changes.append(error(oracle(found, removed_identities(found, plan)), run(found.model, found.x)))
    assert np.mean(np.array(changes) > 1e-6) > 0.95


@pytest.mark.parametrize('corruption', ['moved', 'another'])
def test_corrupted_network_is_caught(corruption: str) -> None:
    '''The kept channels change places in one weight, or one weight keeps a channel that was to go.'''
    caught = []
    for seed in SEEDS:
        found = case(seed)
        if not removable(found.graph):
            continue
        rng = np.random.default_rng(seed)
        plan = random_plan(found.graph, rng)
        kept = found.graph._kept(plan.removed)
        reads = [(name, dims[1]) for name, dims in kept.items() if len(dims.get(1, ())) > 1]
        removed = removed_identities(found, plan)
        if not reads:
            continue
        name, index = reads[rng.integers(len(reads))]
        if not _matters(found, removed, name, index[0]):  # the channel may be dead, behind a ReLU
            continue
        wrong = np.roll(index, 1)
        if corruption == 'another':
            wrong = index.copy()
            for block in wrong.reshape(len(wrong), -1).T:
                block[0] = np.setdiff1d(np.arange(found.model.get_parameter(name).shape[1]), block)[0]
        small = narrowed_copy(found.model, {**kept, name: {**kept[name], 1: wrong}}, found.graph._group_sizes,
                              found.graph._attributes(plan.removed))
        caught.append(error(run(small, found.x), oracle(found, removed)) > EXACT)
    assert len(caught) > 50
    assert np.mean(caught) > 0.97  # two concatenated channels can be equal, so that it does not matter which is which


def _matters(case: Case, removed: set[int], name: str, column: int) -> bool:
    '''Whether the output depends on what a weight reads of one channel.'''
    without = copy.deepcopy(case.model)
    with torch.no_grad():
        without.get_parameter(name)[:, column] = 0
    return error(oracle(case._replace(model=without), removed), oracle(case, removed)) > EXACT

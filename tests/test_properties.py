'''Pruning networks made up at random equals silencing the reads of the removed channels, whatever the networks hold.'''
from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import zennit_prune as zp
from generated import FIXED, Generated, Generator, Identities, identify
from zennit_prune.surgery import narrowed_copy

SEEDS = range(150)
PLANS = 3
EXACT = 1e-10


class Case(NamedTuple):
    '''A network, its graph, and what the oracle knows of it.'''
    model: Generated
    graph: zp.ChannelGraph
    identities: Identities
    x: torch.Tensor
    channels: int
    size: int


def traced(model: Generated, channels: int, size: int) -> Case:
    x = torch.randn(2, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    return Case(model, zp.trace(model, x), identify(model, channels, size), x, channels, size)


@lru_cache(maxsize=None)
def case(seed: int) -> Case:
    generator = Generator(seed)
    return traced(generator.network(), generator.channels, generator.size)


def random_plan(graph: zp.ChannelGraph, rng: np.random.Generator) -> zp.Plan:
    '''From some channel to all but one of some groups, at least one.'''
    groups = [group for group in graph.groups if group.size > 1]
    chosen = [group for group in groups if rng.random() < 0.7] or groups[:1]
    removed = {}
    for group in chosen:
        count = group.size - 1 if rng.random() < 0.3 else int(rng.integers(1, group.size))
        removed[group.name] = rng.permutation(group.size)[:count].tolist()
    return zp.Plan(graph, removed)


def removed_identities(case: Case, plan: zp.Plan) -> set[int]:
    '''The identities of the output channels that a plan removes from the layers that bring them forth.'''
    layers = {f'layers.{name}': produced for name, produced in case.identities.produced.items()}
    removed: set[int] = set()
    for group in plan.graph.groups:
        for member in group.members:
            if member.role == 'producer' and group.name in plan.removed:
                at = member.index[list(plan.removed[group.name])].reshape(-1).tolist()
                removed |= {layers[member.layer][position] for position in at}
    return removed


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
    with plan.masked(case.model) as masked:
        silent = run(masked, case.x)
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
    for _ in range(PLANS if found.graph.groups else 0):
        assert_exact(found, random_plan(found.graph, rng))


@pytest.mark.parametrize('seed', SEEDS)
def test_pruning_again_equals_the_oracle(seed: int) -> None:
    found = case(seed)
    rng = np.random.default_rng(seed)
    for _ in range(2):
        if not any(group.size > 1 for group in found.graph.groups):
            return
        small = assert_exact(found, random_plan(found.graph, rng))
        found = traced(small, found.channels, found.size)

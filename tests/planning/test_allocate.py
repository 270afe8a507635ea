'''Budgets are reached from below, as closely as channels allow, whatever the limits.'''
from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planning.test_plan import NETS, UNITS
from torch import nn

import zennit_prune as zp
from zennit_prune.planning._cost import CostModel

OPTIONS = st.fixed_dictionaries({
    'min_channels': st.integers(1, 4),
    'min_share': st.sampled_from([0.0, 0.1, 0.34, 0.5]),
    'round_to': st.sampled_from([None, 1, 2, 3, 4]),
    'per_cost': st.booleans(),
})
BLOCKS = {('mixed', 'point'): 2, ('mixed', 'right'): 2}  # the inputs and outputs of a grouped convolution


def fat() -> nn.Module:
    '''Few large groups, so that many steps lie between the first that is removed and the last.'''
    return nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 4))


@cache
def traced(net: str) -> tuple[zp.Pruner, CostModel]:
    pruner = zp.Pruner(fat(), None, torch.ones(2, 64)) if net == 'fat' else \
        zp.Pruner(NETS[net](), None, torch.ones(2, 3, 8, 8))
    return pruner, CostModel(pruner.graph)


def skewed(pruner: zp.Pruner, seed: int) -> zp.Relevance:
    '''Scores over orders of magnitude, with whole groups far below others.'''
    random = np.random.default_rng(seed)
    return zp.Relevance({group.name: torch.from_numpy(10 ** random.normal(random.normal(0, 2), 1, group.size))
                         for group in pruner.graph.groups})


def ladder(group: zp.graph.ChannelGroup, blocks: int, options: dict[str, Any]) -> list[int]:
    '''How many channels may be left of a group, descending; equally many of each block.'''
    least = max(options['min_channels'], math.ceil(options['min_share'] * group.size - 1e-9))
    step = options['round_to'] or 1
    return [group.size, *(left for left in range(group.size - 1, 0, -1)
                          if left >= least and left % step == 0 and left % blocks == 0)]


def lowest(scores: torch.Tensor, blocks: int, count: int) -> list[int]:
    '''The positions of the lowest scores, equally many of each of as many contiguous blocks.'''
    rows = scores.view(blocks, -1)
    at = rows.argsort(1)[:, :count // blocks] + torch.arange(0, len(scores), rows.shape[1]).view(-1, 1)
    return at.flatten().sort().values.tolist()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(net=st.sampled_from([*NETS, 'fat']), unit=st.sampled_from(UNITS), share=st.floats(0.1, 0.97),
       seed=st.integers(0, 10**6), absolute=st.booleans(), options=OPTIONS)
def test_budgets_are_reached_from_below(net: str, unit: str, share: float, seed: int, absolute: bool,
                                        options: dict[str, Any]) -> None:
    pruner, costs = traced(net)
    groups, scores = pruner.graph.groups, skewed(pruner, seed)
    sizes = np.array([group.size for group in groups])
    whole = costs(unit, 0 * sizes)
    budget = zp.Budget(**{unit: max(int(share * whole), 2) if absolute else share})
    blocks = [BLOCKS.get((net, group.name), 1) for group in groups]
    ladders = [ladder(group, count, options) for group, count in zip(groups, blocks)]
    try:
        plan = pruner.plan(scores, budget, **options)
    except zp.PruneError as error:
        assert_nearest(error, pruner, scores, unit, options)
        least = costs(unit, sizes - [rungs[-1] for rungs in ladders])
        assert least > budget.limit(whole)
        return
    removed = np.array([len(plan.removed.get(group.name, ())) for group in groups])
    left = costs(unit, removed)
    assert left <= budget.limit(whole) * (1 + 1e-9)
    single = np.array([whole - costs(unit, row * math.lcm(options['round_to'] or 1, count))
                       for row, count in zip(np.eye(len(groups)), blocks)])
    fine = single <= budget.limit(whole) - left
    if fine.any():  # all of them together cannot take the place of a step of any other
        assert whole - costs(unit, fine * (sizes - [rungs[-1] for rungs in ladders])) <= single[~fine].min()
    for number, (group, rungs) in enumerate(zip(groups, ladders)):
        at = rungs.index(group.size - removed[number])  # else a limit was not kept
        if at:  # one channel, or one step, of any group that loses some would not fit any more
            more = removed.copy()
            more[number] = group.size - rungs[at - 1]
            assert costs(unit, more) > budget.limit(whole)
        assert list(plan.removed.get(group.name, ())) == lowest(scores[group.name], blocks[number], removed[number])


def assert_nearest(error: zp.PruneError, pruner: zp.Pruner, scores: zp.Relevance, unit: str,
                   options: dict[str, Any]) -> None:
    '''Both figures that the error names can be asked for, and less than the absolute one can not.'''
    found = re.search(r'nearest is ([\d.]+) of the original \(([\d,]+) of ([\d,]+) (\w+)\)', str(error))
    assert found and found[4] == unit
    share, amount, whole = float(found[1]), *(int(found[place].replace(',', '')) for place in (2, 3))
    if amount < whole:
        pruner.plan(scores, zp.Budget(**{unit: amount}), **options)
        if share < 1:
            pruner.plan(scores, zp.Budget(**{unit: share}), **options)
    with pytest.raises(zp.PruneError, match='out of reach'):
        pruner.plan(scores, zp.Budget(**{unit: amount - 1}), **options)


@pytest.mark.parametrize('unit', UNITS)
@pytest.mark.parametrize(('factor', 'inner_first'), [(1.2, True), (0.8, False)])
def test_savings_are_divided_among_the_layers_that_produce_a_channel(unit: str, factor: float,
                                                                           inner_first: bool) -> None:
    '''The score of a stream is a mean over the layers that add to it, and so is what its channels save.'''
    pruner, costs = traced('residual')
    names = ['stem', 'block1.conv1']
    producers = [len(pruner.graph.group(name).layers('producer')) for name in names]
    assert producers[0] >= 2 and producers[1] == 1
    whole, (stream, inner) = costs(unit, 0 * costs.sizes), (costs(unit, costs.counts({name: [0]})) for name in names)
    scores = {'stem': factor * (whole - stream) / producers[0], 'block1.conv1': whole - inner}
    relevance = zp.Relevance({name: torch.full((pruner.graph.group(name).size,), score, dtype=torch.float64)
                              for name, score in scores.items()})
    plan = pruner.plan(relevance, zp.Budget(**{unit: stream / whole}))  # what one channel of the stream saves
    assert ('block1.conv1' in plan.removed) == inner_first


def test_what_was_removed_first_is_put_back_too() -> None:
    '''The cheap group goes first, whole; the last channel of the dear one leaves room for some of it.'''
    pruner, costs = traced('fat')
    scores = zp.Relevance({'0': torch.arange(1, 41).double(), '2': torch.arange(1, 61) / 1e6})
    for share in np.linspace(0.1, 0.5, 25).tolist():
        plan = pruner.plan(scores, zp.Budget(params=share), min_share=0.05, per_cost=False)
        removed = np.array([len(plan.removed.get(group.name, ())) for group in pruner.graph.groups])
        whole = costs('params', 0 * removed)
        assert removed[0]
        for row in np.eye(2)[removed > 0]:
            assert costs('params', removed - row) > share * whole

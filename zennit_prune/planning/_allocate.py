'''Spend a budget: which channels go, given a score for each and what each costs.'''
from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ..errors import PruneError
from ..graph._graph import ChannelGraph
from ..tracing._labels import Positions
from ._cost import Budget, CostModel, written

Scores = Mapping[str, npt.NDArray[np.float64]]


def allocate(graph: ChannelGraph, costs: CostModel, scores: Scores, budget: Budget, min_channels: int = 1,
             floor: float = 0.0, round_to: int | None = None, per_cost: bool = True) -> dict[str, list[int]]:
    '''Remove the channels of lowest score, or of lowest score per cost saved, until the budget holds.

    The cost left is within the budget, and no channel that is removed (with ``round_to``, no such step) fits in any
    more. It is closer to the budget than one channel of the group that saves least by it, where there are enough
    such channels.

    Parameters
    ----------
    graph: ChannelGraph
        The channels.
    costs: CostModel
        What they cost.
    scores: mapping of str to numpy.ndarray
        A score for each channel of each group; higher is kept. Groups without scores are kept whole.
    budget: Budget
        How much is to be left.
    min_channels: int
        At least so many channels of each group are kept.
    floor: float
        At least this share of each group is kept.
    round_to: int, optional
        Groups that lose channels keep a multiple of this many.
    per_cost: bool
        Divide scores by what the channel saves, in the budget's unit, for each layer that brings it forth.

    Returns
    -------
    dict of str to list of int
        The positions to remove, by group.

    Raises
    ------
    PruneError
        If the budget is out of reach, with the nearest that is; if it asks for no removal; for arguments out of range.
    '''
    _check(min_channels, floor, round_to)
    layers = np.array([max(len(group.layers('producer')), 1) for group in graph.groups])
    savings = costs.savings(budget.unit)
    divisors = savings / layers  # a score is a mean over a stream's layers, and so is its divisor
    priorities: list[float] = []
    owners: list[int] = []
    steps: list[int] = []
    orders: dict[int, Positions] = {}
    for number, group in enumerate(graph.groups):
        if group.name not in scores or savings[number] <= 0:
            continue
        score = np.asarray(scores[group.name], float)
        orders[number] = group.in_turn(score)
        ascending = score[orders[number]] / (divisors[number] if per_cost else 1.0)
        least = max(min_channels, math.ceil(floor * group.size - 1e-9))
        sizes = np.array(_steps(group.size, least, round_to, group.step), int)
        starts = np.cumsum(sizes) - sizes
        means = np.add.reduceat(ascending[:sizes.sum()], starts) / sizes if len(sizes) else np.zeros(0)
        priorities += np.maximum.accumulate(means).tolist()
        owners += [number] * len(sizes)
        steps += sizes.tolist()
    order = np.argsort(np.array(priorities), kind='stable')
    owner, step = np.array(owners, int)[order], np.array(steps, float)[order]

    def removed(count: int) -> npt.NDArray[np.float64]:
        return np.bincount(owner[:count], weights=step[:count], minlength=len(graph.groups)).astype(float)

    whole = costs(budget.unit, removed(0))
    limit = budget.limit(whole) * (1 + 1e-12)
    if whole <= limit:
        raise PruneError(f'{budget!r} leaves the network as it is: it has {written(budget.unit, whole)}. Ask for less.')
    least_cost = costs(budget.unit, removed(len(owner)))
    if least_cost > limit:
        share, amount = math.ceil(least_cost / whole * 1e4) / 1e4, written(budget.unit, least_cost).split()[0]
        raise PruneError(f'{budget!r} is out of reach: with min_channels={min_channels}, floor={floor} and '
                         f'round_to={round_to} the nearest is {share:.4f} of the original ({amount} of '
                         f'{written(budget.unit, whole)}). Allow more, lower these limits, or see graph.locked for '
                         'what must stay.')
    low, high = 0, len(owner)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if costs(budget.unit, removed(middle)) <= limit else (middle, high)
    counts = _put_back(costs, budget.unit, limit, removed(high), owner[:high], step[:high])
    finest = min(savings[number] * math.lcm(round_to or 1, graph.groups[number].step) for number in orders)
    if limit - costs(budget.unit, counts) >= finest:
        closer, taken = _closer(costs, budget.unit, limit, removed(low), owner, step, low)
        counts = _put_back(costs, budget.unit, limit, closer, owner[taken], step[taken])
    return {graph.groups[number].name: sorted(orders[number][:int(counts[number])].tolist())
            for number in np.flatnonzero(counts).tolist()}


def _put_back(costs: CostModel, unit: str, limit: float, counts: npt.NDArray[np.float64], owner: npt.NDArray[np.int64],
              step: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    '''The last step may have saved more than was needed: put back what still fits, the most valuable first.

    What does not fit now will not fit later, for every step that is put back only adds to the cost.
    '''
    full: set[int] = set()
    for number, taken in zip(owner[::-1].tolist(), step[::-1].tolist()):
        if number not in full:
            counts[number] -= taken
            if costs(unit, counts) > limit:
                counts[number] += taken
                full.add(number)
    return counts


def _closer(costs: CostModel, unit: str, limit: float, counts: npt.NDArray[np.float64], owner: npt.NDArray[np.int64],
            step: npt.NDArray[np.float64], first: int) -> tuple[npt.NDArray[np.float64], list[int]]:
    '''From the first step on that is not taken, take those that save no more than is needed, in order; and then the one
    that saves the least of the others.

    Returns what is removed of each group, and which steps were taken.
    '''
    taken = list(range(first))
    too_much: dict[int, int] = {}  # by group, the first step that was not taken
    for place in range(first, len(owner)):
        number = int(owner[place])
        if number not in too_much:
            counts[number] += step[place]
            if costs(unit, counts) > limit:
                taken.append(place)
            else:
                counts[number] -= step[place]
                too_much[number] = place

    def left(number: int) -> float:
        return costs(unit, counts + step[too_much[number]] * (np.arange(len(counts)) == number))

    last = max((number for number in too_much if left(number) <= limit), key=left)
    counts[last] += step[too_much[last]]
    return counts, [*taken, too_much[last]]


def _steps(size: int, least: int, round_to: int | None, together: int = 1) -> list[int]:
    '''How a group shrinks: ``together`` channels at a time, one of each block, or also to multiples of ``round_to``.'''
    round_to = math.lcm(round_to or 1, together)
    least, below = max(least, round_to), (size - 1) // round_to * round_to
    return [size - below, *[round_to] * ((below - least) // round_to)] if below >= least else []


def _check(min_channels: int, floor: float, round_to: int | None) -> None:
    if not isinstance(min_channels, int) or isinstance(min_channels, bool) or min_channels < 1:
        raise PruneError(f'min_channels={min_channels!r}: a dimension is never emptied; give a whole number from 1 on.')
    if not isinstance(floor, (int, float)) or not 0 <= floor <= 1:
        raise PruneError(f'floor={floor!r}: the share of each group that is kept is a number from 0 to 1.')
    if round_to is not None and (type(round_to) is not int or round_to < 1):
        raise PruneError(f'round_to={round_to!r}: give None or a whole number from 1 on.')

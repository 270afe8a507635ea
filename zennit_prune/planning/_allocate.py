'''Spend a budget: choose the channels to remove from a score for each and the cost of each.'''
from __future__ import annotations

import math
from collections.abc import Container, Mapping

import numpy as np
import numpy.typing as npt

from ..errors import PruneError
from ..graph._graph import ChannelGraph
from ..graph._groups import ChannelGroup
from ..tracing._labels import Positions
from ._cost import Budget, CostModel, as_share, cost_model, written

Scores = Mapping[str, npt.NDArray[np.float64]]


def allocate(graph: ChannelGraph, costs: CostModel, scores: Scores, budget: Budget, min_channels: int | None = None,
             min_share: float = 0.0, round_to: int | None = None, per_cost: bool = True) -> dict[str, list[int]]:
    '''Remove the channels of lowest score, or of lowest score per cost saved, until the budget holds.

    The remaining cost is within the budget, and no removed channel (with ``round_to``, no removed block of channels)
    could be put back. Where the group with the smallest saving per channel has enough channels, the remaining cost is
    closer to the budget than one of these.

    Parameters
    ----------
    graph: ChannelGraph
        The traced network.
    costs: CostModel
        The cost of its pruned versions.
    scores: mapping of str to numpy.ndarray
        A score for each channel of each group; higher is kept. Groups without scores are kept whole.
    budget: Budget
        The amount to be left.
    min_channels: int, optional
        The least number of channels of each group that are kept; 1 by default.
    min_share: float
        The least share of each group that is kept, from 0 to 1.
    round_to: int, optional
        Groups that lose channels keep a multiple of this number.
    per_cost: bool
        Divide the score of a channel by what its removal saves, in the budget's unit, per layer that produces it.

    Returns
    -------
    dict of str to list of int
        The positions to remove, by group.

    Raises
    ------
    PruneError
        If the budget is out of reach, with the nearest one that is not; if it asks for no removal; for arguments out of
        range.
    '''
    check_reachable(graph, budget, min_channels, min_share, round_to, costs, scores)
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
        orders[number] = group.order_by_block(score)
        ascending = score[orders[number]] / (divisors[number] if per_cost else 1.0)
        sizes = np.array(_steps(group, min_channels, min_share, round_to), int)
        starts = np.cumsum(sizes) - sizes
        means = np.add.reduceat(ascending[:sizes.sum()], starts) / sizes if len(sizes) else np.zeros(0)
        priorities += np.maximum.accumulate(means).tolist()
        owners += [number] * len(sizes)
        steps += sizes.tolist()
    order = np.argsort(np.array(priorities), kind='stable')
    owner, step = np.array(owners, int)[order], np.array(steps, float)[order]

    def removed(count: int) -> npt.NDArray[np.float64]:
        return np.bincount(owner[:count], weights=step[:count], minlength=len(graph.groups)).astype(float)

    limit = _limit(costs, budget)
    low, high = 0, len(owner)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if costs(budget.unit, removed(middle)) <= limit else (middle, high)
    counts = _put_back(costs, budget.unit, limit, removed(high), owner[:high], step[:high])
    finest = min(savings[number] * math.lcm(round_to or 1, graph.groups[number].step) for number in orders)
    if limit - costs(budget.unit, counts) >= finest:
        closer, added = _closer(costs, budget.unit, limit, removed(low), owner, step, low)
        counts = _put_back(costs, budget.unit, limit, closer, owner[added], step[added])
    return {graph.groups[number].name: sorted(orders[number][:int(counts[number])].tolist())
            for number in np.flatnonzero(counts).tolist()}


def _put_back(costs: CostModel, unit: str, limit: float, counts: npt.NDArray[np.float64], owner: npt.NDArray[np.int64],
              step: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    '''Undo removals, the most valuable first, as long as the cost stays within the limit; return what is removed.

    The last step may have saved more than was needed. A step that does not fit is not tried again: every undone
    removal only adds to the cost.
    '''
    full: set[int] = set()
    for number, lost in zip(owner[::-1].tolist(), step[::-1].tolist()):
        if number not in full:
            counts[number] -= lost
            if costs(unit, counts) > limit:
                counts[number] += lost
                full.add(number)
    return counts


def _closer(costs: CostModel, unit: str, limit: float, counts: npt.NDArray[np.float64], owner: npt.NDArray[np.int64],
            step: npt.NDArray[np.float64], first: int) -> tuple[npt.NDArray[np.float64], list[int]]:
    '''Approach the limit from above with the steps after ``first``, then cross it with the step that saves the least.

    Further steps are added in order as long as they leave the cost above the limit.

    Returns
    -------
    (numpy.ndarray, list of int)
        How many channels each group loses, and the numbers of all steps that were added.
    '''
    added = list(range(first))
    too_much: dict[int, int] = {}  # for each group, the first step that saves too much
    for place in range(first, len(owner)):
        number = int(owner[place])
        if number not in too_much:
            counts[number] += step[place]
            if costs(unit, counts) > limit:
                added.append(place)
            else:
                counts[number] -= step[place]
                too_much[number] = place

    def left(number: int) -> float:
        return costs(unit, counts + step[too_much[number]] * (np.arange(len(counts)) == number))

    last = max((number for number in too_much if left(number) <= limit), key=left)
    counts[last] += step[too_much[last]]
    return counts, [*added, too_much[last]]


def check_reachable(graph: ChannelGraph, budget: Budget, min_channels: int | None = None, min_share: float = 0.0,
                    round_to: int | None = None, costs: CostModel | None = None,
                    names: Container[str] | None = None) -> None:
    '''Refuse a budget that no plan can hold, or that the network holds as it is; no scores and no data are needed.

    Parameters
    ----------
    graph: ChannelGraph
        The traced network.
    budget: Budget
        The amount to be left. A latency budget is checked only where ``costs`` knows latencies.
    min_channels, min_share, round_to:
        The limits for each group; see :func:`allocate`.
    costs: CostModel, optional
        The cost of pruned versions; the graph's own unless given.
    names: container of str, optional
        The groups that may lose channels, those that have scores; all of them by default.

    Raises
    ------
    PruneError
        If the budget is out of reach, with the nearest one that is not; if it asks for no removal; for limits out of
        range.
    '''
    check_limits(min_channels, min_share, round_to)
    if costs is None and budget.unit == 'latency':
        return
    costs = cost_model(graph) if costs is None else costs
    unit, limit = budget.unit, _limit(costs, budget)
    whole = costs(unit, np.zeros(len(graph.groups)))
    hint = '.'
    if unit in ('params', 'channels') and 1 < budget.value < 100:
        hint = f', or did you mean {as_share(budget.value)}?'
    if whole <= limit:
        raise PruneError(f'{budget!r} leaves the network as it is: it has {written(unit, whole)}. Ask for less{hint}')
    savings = costs.savings(unit)
    nearest = costs(unit, np.array([
        sum(_steps(group, min_channels, min_share, round_to)) * (names is None or group.name in names) * (saving > 0)
        for group, saving in zip(graph.groups, savings)], float))
    if nearest > limit:
        share, amount = math.ceil(nearest / whole * 1e4) / 1e4, written(unit, nearest).split()[0]
        raise PruneError(f'{budget!r} is out of reach: with min_channels={min_channels or 1}, min_share={min_share} '
                         f'and round_to={round_to} the nearest is {share:.4f} of the original ({amount} of '
                         f'{written(unit, whole)}). Allow more, lower these limits, or see graph.locked for what must '
                         f'stay{hint}')


def _limit(costs: CostModel, budget: Budget) -> float:
    '''Return the cost that may be left, with a margin for rounding errors.'''
    return budget.limit(costs(budget.unit, np.zeros(len(costs.sizes)))) * (1 + 1e-12)


def _steps(group: ChannelGroup, min_channels: int | None, min_share: float, round_to: int | None) -> list[int]:
    '''Return how many channels a group loses step by step, down to its limits.

    A step removes one channel of each block, and as many more as it takes to leave a multiple of ``round_to``.
    '''
    size, multiple = group.size, math.lcm(round_to or 1, group.step)
    least = max(min_channels or 1, math.ceil(min_share * size - 1e-9), multiple)
    below = (size - 1) // multiple * multiple
    return [size - below, *[multiple] * ((below - least) // multiple)] if below >= least else []


def check_limits(min_channels: int | None = None, min_share: float = 0.0, round_to: int | None = None) -> None:
    '''Refuse limits of groups that are out of range.'''
    if min_channels is not None and not _counts(min_channels):
        raise PruneError(f'min_channels={min_channels!r}: a dimension is never emptied; give a whole number from 1 on, '
                         'or None for 1.')
    if not isinstance(min_share, (int, float)) or not 0 <= min_share <= 1:
        raise PruneError(f'min_share={min_share!r}: the share of each group that is kept is a number from 0 to 1.')
    if round_to is not None and not _counts(round_to):
        raise PruneError(f'round_to={round_to!r}: give None or a whole number from 1 on.')


def _counts(number: object) -> bool:
    '''Return whether this is a whole number from 1 on.'''
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool) and int(number) >= 1

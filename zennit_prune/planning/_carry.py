'''Translate plans, scores and values between a network and its pruned versions.

A pruned network that is traced anew may show other groups under other names: a grouped convolution with one channel per
group is a depthwise one. Channels of the two networks are matched by their places in parameters, so that two plans in a
row become one, and all plans of an iterative run are made for the original.
'''
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..errors import PruneError
from ..graph._graph import ChannelGraph
from ..relevance._relevance import Relevance
from ..surgery._surgery import narrowed_copy
from ..tracing._parametrized import restore
from ..util._display import some
from ..util._networks import Indices, unique_tensors

NEVER = 1e30  # the score of channels that are removed last; its negative, of those that are removed first
Removed = Mapping[str, Sequence[int]]


class Removal(Protocol):
    '''A plan, reduced to the attribute that this file uses.'''

    graph: ChannelGraph

    @property
    def removed(self) -> Mapping[str, tuple[int, ...]]:
        '''Sorted positions by the name of the group.'''


def composed(before: ChannelGraph, first: Removed, after: ChannelGraph, second: Removed) -> dict[str, list[int]]:
    '''Return the positions that two plans in a row remove, by group of the original.

    Parameters
    ----------
    before, first:
        The graph of the original, and the positions that the first plan removes.
    after, second:
        The graph of the pruned network, and the positions that the second plan removes.

    Raises
    ------
    PruneError
        If ``after`` is not the network that ``first`` leaves, or the original cannot lose these channels at once.
    '''
    gone = before._removed_labels(first)
    lost, matched = _carried(before, gone, after, after._removed_labels(second))
    channel = before._solution.channel
    new = np.unique(channel[lost])
    stuck = lost & (channel < 0)
    if stuck.any():
        raise PruneError(f'{_where(before, stuck)} must stay in the original '
                         f'({before._solution.reason(int(stuck.argmax()))}): the later plan cannot be joined to this '
                         'one. Apply one after the other.')
    part = matched & ~lost & ~gone & np.isin(channel, new) & (channel >= 0)
    if part.any():
        raise PruneError(f'the later plan removes parts of channels of the original, which also sit in '
                         f'{_where(before, part)}: it cannot be joined to this one. Apply one after the other.')
    chosen = np.zeros(len(before._solution.group), bool)
    chosen[new] = True
    removed = {}
    for group in before.groups:
        positions = sorted({*first.get(group.name, ()), *np.flatnonzero(chosen[group.channels]).tolist()})
        counts = np.bincount(group.blocks[positions], minlength=group.step) if group.blocks is not None else [0]
        if len(set(counts)) > 1:
            raise PruneError(f'the later plan removes whole blocks of group {group.name!r}, whose {group.step} blocks '
                             'must lose equally many channels in the original, for '
                             f'{some(before._balanced_by(group), 3)}: left with one channel each, they are a depthwise '
                             'convolution. It cannot be joined to this one. Apply one after the other.')
        if positions:
            removed[group.name] = positions
    return removed


def _carried(before: ChannelGraph, gone: npt.NDArray[np.bool_], after: ChannelGraph,
             lost_after: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    '''Return, for each label of the original, whether the second plan removes it, and whether ``after`` has it.'''
    axes = {(axis.parameter, axis.dim): axis for axis in after._recording.axes}
    lost, matched = np.zeros((2, len(gone)), bool)
    for axis in before._recording.axes:
        labels = np.arange(axis.start, axis.start + axis.size)
        labels = labels[~gone[labels]]
        there = axes.pop((axis.parameter, axis.dim), None)
        if there is not None and there.size == len(labels):
            lost[labels] = lost_after[there.start:there.start + there.size]
            matched[labels] = True
        elif there is not None or len(labels) > axis.blocks:  # a dimension of one index has no labels
            raise PruneError(f'{axis.parameter!r} has {len(labels) // axis.blocks} indices along dimension {axis.dim} '
                             f'after this plan, but {"no such dimension" if there is None else there.length} in the '
                             'later one: the later plan was made for another network.')
    if axes:
        raise PruneError(f'{next(iter(axes))[0]!r} is not in the network of this plan: the later plan was made for '
                         'another network.')
    return lost, matched


def _where(graph: ChannelGraph, labels: npt.NDArray[np.bool_]) -> str:
    '''Name the parameters that hold these labels.'''
    numbers = np.unique(graph._roles.axis[np.flatnonzero(labels)])
    return some(dict.fromkeys(repr(graph._recording.axes[number].parameter) for number in numbers.tolist()), 3)


def scores_for_original(plan: Removal, graph: ChannelGraph, relevance: Relevance) -> Relevance:
    '''Return the scores of a pruned network for the groups of the original.

    Parameters
    ----------
    plan: Plan
        The plan by which the network was pruned. The channels that it removed get the lowest scores, channels without
        a score the highest.
    graph: ChannelGraph
        The graph of the pruned network.
    relevance: Relevance
        The scores of the pruned network. The score of a channel that became several is their mean.
    '''
    before, after = plan.graph, graph
    scores = np.full(len(after._solution.group) + 1, np.nan)
    for name, values in relevance.items():
        scores[after.group(name).channels] = values.numpy()
    gone = before._removed_labels(plan.removed)
    starts = {(axis.parameter, axis.dim): axis.start for axis in after._recording.axes}
    pairs = []
    for axis in before._recording.axes:
        labels = axis.labels[~gone[axis.labels]]
        start = starts.get((axis.parameter, axis.dim))
        if start is not None:
            pairs.append(np.stack([before._solution.channel[labels],
                                   after._solution.channel[start:start + len(labels)]]))
    old, new = np.unique(np.concatenate(pairs, 1), axis=1)
    scored = (old >= 0) & (new >= 0) & ~np.isnan(scores[new])
    count = np.bincount(old[scored], minlength=len(before._solution.group))
    total = np.bincount(old[scored], weights=scores[new[scored]], minlength=len(before._solution.group))
    found = {}
    for group in before.groups:
        removed = list(plan.removed.get(group.name, ()))
        if removed or count[group.channels].any():
            means = np.where(count > 0, total / np.maximum(count, 1), NEVER)[group.channels]
            means[removed] = -NEVER
            found[group.name] = torch.from_numpy(means)
    return Relevance(found, info=relevance.info)


def values_for_plan(earlier: Removal, later: Removal, network: nn.Module) -> dict[str, torch.Tensor]:
    '''Return the parameters and buffers of a pruned network that a later plan keeps.

    Parameters
    ----------
    earlier: Plan
        The plan by which ``network`` was pruned.
    later: Plan
        A plan for the original that removes the same channels and more.
    network: torch.nn.Module
        The pruned network.
    '''
    had, has = (plan.graph._kept(plan.removed) for plan in (earlier, later))
    index = {name: {dim: _within(had[name][dim], kept) if dim in had.get(name, {}) else kept
                    for dim, kept in dims.items()} for name, dims in has.items()}
    smaller = narrowed_copy(network, index, {}, {})
    restore(smaller, network, index)
    return unique_tensors(smaller)


def _within(had: Indices, has: Indices) -> Indices:
    '''Return the positions of the indices ``has`` within ``had``, both ascending, block by block.'''
    if had.ndim == 1:
        return Indices(np.searchsorted(had, has))
    return Indices(np.stack([np.searchsorted(*block) for block in zip(had.T, has.T)], 1))

'''Map scores of a pruned network to the original's groups, and its values to a later plan.

All plans of an iterative run are made for the original network, but a pruned network that is traced anew may show other
groups: a grouped convolution with one channel per group is a depthwise one. Channels of the two are matched by their
places in parameters.
'''
from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..graph._graph import ChannelGraph
from ..relevance._relevance import Relevance
from ..surgery._surgery import narrowed_copy
from ..tracing._labels import Labels
from ..tracing._parametrized import restore
from ..util._networks import unique_tensors
from ._plan import Plan

NEVER = 1e30  # the score of channels that are removed last; its negative, of those that are removed first


def scores_for_original(plan: Plan, graph: ChannelGraph, relevance: Relevance) -> Relevance:
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
        labels = np.arange(axis.start, axis.start + axis.size)
        labels = labels[~gone[labels]]
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


def values_for_plan(earlier: Plan, later: Plan, network: nn.Module) -> dict[str, torch.Tensor]:
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


def _within(had: Labels, has: Labels) -> Labels:
    '''Return the positions of the indices ``has`` within ``had``, both ascending, block by block.'''
    if had.ndim == 1:
        return np.searchsorted(had, has)
    return np.stack([np.searchsorted(*block) for block in zip(had.T, has.T)], 1)

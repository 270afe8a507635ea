'''Between a network and what a plan left of it: scores one way, values the other.

A pruned network traced anew may show other groups (a grouped convolution with one channel a group is a depthwise one):
all plans of a run are made for the original. What relates the two is where channels sit in parameters.
'''
from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..graph._graph import ChannelGraph
from ..relevance._relevance import Relevance
from ..surgery._surgery import narrowed_copy
from ..tracing._parametrized import restore
from ..util._networks import Indices, unique_tensors
from ._plan import Plan

NEVER = 1e30  # and its negative: first of all


def carried_back(plan: Plan, graph: ChannelGraph, relevance: Relevance) -> Relevance:
    '''Scores of a pruned network for the groups of the original.

    Parameters
    ----------
    plan: Plan
        How the network was pruned. What it removed goes first; what has no score goes last.
    graph: ChannelGraph
        The pruned network's.
    relevance: Relevance
        Its scores. The score of a channel that became several is their mean.
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


def carried_on(earlier: Plan, later: Plan, network: nn.Module) -> dict[str, torch.Tensor]:
    '''The values of ``network``, pruned by ``earlier``, that are left by ``later``, which removes that and more.'''
    had, has = (plan.graph._kept(plan.removed) for plan in (earlier, later))
    index = {name: {dim: _within(had[name][dim], kept) if dim in had.get(name, {}) else kept
                    for dim, kept in dims.items()} for name, dims in has.items()}
    smaller = narrowed_copy(network, index, {}, {})
    restore(smaller, network, index)
    return unique_tensors(smaller)


def _within(had: Indices, has: Indices) -> Indices:
    '''Where the indices ``has`` are among ``had``, both ascending, block by block.'''
    if had.ndim == 1:
        return Indices(np.searchsorted(had, has))
    return Indices(np.stack([np.searchsorted(*block) for block in zip(had.T, has.T)], 1))

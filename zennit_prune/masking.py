'''The masked network: the original's shapes, but it computes what the pruned network computes.

It is built by zeroing, not by pruning, so that it can check pruning: the slices of weights that read a removed channel
are zero, so the channel neither speaks nor receives relevance.
'''
from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from .channels import Channels
from .networks import computed_name, copied, tensors_by_module
from .parametrized import plain
from .surviving import let_survive, normalised_survivors


def masked_copy(graph: Channels, model: nn.Module, removed: Mapping[str, Sequence[int]]) -> nn.Module:
    '''A copy of ``model`` in which the channels at these positions of these groups are silent.

    Where two activations are multiplied with each other (queries and keys of attention) no weight reads the channels;
    there, everything that brings them forth is zero. LayerNorm, where it runs over them, runs over the others only.
    '''
    masked = plain(copied(model))  # zeros in what a weight is computed from would change more than these slices
    tensors = dict(tensors_by_module(masked))
    channel = graph.solution.channel
    paired = np.zeros(len(graph.solution.group) + 1, bool)
    for operation in graph.recording.operations:
        for labels in operation.paired:
            paired[channel[labels]] = True
    paired[-1] = False
    gone = graph.removed_labels(removed)
    zeroed = gone & (graph.roles.consumes | paired[channel])
    with torch.no_grad():
        for axis in graph.recording.axes:
            at = np.flatnonzero(zeroed[axis.start:axis.start + axis.size])
            if len(at) and not axis.parameter.endswith('running_var'):
                tensor = tensors[computed_name(axis.parameter)].unflatten(0, (axis.blocks, -1))
                block, index = (torch.from_numpy(part).to(tensor.device) for part in np.divmod(at, axis.length))
                tensor[(block, *[slice(None)] * axis.dim, index)] = 0
    survivors = normalised_survivors(graph.recording.operations, gone)
    if survivors:
        let_survive(masked, survivors)
    return masked

'''The masked network: the original's shapes, but it computes what the pruned network computes.

It is built by zeroing, not by pruning, so that it can check pruning: the slices of weights that read a removed channel
are zero, so the channel neither speaks nor receives relevance.

LayerNorm over the surviving channels, in a network that still has all of them.

A masked network silences channels where weights read them. LayerNorm reads all channels without a weight: here it is
given the surviving ones, and zeros stand where the others would be.
'''
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..errors import PruneWarning
from ..tracing._calls import CallCounter, Site
from ..tracing._parametrized import plain
from ..tracing._recorded import Operation
from ..util._display import some
from ..util._networks import Indices, computed_name, copied, tensors_by_module
from ._replay import Deletion
from ._surgery import RemovableChannels

Survivors = dict[Site, dict[int, Indices]]


def normalised_survivors(operations: Iterable[Operation], gone: npt.NDArray[np.bool_]) -> Survivors:
    '''For every call of LayerNorm that runs over removed channels: the positions left, by dimension from the back.

    Parameters
    ----------
    operations: iterable of Operation
        Those of the traced network.
    gone: numpy.ndarray
        For each label, whether it is removed.
    '''
    deletion = Deletion(gone)
    found: Survivors = {}
    for operation in operations:
        if operation.name == 'native_layer_norm':
            rank, normalised = len(operation.shapes[0]), operation.decisions.get('normalised dimensions', 0)
            kept = {dim - rank: Indices(np.flatnonzero(mask)) for dim, mask in deletion(operation.outputs[0])[1].items()
                    if dim >= rank - normalised}
            if kept:
                found[operation.site] = kept
    return found


def warn_of_changed_statistics(operations: Iterable[Operation], gone: npt.NDArray[np.bool_]) -> None:
    '''Say that a removal changes more than what is removed.'''
    norms = dict.fromkeys(repr(site.module) if site.module else 'the network itself'
                          for site in normalised_survivors(operations, gone))
    if norms:
        warnings.warn(f'LayerNorm runs over channels that are removed (in {some(norms)}): its mean and variance are '
                      'those of the surviving channels now, so the network changes by more than the removal. It is '
                      'exact against the original with these statistics. Measure it, and repair or train it.',
                      PruneWarning, stacklevel=3)


class SurvivingStatistics(CallCounter):
    '''While active, these calls of LayerNorm run over the positions that are left.'''

    def __init__(self, root: nn.Module, survivors: Survivors):
        super().__init__(root)
        self._survivors = survivors

    def intercept(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        kept = self._survivors.get(self.site)
        if kept is None:
            return func(*args, **kwargs)
        given = {**dict(zip(('input', 'normalized_shape', 'weight', 'bias', 'eps'), args)), **kwargs}
        x = given['input']
        index = {dim: torch.from_numpy(left).to(x.device) for dim, left in kept.items()}
        with torch._C.DisableTorchFunction():  # others that follow the calls see the one that the network makes
            for name in ('input', 'weight', 'bias'):
                if given.get(name) is not None:
                    for dim, left in index.items():
                        given[name] = given[name].index_select(dim, left)
        given['normalized_shape'] = given['input'].shape[-len(given['normalized_shape']):]
        result = func(given.pop('input'), **given)
        with torch._C.DisableTorchFunction():
            for dim, left in index.items():
                shape = [*result.shape[:dim], x.shape[dim], *result.shape[dim:][1:]]
                result = result.new_zeros(shape).index_copy(dim, left, result)
        return result


class Surviving:
    '''Joined to the class of a masked network: its ``forward`` runs with the statistics of the surviving channels.'''

    _survivors: Survivors

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        '''Run the network.'''
        with SurvivingStatistics(cast(nn.Module, self), self._survivors):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def let_survive(network: nn.Module, survivors: Survivors) -> None:
    '''Let ``forward`` of a network take the statistics of these calls of LayerNorm over the surviving channels.'''
    kind = type(network)
    network.__class__ = type(kind.__name__, (Surviving, kind), {'__module__': kind.__module__})
    network.__dict__['_survivors'] = survivors


def masked_copy(graph: RemovableChannels, model: nn.Module, removed: Mapping[str, Sequence[int]]) -> nn.Module:
    '''A copy of ``model`` in which the channels at these positions of these groups are silent.

    Where two activations are multiplied with each other (queries and keys of attention) no weight reads the channels;
    there, everything that brings them forth is zero. LayerNorm, where it runs over them, runs over the others only.
    '''
    masked = plain(copied(model))  # zeros in what a weight is computed from would change more than these slices
    tensors = dict(tensors_by_module(masked))
    channel = graph._solution.channel
    paired = np.zeros(len(graph._solution.group) + 1, bool)
    for operation in graph._recording.operations:
        for labels in operation.paired:
            paired[channel[labels]] = True
    paired[-1] = False
    gone = graph._removed_labels(removed)
    zeroed = gone & (graph._roles.consumes | paired[channel])
    with torch.no_grad():
        for axis in graph._recording.axes:
            at = np.flatnonzero(zeroed[axis.start:axis.start + axis.size])
            if len(at) and not axis.parameter.endswith('running_var'):
                tensor = tensors[computed_name(axis.parameter)].unflatten(0, (axis.blocks, -1))
                block, index = (torch.from_numpy(part).to(tensor.device) for part in np.divmod(at, axis.length))
                tensor[(block, *[slice(None)] * axis.dim, index)] = 0
    survivors = normalised_survivors(graph._recording.operations, gone)
    if survivors:
        let_survive(masked, survivors)
    return masked

'''The masked network: it has the original's shapes and computes what the pruned network computes.

It is built by zeroing, not by pruning, so that it can check pruning. The slices of weights that read a removed channel
are zero: the channel neither contributes nor receives relevance. LayerNorm reads all channels without such a weight;
there, its calls get the kept channels only, and their results have zeros at the removed ones.
'''
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..errors import PruneError, warn
from ..tracing._calls import CallCounter, Site
from ..tracing._parametrized import plain
from ..tracing._recorded import Operation
from ..util._display import some
from ..util._networks import Indices, computed_name, copied, tensors_by_module
from ._replay import Deletion
from ._surgery import RemovableChannels

KeptPositions = dict[Site, dict[int, Indices]]


def kept_by_norms(operations: Iterable[Operation], gone: npt.NDArray[np.bool_]) -> KeptPositions:
    '''Return the positions that every call of LayerNorm over removed channels keeps, by dimension from the back.

    Parameters
    ----------
    operations: iterable of Operation
        The operations of the traced network.
    gone: numpy.ndarray
        For each label, whether it is removed.

    Raises
    ------
    PruneError
        If a call keeps other positions with one example, or in one mode, than with another.
    '''
    deletion = Deletion(gone)
    found: KeptPositions = {}
    for operation in operations:
        if operation.name == 'native_layer_norm':
            rank, normalised = len(operation.shapes[0]), operation.decisions.get('normalised dimensions', 0)
            kept = {dim - rank: Indices(np.flatnonzero(mask)) for dim, mask in deletion(operation.outputs[0])[1].items()
                    if dim >= rank - normalised}
            known = found.setdefault(operation.site, kept)
            if known.keys() != kept.keys() or any(not np.array_equal(known[dim], kept[dim]) for dim in kept):
                raise PruneError(f'LayerNorm in {operation.site.module or "the network itself"} runs over other '
                                 'channels with one example than with another, so that no masked network computes what '
                                 'the pruned one does: keep the channels it runs over, with ignore= in the trace.')
    return {site: kept for site, kept in found.items() if kept}


def warn_of_changed_statistics(operations: Iterable[Operation], gone: npt.NDArray[np.bool_]) -> None:
    '''Warn where a removal changes the statistics of the channels that are kept.'''
    norms = dict.fromkeys(repr(site.module) if site.module else 'the network itself'
                          for site in kept_by_norms(operations, gone))
    if norms:
        warn(f'LayerNorm runs over channels that are removed (in {some(norms)}): its mean and variance are '
             'those of the remaining channels now, so the network changes by more than the removal. It is '
             'exact against the original with these statistics. Measure it, and repair or train it.')


class NormsOverKept(CallCounter):
    '''While active, these calls of LayerNorm run over the positions that are kept.'''

    def __init__(self, root: nn.Module, kept: KeptPositions):
        super().__init__(root)
        self._kept = kept

    def intercept(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        kept = self._kept.get(self.site)
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


class ForwardOverKept:
    '''The ``forward`` of a network whose calls of LayerNorm run over the channels that are kept.

    Parameters
    ----------
    network: torch.nn.Module
        The network.
    kept: dict of Site to dict of int to numpy.ndarray
        The positions that are kept, by call and by dimension counted from the back.
    '''

    def __init__(self, network: nn.Module, kept: KeptPositions):
        self.network, self.kept = network, kept
        self.own = network.__dict__.get('forward')  # of a network that has a forward of its own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with NormsOverKept(self.network, self.kept):
            if self.own is not None:
                return self.own(*args, **kwargs)
            return type(self.network).forward(self.network, *args, **kwargs)


def normalize_over_kept(network: nn.Module, kept: KeptPositions) -> None:
    '''Make these calls of LayerNorm compute their statistics over the channels that are kept.'''
    network.forward = ForwardOverKept(network, kept)


def masked_copy(graph: RemovableChannels, model: nn.Module, removed: Mapping[str, Sequence[int]]) -> nn.Module:
    '''Return a copy of ``model`` in which the channels at these positions of these groups are silent.

    Where two activations are multiplied with each other (queries and keys of attention) no weight reads the channels;
    there, everything that produces them is zero. LayerNorm, where it runs over them, runs over the others only.
    '''
    if isinstance(model.__dict__.get('forward'), ForwardOverKept):
        raise PruneError('this is a masked network already: give the original, and join plans by plan.compose.')
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
    kept = kept_by_norms(graph._recording.operations, gone)
    if kept:
        normalize_over_kept(masked, kept)
    return masked

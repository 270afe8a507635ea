'''What part of an image a position of an inner tensor can see.'''
from __future__ import annotations

from typing import Any

import torch
from torch import nn
from zennit.core import Composite

from ..errors import PruneError
from ..graph._graph import ChannelGraph, trace
from ..graph._groups import ChannelGroup
from ..relevance._attribute import Keeper, attributing, call_network
from ..relevance._exemplars import grid_of, looked_at
from ..util._networks import copied, unwrapped
from ._heatmap import known_group, states_of

AT_ONCE = 32  # rows or columns


def receptive_field(model: nn.Module, x: torch.Tensor, group: str | ChannelGroup, graph: ChannelGraph | None = None
                    ) -> torch.Tensor:
    '''The box in the input that each position of a group's tensor depends on.

    Not a number (NaN) is put into one row, then one column, of the input after the other: whatever depends on it
    becomes NaN as well, whatever the weights and values are. What sees the whole image through a gate, attention or a
    norm with statistics of its own gets the whole image.

    Parameters
    ----------
    model: torch.nn.Module
        The network; a copy runs, on the CPU in float64.
    x: torch.Tensor
        An image of the size in question, shape (1, C, H, W); more than the first are not used.
    group: str or ChannelGroup
        Of the tensors of a group with several, the one that positions of :class:`zennit_prune.Exemplars` are in.
    graph: ChannelGraph, optional
        A trace made before of this network, to save another.

    Returns
    -------
    torch.Tensor
        int64, shape (grid..., 4): top, bottom, left and right in pixels, bottom and right excluded; all zero where
        nothing is seen.

    Raises
    ------
    PruneError
        If the input is no image, the network does not run in float64 on the CPU, or the group cannot be read.
    '''
    model = unwrapped(model)
    if not isinstance(x, torch.Tensor) or x.dim() != 4 or not x.is_floating_point():
        raise PruneError('receptive fields need an image: a floating-point tensor of shape (1, C, H, W).')
    graph = graph or trace(model, x)
    found = known_group(graph, group)
    states = states_of(graph, found)
    places = [state.place for state in states]
    x = x[:1].detach().to('cpu', torch.float64)
    network = copied(model).to('cpu', torch.float64)
    with attributing(network, Composite(), None, lambda copy: Keeper(copy, places)) as (network, keeper, _):
        edges = [_edges(network, keeper, states, x, dim, found.name) for dim in (2, 3)]
    return torch.cat(edges, -1)


def _edges(network: nn.Module, keeper: Any, states: Any, x: torch.Tensor, dim: int, name: str) -> torch.Tensor:
    '''First and last row (or column) that each position sees, the last excluded, shape (grid..., 2).'''
    size = x.shape[dim]
    seen = []
    for first in range(0, size, AT_ONCE):
        lines = range(first, min(first + AT_ONCE, size))
        batch = x.repeat(len(lines), 1, 1, 1)
        for row, line in enumerate(lines):
            batch[row].select(dim - 1, line).fill_(torch.nan)
        with torch.enable_grad():
            call_network(network, batch.requires_grad_())
        here = [state for state in states if state.place in keeper.values]
        if not here:
            raise PruneError(f'the tensor of group {name!r} was not met when the network ran.')
        state = looked_at(here, lambda state: keeper.values[state.place].shape, len(lines))
        values = keeper.values[state.place]
        if grid_of(state, values.shape, len(lines)) is None:
            raise PruneError(f'the tensor of group {name!r} has shape {tuple(values.shape)} for a batch of '
                             f'{len(lines)}: it cuts samples to pieces, so that positions cannot be told.')
        inside = state.positions < state.size  # channels of the group
        last = len(state.dims)
        values = values.movedim(state.dims, tuple(range(1, last + 1))).flatten(1, last)[:, inside.reshape(-1)]
        seen.append(values.isnan().any(1))
        keeper.clear()
        keeper.values.clear()
    mask = torch.cat(seen)
    any_seen = mask.any(0)
    start = mask.int().argmax(0)
    stop = size - mask.flip(0).int().argmax(0)
    return torch.stack([torch.where(any_seen, start, 0), torch.where(any_seen, stop, 0)], -1)

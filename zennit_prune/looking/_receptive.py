'''The part of an image that each position of an inner tensor depends on.'''
from __future__ import annotations

from typing import Any

import torch
from torch import nn
from zennit.core import Composite

from ..errors import PruneError, names_options
from ..graph._graph import ChannelGraph, check_graph, trace
from ..graph._groups import ChannelGroup
from ..relevance._attribute import Keeper, attributing
from ..relevance._exemplars import grid_of, looked_at
from ..util._arguments import call_network
from ..util._networks import copied, unwrapped
from ._heatmap import known_group, sites_of

AT_ONCE = 32  # rows or columns of the image in one batch


@names_options()
def receptive_field(model: nn.Module, x: torch.Tensor, group: str | ChannelGroup, graph: ChannelGraph | None = None
                    ) -> torch.Tensor:
    '''Find the box in the input that each position of a group's tensor depends on.

    NaN is written into one row, then one column, of the input after the other: all values that depend on it become NaN,
    whatever the weights are. A position that depends on the whole image, through a gate, attention, or a norm that
    computes its statistics from the input, gets the whole image.

    Parameters
    ----------
    model: torch.nn.Module
        The network; a copy of it runs, on the CPU in float64.
    x: torch.Tensor
        An image of the size that the boxes are for, shape (1, C, H, W); further images are not used.
    group: str or ChannelGroup
        The group, its name, or the name of a layer that belongs to one group only. Of the activation sites of a group
        with several, the one that positions of ``Exemplars`` refer to is used.
    graph: ChannelGraph, optional
        An earlier trace of this network, so that it need not be traced again.

    Returns
    -------
    torch.Tensor
        The boxes, int64, shape (grid..., 4): top, bottom, left and right in pixels, bottom and right excluded; all
        zero for a position that depends on no pixel.

    Raises
    ------
    PruneError
        If the input is no image, the network does not run in float64 on the CPU, or the group is unknown or cannot be
        read.

    See Also
    --------
    zennit_prune.heatmap : With ``channel=``, shows where the relevance of a channel is.

    Examples
    --------
    >>> import torch
    >>> from zennit_prune.looking import receptive_field
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
    ...                             torch.nn.Linear(144, 2))
    >>> fields = receptive_field(model, torch.randn(1, 1, 8, 8), '0')
    >>> fields.shape
    torch.Size([6, 6, 4])
    >>> fields[2, 5].tolist()
    [2, 5, 5, 8]
    '''
    model = unwrapped(model)
    if not isinstance(x, torch.Tensor) or x.dim() != 4 or not x.is_floating_point():
        raise PruneError('receptive fields need an image: a floating-point tensor of shape (1, C, H, W).')
    if graph is not None:
        check_graph(graph)
    graph = graph or trace(model, x, progress=False)
    found = known_group(graph, group)
    sites = sites_of(graph, found)
    places = [site.place for site in sites]
    x = x[:1].detach().to('cpu', torch.float64)
    network = copied(model).to('cpu', torch.float64)
    with attributing(network, Composite(), None, lambda copy: Keeper(copy, places)) as (network, keeper, _):
        edges = [_edges(network, keeper, sites, x, dim, found.name) for dim in (2, 3)]
    return torch.cat(edges, -1)


def _edges(network: nn.Module, keeper: Any, sites: Any, x: torch.Tensor, dim: int, name: str) -> torch.Tensor:
    '''Return the first row (or column) that each position depends on, and that behind the last, shape (grid..., 2).'''
    size = x.shape[dim]
    seen = []
    for first in range(0, size, AT_ONCE):
        lines = range(first, min(first + AT_ONCE, size))
        batch = x.repeat(len(lines), 1, 1, 1)
        for row, line in enumerate(lines):
            batch[row].select(dim - 1, line).fill_(torch.nan)
        with torch.enable_grad():
            call_network(network, batch.requires_grad_())
        here = [site for site in sites if site.place in keeper.values]
        if not here:
            raise PruneError(f'the tensor of group {name!r} was not computed when the network ran.')
        site = looked_at(here, lambda site: keeper.values[site.place].shape, len(lines))
        values = keeper.values[site.place]
        if grid_of(site, values.shape, len(lines)) is None:
            raise PruneError(f'the tensor of group {name!r} has shape {tuple(values.shape)} for a batch of '
                             f'{len(lines)}: samples are cut into pieces there, so that positions are unknown.')
        inside = site.positions < site.size  # channels of the group
        last = len(site.dims)
        values = values.movedim(site.dims, tuple(range(1, last + 1))).flatten(1, last)[:, inside.reshape(-1)]
        seen.append(values.isnan().any(1))
        keeper.clear()
        keeper.values.clear()
    mask = torch.cat(seen)
    any_seen = mask.any(0)
    start = mask.int().argmax(0)
    stop = size - mask.flip(0).int().argmax(0)
    return torch.stack([torch.where(any_seen, start, 0), torch.where(any_seen, stop, 0)], -1)

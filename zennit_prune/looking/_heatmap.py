'''Heatmaps of single channels: the relevance at the input that flows through a channel.

Look before removing anything: heatmaps of the network as it is and as it would be.
'''
from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import nn
from zennit.core import Composite
from zennit.image import CMAPS, palette

from ..errors import PruneError
from ..graph._graph import ChannelGraph, trace
from ..graph._groups import ChannelGroup
from ..relevance._attribute import (
    Attribution,
    Reader,
    attributing,
    call_network,
    differentiable,
    main_output,
    propagate,
    recommended_composite,
)
from ..relevance._attribute import recommended_composite as recommended
from ..relevance._canonize import GraphCanonizer
from ..relevance._initial import Initial, initial_relevance
from ..relevance._states import State, find_states
from ..tracing._boundaries import Place
from ..util._loaders import batch_size, only
from ..util._networks import tensors_in, unwrapped

TILE = 128  # pixels of the longer side of a picture, at least
MARGIN = 6


def heatmap(model: nn.Module, composite: Composite | None, x: Any, target: Any = 'predicted',
            initial: Initial = 'one-hot', canonizer: GraphCanonizer | None = None) -> torch.Tensor:
    '''The relevance of every input pixel, summed over the input's channels.

    Parameters
    ----------
    model: torch.nn.Module
        The network, or a masked or pruned one; it is copied, never changed.
    composite: zennit.core.Composite or None
        The rules; None for the recommended ones (epsilon). The network is canonized from its graph after the
        composite's own canonizers.
    x: torch.Tensor, tuple or dict
        The inputs, shape (N, C, H, W).
    target: torch.Tensor, callable or ``'predicted'``
        Class indices, rows or a function of the output; see :func:`zennit_prune.initial.initial_relevance`.
    initial: str or callable
        Likewise.
    canonizer: GraphCanonizer, optional
        One made before for this network, to save the trace.

    Returns
    -------
    torch.Tensor
        Shape (N, H, W), on the CPU; for other inputs, the second dimension is summed where there are more than two.

    Raises
    ------
    PruneError
        For inputs or targets that do not fit, or relevance that is not finite.
    '''
    return explained(model, composite, x, lambda output: initial_relevance(output, target, initial), canonizer)[0]


def explained(model: nn.Module, composite: Composite | None, x: Any, start: Callable[[torch.Tensor], torch.Tensor],
              canonizer: GraphCanonizer | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    '''The heatmaps for what ``start`` makes of the output, and the output.'''
    model = unwrapped(model)
    composite = recommended_composite() if composite is None else composite
    canonizer = canonizer or GraphCanonizer(model, x)
    with attributing(model, composite, canonizer) as (network, _, _), torch.enable_grad():
        inputs = differentiable(x, network)
        pixels = first_floating(inputs)
        output = main_output(call_network(network, inputs))
        arrived, = propagate(output, start(output), [pixels])
    return summed(torch.zeros_like(pixels) if arrived is None else arrived), output.detach()


def first_floating(inputs: Any) -> torch.Tensor:
    '''The input that a heatmap is of.'''
    for tensor in tensors_in(inputs):
        if tensor.requires_grad:
            return tensor
    raise PruneError('a heatmap needs a floating-point input, e.g. an image.')


def summed(relevance: torch.Tensor) -> torch.Tensor:
    '''Relevance at the input, summed over its channels, on the CPU.'''
    relevance = relevance.detach().cpu()
    if not torch.isfinite(relevance).all():
        raise PruneError('the relevance at the input is not finite: a rule divides by zero or overflows.')
    return relevance.sum(1) if relevance.dim() > 2 else relevance


def heatmap_image(path: str | os.PathLike[str], images: torch.Tensor, heatmaps: dict[str, torch.Tensor],
                  captions: Sequence[str] = (), cmap: str = 'bwr') -> None:
    '''Draw inputs and their heatmaps as one PNG: a column for each image, a row for each network.

    The heatmaps of one image share one scale, symmetric around zero, so that rows can be compared.

    Parameters
    ----------
    path: path-like
        The file to write.
    images: torch.Tensor
        Shape (N, C, H, W) with 1 or 3 channels; each is stretched to its own range.
    heatmaps: dict of str to torch.Tensor
        Shape (N, H, W) each, by the name of the row, e.g. ``{'before': ..., 'after': ..., 'difference': ...}``, as
        :class:`zennit_prune.Agreement` holds them.
    captions: sequence of str
        A line over each column.
    cmap: str
        A colour map of Zennit.
    '''
    count = len(images)
    if not count or not heatmaps:
        raise PruneError(f'there is nothing to draw: {count} images and {len(heatmaps)} rows of heatmaps.')
    for name, maps in heatmaps.items():
        if maps.dim() != 3 or len(maps) != count:
            raise PruneError(f'heatmaps {name!r} have shape {tuple(maps.shape)}: give one of shape (H, W) for each of '
                             f'{count} images.')
    scale = torch.stack([maps.cpu().abs().flatten(1).amax(1) for maps in heatmaps.values()]).amax(0).clamp(min=1e-30)
    try:
        colours = np.asarray(palette(cmap), np.uint8).reshape(256, 3)
    except Exception as error:
        raise PruneError(f'cmap={cmap!r} is no colour map of Zennit: use one of {", ".join(CMAPS)}.') from error
    rows = [('input', [_picture(image) for image in images])]
    for name, maps in heatmaps.items():
        levels = ((maps.cpu() / scale[:, None, None] + 1) * 127.5).round().clamp(0, 255).byte().numpy()
        rows.append((name, [colours[level] for level in levels]))
    _draw(rows, captions).save(os.fspath(path), format='PNG')


def _picture(image: torch.Tensor) -> npt.NDArray[np.uint8]:
    '''An image stretched to its own range, as (H, W, 3) bytes.'''
    values = image.detach().cpu().float()
    if values.dim() != 3 or values.shape[0] not in (1, 3):
        raise PruneError(f'an image of shape {tuple(values.shape)} cannot be drawn: give (1, H, W) or (3, H, W).')
    values = values.expand(3, -1, -1)
    low, high = float(values.min()), float(values.max())
    stretched: npt.NDArray[np.uint8] = ((values - low) / ((high - low) or 1.0) * 255).byte().permute(1, 2, 0).numpy()
    return stretched


def _draw(rows: Sequence[tuple[str, list[npt.NDArray[np.uint8]]]], captions: Sequence[str]) -> Image.Image:
    '''Tiles in rows with their names to the left and captions above.'''
    height, width = rows[0][1][0].shape[:2]
    zoom = max(1, round(TILE / max(height, width)))
    height, width = height * zoom, width * zoom
    left, top = 8 * max(len(name) for name, _ in rows) + 2 * MARGIN, 20 if captions else MARGIN
    count = len(rows[0][1])
    sheet = Image.new('RGB', (left + count * (width + MARGIN), top + len(rows) * (height + MARGIN)), 'white')
    pen = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        pen.text((left + column * (width + MARGIN), 4), caption, fill='black')
    for row, (name, tiles) in enumerate(rows):
        y = top + row * (height + MARGIN)
        pen.text((MARGIN, y + height // 2 - 6), name, fill='black')
        for column, tile in enumerate(tiles):
            resized = Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(resized, (left + column * (width + MARGIN), y))
    return sheet


AT_ONCE = 16  # samples, repeated ones counted: more take longer than one pass for each channel


def channel_heatmap(model: nn.Module, composite: Composite | None, x: Any, target: Any, group: str | ChannelGroup,
                    channel: int | Sequence[int], initial: Initial = 'one-hot', graph: ChannelGraph | None = None
                    ) -> torch.Tensor:
    '''The relevance of every input pixel that flows through one channel.

    The relevance that arrives at the channel's state, the tensor that carries its complete value, is kept there for
    this channel alone and propagated on to the input. Where a group has several states (a residual stream), this is
    done at each of them, and the mean is returned, as the score of a channel is the mean over its states. Over all
    channels, the heatmaps of a group with one state sum to the relevance that flows through this state; of a network
    without branches that is the whole heatmap.

    Parameters
    ----------
    model: torch.nn.Module
        The network; it is copied, never changed.
    composite: zennit.core.Composite or None
        The rules; None for the recommended ones.
    x: torch.Tensor, tuple or dict
        The inputs, shape (N, C, H, W).
    target, initial:
        See :func:`zennit_prune.initial.initial_relevance`.
    group: str or ChannelGroup
        A group, its name, or the name of a layer that belongs to one group only.
    channel: int or sequence of int
        Positions in the group. Several are propagated together.
    graph: ChannelGraph, optional
        A trace made before of this network, to save another.

    Returns
    -------
    torch.Tensor
        On the CPU, shape (N, H, W), or (K, N, H, W) for a sequence of K channels.

    Raises
    ------
    PruneError
        For an unknown group, a position out of range, a group whose relevance cannot be read or does not arrive, and
        as :func:`zennit_prune.heatmap`.
    '''
    model = unwrapped(model)
    graph = graph or trace(model, x)
    found = known_group(graph, group)
    channels = _positions(found, channel)
    states = states_of(graph, found)
    composite = recommended() if composite is None else composite
    canonizer = GraphCanonizer.from_recording(graph._recording)
    places = [state.place for state in states]
    with attributing(model, composite, canonizer, lambda network: Taps(network, places)) as attribution:
        maps = _conditioned(attribution, states, x, target, initial, channels, found)
    return maps if _several(channel) else maps[0]


class Taps(Reader):
    '''A reader that ties a loose end to each tensor, from which relevance is propagated back as from an output.'''

    def __init__(self, network: nn.Module, places: Sequence[Place]):
        super().__init__(network, places)
        self.ends: dict[Place, torch.Tensor] = {}

    def _catch(self, place: Place, value: Any) -> None:
        super()._catch(place, value)
        if place in self.caught:  # a copy, for the network may write into it; unseen by the modes that give rules
            with torch._C.DisableTorchFunction():
                self.ends[place] = tensors_in(value)[place.position].clone()

    def clear(self) -> None:
        super().clear()
        self.ends.clear()


def known_group(graph: ChannelGraph, group: str | ChannelGroup) -> ChannelGroup:
    '''The group of a graph that a name, or a group of another trace of the same network, stands for.'''
    found = graph.group(group.name if isinstance(group, ChannelGroup) else group)
    if isinstance(group, ChannelGroup) and found.size != group.size:
        raise PruneError(f'group {group.name!r} has {group.size} channels, but {found.size} in this network: it is of '
                         'another one.')
    return found


def states_of(graph: ChannelGraph, group: ChannelGroup) -> list[State]:
    '''Where the channels of a group are read.'''
    states, missing = find_states(graph)
    if group.name in missing:
        raise PruneError(f'the relevance of group {group.name!r} cannot be read: {missing[group.name]}.')
    return [state for state in states if state.group == group.name]


def _several(channel: Any) -> bool:
    return isinstance(channel, Sequence) or getattr(channel, 'ndim', 0) > 0


def _positions(group: ChannelGroup, channel: Any) -> list[int]:
    try:
        channels = [operator.index(item) for item in (channel if _several(channel) else [channel])]
    except TypeError as error:
        raise PruneError(f'channel={channel!r} is no position in group {group.name!r}: give a whole number, or a '
                         'sequence of them.') from error
    for item in channels:
        if not 0 <= item < group.size:
            raise PruneError(f'channel {item} is out of range: group {group.name!r} has {group.size} channels, 0 to '
                             f'{group.size - 1}.')
    if not channels:
        raise PruneError(f'no channel of group {group.name!r} is named: give at least one position.')
    return channels


def _conditioned(attribution: Attribution, states: Sequence[State], x: Any, target: Any, initial: Initial,
                 channels: Sequence[int], group: ChannelGroup) -> torch.Tensor:
    network, taps, registered = attribution
    number = batch_size(x)
    at_once = max(1, AT_ONCE // number)

    def run(inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        taps.clear()
        inputs = differentiable(inputs, network)
        pixels = first_floating(inputs)
        return pixels, main_output(call_network(network, inputs))

    maps = []
    with torch.enable_grad():
        try:
            pixels, output = run(x)
            caught = dict(taps.caught)
            arrived = propagate(output, initial_relevance(output, target, initial), list(caught.values()), True)
            relevance = {state: values.detach() for place, values in zip(caught, arrived) if values is not None
                         for state in states if state.place == place}
            if not relevance:
                raise PruneError(f'no relevance arrives at group {group.name!r}: the target does not depend on it, or '
                                 'it is inside a gate, which rules hold constant.')
            covered = sum((torch.bincount(state.positions.reshape(-1), minlength=state.size + 1) > 0).double()
                          for state in relevance)
            repeated = 1
            for first in range(0, len(channels), at_once):
                chosen = channels[first:first + at_once]
                if len(chosen) != repeated:  # else the graph of the last pass serves once more
                    repeated = len(chosen)
                    pixels, _ = run(only(x, number, torch.arange(number, device='cpu').repeat(repeated)))
                seeds = {state.place: torch.cat([_kept(state, values, item, covered) for item in chosen])
                         for state, values in relevance.items()}
                maps.append(_from_states(taps, seeds, pixels).unflatten(0, (repeated, number)))
        finally:
            taps.clear()
            for hook in list(registered.hook_refs):
                hook.remove()
    return torch.cat(maps)


def _from_states(taps: Taps, seeds: dict[Place, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    ends = [taps.ends[place] for place in seeds]
    try:
        arrived, = torch.autograd.grad(ends, [pixels], list(seeds.values()), retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise PruneError(f'relevance cannot be propagated from single channels of this network: {error}.') from error
    return summed(torch.zeros_like(pixels) if arrived is None else arrived)


def _kept(state: State, relevance: torch.Tensor, channel: int, covered: Any) -> torch.Tensor:
    '''The relevance at a state, zero but for one channel, over the number of states that hold the channel.'''
    shape = [1] * relevance.dim()
    for dim, size in zip(state.dims, state.positions.shape):
        if relevance.shape[dim] != size:
            raise PruneError(f'relevance at {state.place.module!r} has shape {tuple(relevance.shape)}, but {size} '
                             f'entries along dimension {dim} were traced: give inputs of the size that was traced.')
        shape[dim] = size
    mask = (state.positions == channel).reshape(shape).to(relevance)
    return relevance * (mask / float(covered[channel].clamp(min=1)))

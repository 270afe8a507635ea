'''Look before removing anything: heatmaps of the network as it is and as it would be.'''
from __future__ import annotations

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

from .attribute import attributing, call_network, differentiable, main_output, propagate, recommended_composite
from .canonize import GraphCanonizer
from .errors import PruneError
from .initial import Initial, initial_relevance
from .networks import tensors_in, unwrapped

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

'''Inputs and heatmaps as pictures in a page: data URIs, small ones without loss.'''
from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional as F

from .errors import PruneError

LARGEST = 224  # pixels of the longer side
BRIGHTEST = 0.99  # of the pixels: what is above this quantile has the full colour
SMALL = 96  # pixels of the longer side: pictures that JPEG would blur
LEVELS = 61  # colours of a heatmap, an odd number so that zero has its own

RELEVANCE = ((12, 45, 135), (255, 255, 255), (160, 15, 20))  # against the class, nothing, for it
CHANGE = ((0, 95, 90), (255, 255, 255), (135, 70, 0))  # less than before, the same, more


def picture(image: torch.Tensor, display: bool = False, largest: int = LARGEST) -> str:
    '''An image as a data URI.

    Parameters
    ----------
    image: torch.Tensor
        Shape (1 or 3, H, W).
    display: bool
        Values are bytes, or real numbers from 0 to 1; else they are stretched to their own range.
    largest: int
        Pixels of the longer side: larger ones are reduced.

    Raises
    ------
    PruneError
        For another shape.
    '''
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise PruneError(f'an image of shape {tuple(image.shape)} cannot be shown: give display= with a tensor of '
                         'shape (N, 1, H, W) or (N, 3, H, W).')
    values = image.detach().cpu()
    whole = not values.is_floating_point()
    values = _reduced(values.float(), largest)
    if display:
        values = values / 255 if whole else values
    else:
        low, high = float(values.min()), float(values.max())
        values = (values - low) / ((high - low) or 1.0)
    pixels = (values.clamp(0, 1) * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
    drawn = Image.fromarray(np.ascontiguousarray(pixels))
    if max(drawn.size) <= SMALL:
        return _uri(drawn, 'PNG', optimize=True)
    return _uri(drawn, 'JPEG', quality=85, optimize=True)


def heat(values: torch.Tensor, scale: float, colours: Sequence[tuple[int, int, int]] = RELEVANCE,
         largest: int = LARGEST) -> str:
    '''A heatmap of shape (H, W) as a data URI: ``-scale``, 0 and ``scale`` have the three colours.'''
    values = _reduced(values.detach().cpu().float()[None], largest)[0] / (scale or 1.0)
    levels = ((values.clamp(-1, 1) + 1) / 2 * (LEVELS - 1)).round().byte().numpy()
    drawn = Image.fromarray(levels)
    drawn.putpalette(_palette(colours).tobytes())
    return _uri(drawn, 'PNG', optimize=True)


def full_colour(maps: torch.Tensor, largest: int = LARGEST) -> float:
    '''The scale at which the strongest pixels of some heatmaps, shape (N, H, W), have the full colour.'''
    values = _reduced(maps.detach().cpu().float(), largest).abs().flatten()
    return float(values.double().quantile(BRIGHTEST)) or float(values.max())


def _palette(colours: Sequence[tuple[int, int, int]]) -> npt.NDArray[np.uint8]:
    '''From the first colour to the second in the middle, and on to the third.'''
    anchors = np.array(colours, float)
    at = np.linspace(0, 2, LEVELS)
    mixed = np.stack([np.interp(at, [0, 1, 2], anchors[:, channel]) for channel in range(3)], 1)
    return mixed.round().astype(np.uint8)


def _reduced(values: torch.Tensor, largest: int) -> torch.Tensor:
    '''Averages over blocks of pixels where the picture is large.'''
    factor = -(-max(values.shape[-2:]) // largest)
    return values if factor == 1 else F.avg_pool2d(values[None], factor, ceil_mode=True)[0]


def _uri(drawn: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    drawn.save(buffer, format=kind, **options)
    return f'data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}'

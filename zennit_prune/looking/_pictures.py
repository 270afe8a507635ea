'''Images and heatmaps as pictures: one PNG file that compares networks, and single pictures inside an HTML page.'''
from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F
from zennit.image import CMAPS, palette

from ..errors import PruneError, names_options
from ..util._files import refuse_path_first, write_bytes

Pixels = npt.NDArray[np.uint8]  # shape (H, W, 3)

TILE = 128  # pixels of the longer side of a tile of `heatmap_image`, at least
MARGIN = 8  # pixels between tiles and texts
TEXT = 14  # size of the labels, in pixels
EDGE = (200, 200, 200)  # colour of the line around a tile: a heatmap that is white at its border ends somewhere

LARGEST = 224  # pixels of the longer side of a picture in a page
BRIGHTEST = 0.99  # pixels above this quantile of absolute relevance have the full colour
SMALL = 96  # pixels of the longer side: smaller pictures are PNG, for JPEG would blur them
LEVELS = 61  # colours of a heatmap in a page, an odd number so that zero has its own

RELEVANCE = ((12, 45, 135), (255, 255, 255), (160, 15, 20))  # colours of relevance against the class, none, and for it
CHANGE = ((0, 95, 90), (255, 255, 255), (135, 70, 0))  # colours of less relevance than before, equally much, and more


@names_options()
def heatmap_image(x: torch.Tensor, maps: Mapping[str, torch.Tensor], path: str | os.PathLike[str],
                  captions: Sequence[str] = (), cmap: str = 'bwr') -> None:
    '''Draw images and their heatmaps as one PNG file: a column for each image, a row for each network.

    The heatmaps of one image share one scale, symmetric around zero, so that rows can be compared. The file appears
    when it is complete.

    Parameters
    ----------
    x: torch.Tensor
        The images, shape (N, C, H, W) with 1 or 3 channels; each is stretched to its own range of values.
    maps: mapping of str to torch.Tensor
        Heatmaps of shape (N, H, W) by the name of their row, e.g. ``{'before': ..., 'after': ..., 'difference': ...}``
        from :class:`zennit_prune.looking.Agreement`.
    path: path-like
        The file to write.
    captions: sequence of str
        A line over each column, shortened where it is wider than the image.
    cmap: str
        A colour map of Zennit.

    Raises
    ------
    PruneError
        If images, heatmaps and captions do not fit each other, a heatmap is not finite, the colour map is unknown, or
        there is no folder for the file.

    See Also
    --------
    heatmap : Computes the heatmaps.
    report : Shows heatmaps of two networks in an HTML page.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import torch
    >>> import zennit_prune as zp
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
    ...                             torch.nn.Linear(144, 2))
    >>> x = torch.randn(3, 1, 8, 8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / 'heatmaps.png'
    ...     zp.heatmap_image(x, {'network': zp.heatmap(model, None, x)}, path, captions=['one', 'two', 'three'])
    ...     path.read_bytes()[1:4]
    b'PNG'
    '''
    refuse_path_first('heatmap_image(x, maps, path)', x, maps)
    _check_fit(x, maps, captions)
    count = len(x)
    scale = torch.stack([rows.cpu().abs().flatten(1).amax(1) for rows in maps.values()]).amax(0).clamp(min=1e-30)
    try:
        colours = np.asarray(palette(cmap), np.uint8).reshape(256, 3)
    except Exception as error:
        raise PruneError(f'cmap={cmap!r} is no colour map of Zennit: use one of {", ".join(CMAPS)}.') from error
    tiles = [('input', [_bytes(stretched(image.detach().cpu().float())) for image in x])]
    for name, rows in maps.items():
        levels = ((rows.cpu() / scale[:, None, None] + 1) * 127.5).round().clamp(0, 255).byte().numpy()
        tiles.append((str(name), [colours[levels[column]] for column in range(count)]))
    write_bytes(path, _encoded(_sheet(tiles, captions), 'PNG'))


def _check_fit(x: torch.Tensor, maps: Mapping[str, torch.Tensor], captions: Sequence[str]) -> None:
    '''Raise unless there is a heatmap for each image in every row, and all of it can be drawn.'''
    if not isinstance(x, torch.Tensor) or not isinstance(maps, Mapping):
        raise PruneError(f'heatmap_image takes images and heatmaps by name, not {type(x).__name__} and '
                         f"{type(maps).__name__}: call heatmap_image(x, {{'before': ..., 'after': ...}}, path).")
    count = len(x)
    if not count or not maps:
        raise PruneError(f'there is nothing to draw: {count} images and {len(maps)} rows of heatmaps.')
    _check_image(x[0], 'drawn: give images of shape (N, 1, H, W) or (N, 3, H, W)')
    for name, rows in maps.items():
        if rows.dim() != 3 or len(rows) != count:
            raise PruneError(f'heatmaps {name!r} have shape {tuple(rows.shape)}: give one of shape (H, W) for each of '
                             f'{count} images.')
        if not torch.isfinite(rows).all():
            raise PruneError(f'heatmaps {name!r} hold values that are not finite, which have no colour.')
    if captions and len(captions) != count:
        raise PruneError(f'there are {len(captions)} captions for {count} images: give one for each, or none.')


def _sheet(rows: Sequence[tuple[str, list[Pixels]]], captions: Sequence[str]) -> Image.Image:
    '''Draw rows of tiles with their names to the left and captions above.'''
    font = ImageFont.load_default(TEXT)
    height, width = rows[0][1][0].shape[:2]
    zoom = max(1, -(-TILE // max(height, width)))
    height, width = height * zoom, width * zoom
    left = round(max(font.getlength(name) for name, _ in rows)) + 2 * MARGIN
    top = TEXT + 2 * MARGIN if captions else MARGIN
    sheet = Image.new('RGB', (left + len(rows[0][1]) * (width + MARGIN), top + len(rows) * (height + MARGIN)), 'white')
    pen = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        middle = left + column * (width + MARGIN) + width // 2
        pen.text((middle, top // 2), _fitted(str(caption), width, font), fill='black', font=font, anchor='mm')
    for row, (name, tiles) in enumerate(rows):
        y = top + row * (height + MARGIN)
        pen.text((left - MARGIN, y + height // 2), name, fill='black', font=font, anchor='rm')
        for column, tile in enumerate(tiles):
            x = left + column * (width + MARGIN)
            sheet.paste(Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST), (x, y))
            pen.rectangle((x - 1, y - 1, x + width, y + height), outline=EDGE)
    return sheet


def _fitted(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    '''Return a text, shortened at its end to at most ``width`` pixels.'''
    shown = text
    while shown and font.getlength(shown) > width:
        text = text[:-1]
        shown = f'{text.rstrip()}…' if text else ''
    return shown


def picture(image: torch.Tensor, display: bool = False, largest: int = LARGEST) -> str:
    '''Return an image as a data URI.

    Parameters
    ----------
    image: torch.Tensor
        Shape (1 or 3, H, W).
    display: bool
        Whether values are bytes, or real numbers from 0 to 1; else they are stretched to their own range.
    largest: int
        Pixels of the longer side: larger images are reduced.

    Raises
    ------
    PruneError
        For another shape.
    '''
    _check_image(image, 'shown: give display= with a tensor of shape (N, 1, H, W) or (N, 3, H, W)')
    values = image.detach().cpu()
    most = 1 if values.is_floating_point() else 255
    values = _reduced(values.float(), largest)
    drawn = Image.fromarray(_bytes(values / most if display else stretched(values)))
    if max(drawn.size) <= SMALL:
        return _uri(drawn, 'PNG', optimize=True)
    return _uri(drawn, 'JPEG', quality=85, optimize=True)


def heat(values: torch.Tensor, scale: float, colours: Sequence[tuple[int, int, int]] = RELEVANCE,
         largest: int = LARGEST) -> str:
    '''Return a heatmap of shape (H, W) as a data URI: ``-scale``, 0 and ``scale`` have the three colours.'''
    values = _reduced(values.detach().cpu().float()[None], largest)[0] / (scale or 1.0)
    levels = ((values.clamp(-1, 1) + 1) / 2 * (LEVELS - 1)).round().byte().numpy()
    drawn = Image.fromarray(levels)
    drawn.putpalette(_palette(colours).tobytes())
    return _uri(drawn, 'PNG', optimize=True)


def full_colour(maps: torch.Tensor, largest: int = LARGEST) -> float:
    '''Return the scale at which the strongest pixels of some heatmaps, shape (N, H, W), have the full colour.'''
    values = _reduced(maps.detach().cpu().float(), largest).abs().flatten()
    return float(values.double().quantile(BRIGHTEST)) or float(values.max())


def _check_image(image: torch.Tensor, remedy: str) -> None:
    '''Raise unless a tensor is an image of one or three channels.'''
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise PruneError(f'an image of shape {tuple(image.shape)} cannot be {remedy}.')


def stretched(values: torch.Tensor) -> torch.Tensor:
    '''Return values scaled to the range from 0 to 1.'''
    low, high = float(values.min()), float(values.max())
    return (values - low) / ((high - low) or 1.0)


def _bytes(values: torch.Tensor) -> Pixels:
    '''Return an image with values from 0 to 1, shape (1 or 3, H, W), as (H, W, 3) bytes.'''
    pixels = (values.clamp(0, 1) * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
    return np.ascontiguousarray(pixels)


def _palette(colours: Sequence[tuple[int, int, int]]) -> Pixels:
    '''Return a palette from the first colour over the second in the middle to the third.'''
    anchors = np.array(colours, float)
    at = np.linspace(0, 2, LEVELS)
    mixed = np.stack([np.interp(at, [0, 1, 2], anchors[:, channel]) for channel in range(3)], 1)
    return mixed.round().astype(np.uint8)


def _reduced(values: torch.Tensor, largest: int) -> torch.Tensor:
    '''Return averages over blocks of pixels where the picture is large.'''
    factor = -(-max(values.shape[-2:]) // largest)
    return values if factor == 1 else F.avg_pool2d(values[None], factor, ceil_mode=True)[0]


def _encoded(drawn: Image.Image, kind: str, **options: int) -> bytes:
    '''Return the bytes of an image file.'''
    buffer = io.BytesIO()
    drawn.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _uri(drawn: Image.Image, kind: str, **options: int) -> str:
    '''Return a picture as a data URI.'''
    return f'data:image/{kind.lower()};base64,{base64.b64encode(_encoded(drawn, kind, **options)).decode()}'

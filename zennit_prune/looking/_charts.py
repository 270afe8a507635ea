'''Charts as SVG, from numbers alone; colours and text around them are the page's.

A chart is stretched to the width it is given, so it holds shapes only. What its points say is a list of texts, which
the page reads out at the point under the pointer, or the one that the arrow keys reach.

Inputs and heatmaps as pictures in a page: data URIs, small ones without loss.
'''
from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional as F

from ..errors import PruneError

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


HEIGHT = 100
FINEST = 192  # bars in a ranking: of more channels than that, several share one


class Markup(str):
    '''Text that is HTML already; templates leave it as it is.'''

    def __html__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Chart:
    '''A drawing, and what its points say.

    Attributes
    ----------
    svg: Markup
        The drawing.
    says: list of str
        For each point, row by row, what there is to read.
    columns, rows: int
        How the points divide the drawing.
    top, bottom: str
        What the upper and the lower edge stand for.
    segments: list of (str, int)
        What is written below, and over how many columns.
    names: list of str
        What is written beside the rows.
    spots: list of float
        Where points stand from left to right, in per cent, if they do not divide the drawing evenly.
    '''

    svg: Markup
    says: list[str]
    columns: int
    rows: int = 1
    top: str = ''
    bottom: str = ''
    segments: list[tuple[str, int]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    spots: list[float] = field(default_factory=list)


def ranking(scores: Sequence[float], gone: Sequence[bool]) -> Chart:
    '''The scores of a group's channels in ascending order, those that go in another colour, and where the cut is.

    Heights are square roots, signs kept, so that small scores can be seen beside large ones.
    '''
    order = sorted(range(len(scores)), key=lambda position: scores[position])
    says = [f'channel {position}: {scores[position]:.3g}, {"goes" if gone[position] else "stays"}'
            for position in order]
    bins = min(len(order), FINEST)
    edges = [index * len(order) // bins for index in range(bins + 1)]
    roots = [math.copysign(math.sqrt(abs(scores[position])), scores[position]) for position in order]
    high, low = max(0.0, *roots), min(0.0, *roots)
    scale = (HEIGHT - 2) / ((high - low) or 1.0)
    zero = HEIGHT - 1 + low * scale
    paths: dict[bool, list[str]] = {False: [], True: []}
    for index, (start, end) in enumerate(pairwise(edges)):
        height = sum(roots[start:end]) / (end - start) * scale
        height = math.copysign(max(abs(height), 1.0), height)  # a channel of no relevance is seen, too
        goes = 2 * sum(gone[position] for position in order[start:end]) >= end - start
        paths[goes].append(f'M{index} {zero:.1f}v{-height:.1f}h1v{height:.1f}z')
    shapes = ''.join(f'<path class="{name}" d="{"".join(paths[goes])}"/>'
                     for goes, name in ((False, 'kept'), (True, 'gone')) if paths[goes])
    cut = sum(gone)
    if 0 < cut < len(order) and all(gone[position] for position in order[:cut]):
        at = cut / len(order) * bins
        shapes += f'<path class="cut" d="M{at:.2f} 0V{HEIGHT}"/>'
    return Chart(_svg(shapes, bins, HEIGHT), says, len(order), top=f'{max(scores):.2g}')


def columns(labels: Sequence[str], after: Sequence[float], before: Sequence[float] | None = None,
            says: Sequence[str] | None = None, top: float | None = None, top_name: str = '') -> Chart:
    '''A column for each label, in front of another that is higher, say what was there before.'''
    whole = list(after if before is None else before)
    highest = top if top is not None else max([*whole, *after], default=0.0) or 1.0
    shapes = []
    for name, values in (('before', before), ('kept', after)):
        bars = [f'M{index + 0.1:g} {HEIGHT}v{-HEIGHT * min(max(value / highest, 0), 1):.1f}h.8V{HEIGHT}z'
                for index, value in enumerate(values or ()) if value > 0]
        if bars:
            shapes.append(f'<path class="{name}" d="{"".join(bars)}"/>')
    said = list(says or (f'{label}: {value:.3g}' for label, value in zip(labels, after)))
    return Chart(_svg(''.join(shapes), len(labels), HEIGHT), said, len(labels), top=top_name or amount(highest),
                 bottom='0', segments=segments(labels))


def matrix(rows: Sequence[str], labels: Sequence[str], values: Sequence[Sequence[float]], what: str) -> Chart:
    '''A cell for each row and label, the stronger in colour the larger its share; the largest has the full colour.'''
    cells, says = [], []
    highest = max((value for line in values for value in line), default=0.0) or 1.0
    for y, (row, line) in enumerate(zip(rows, values)):
        for x, (label, value) in enumerate(zip(labels, line)):
            says.append(f'{row}, {label}: {value:.0%} {what}')
            if value > 0:
                cells.append(f'<path class="gone" opacity="{value / highest:.2f}" '
                             f'd="M{x + 0.04:g} {y + 0.06:g}h.92v.88h-.92z"/>')
    return Chart(_svg(''.join(cells), len(labels), len(rows)), says, len(labels), len(rows), segments=segments(labels),
                 names=list(rows))


@dataclass(frozen=True)
class Line:
    '''One curve: points of (x, y, spread), x descending.'''

    name: str
    points: list[tuple[float, float, float]]


def lines(curves: Sequence[Line], original: float) -> tuple[Chart, list[tuple[str, int]]]:
    '''Curves over a common axis that falls from left to right, with bands of spread; and a legend.'''
    drawn = [line for line in curves if line.points]
    xs = sorted({x for line in drawn for x, _, _ in line.points}, reverse=True)
    ends = [y + sign * spread for line in drawn for _, y, spread in line.points for sign in (-1, 1)] + [original]
    high, low = max(ends), min(ends)
    margin = 0.04 * ((high - low) or 1.0)
    high, low = high + margin, low - margin
    width = (xs[0] - xs[-1]) or 1.0

    def across(x: float) -> float:
        return 1 + 98 * (xs[0] - x) / width

    def at(x: float, y: float) -> str:
        return f'{across(x):.2f} {HEIGHT * (high - y) / (high - low):.2f}'

    shapes = [f'<path class="original" d="M{at(xs[0], original)}L{at(xs[-1], original)}"/>']
    for number, line in enumerate(drawn):
        style = f's{number % 8}'
        if any(spread for _, _, spread in line.points):
            band = [at(x, y + spread) for x, y, spread in line.points]
            band += [at(x, y - spread) for x, y, spread in reversed(line.points)]
            shapes.append(f'<path class="band {style}" d="M{"L".join(band)}z"/>')
        places = [at(x, y) for x, y, _ in line.points]
        shapes.append(f'<path class="line {style}" d="M{"L".join(places)}"/>')
        shapes.append(f'<path class="dot {style}" d="{"".join(f"M{place}h0" for place in places)}"/>')
    says = []
    for x in xs:
        here = [(y, f'{line.name} {y:.4g}' + f' ± {spread:.2g}' * bool(spread))
                for line in drawn for other, y, spread in line.points if other == x]
        says.append(f'{x:.1%} left: ' + '; '.join(text for _, text in sorted(here, key=lambda item: -item[0])))
    chart = Chart(_svg(''.join(shapes), 100, HEIGHT), says, len(xs), top=f'{high - margin:.3g}',
                  bottom=f'{low + margin:.3g}', segments=[(f'{xs[0]:.0%} left', 1), (f'{xs[-1]:.0%} left', 1)],
                  spots=[round(across(x), 2) for x in xs])
    return chart, [(line.name, number % 8) for number, line in enumerate(drawn)]


def segments(labels: Sequence[str]) -> list[tuple[str, int]]:
    '''Runs of labels of one part of the network: the part, and how many there are.'''
    return [(part, len(list(run))) for part, run in groupby(label.split('.')[0] for label in labels)]


def amount(value: float) -> str:
    '''A number in few characters: 1.2 k, 34 M.'''
    for power, letter in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if abs(value) >= power:
            return f'{value / power:.3g} {letter}'
    return f'{value:.3g}'


def _svg(shapes: str, width: float, height: float) -> Markup:
    return Markup(f'<svg viewBox="0 0 {width:g} {height:g}" preserveAspectRatio="none" aria-hidden="true" '
                  f'focusable="false">{shapes}</svg>')

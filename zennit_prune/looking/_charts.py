'''Charts as SVG, from numbers alone; the page supplies the colours and the text around them.

A chart is stretched to the width of the page, so it holds shapes only. The texts of its points are a list, from which
the page shows that of the point under the pointer, or of the one that the arrow keys reach.
'''
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

HEIGHT = 100
FINEST = 192  # bars in a ranking: of more channels than that, several share one


class Markup(str):
    '''Text that is HTML already; templates leave it as it is.'''

    def __html__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Chart:
    '''A drawing as SVG, and a text for each of its points.

    Attributes
    ----------
    svg: Markup
        The drawing.
    says: list of str
        The text of each point, row by row.
    columns, rows: int
        The number of points along each side of the drawing.
    top, bottom: str
        The labels of the upper and the lower edge.
    segments: list of (str, int)
        The labels below, and the number of columns that each spans.
    names: list of str
        The labels of the rows.
    spots: list of float
        The positions of points from left to right in per cent, if they do not divide the drawing evenly.
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


def ranking(scores: Sequence[float], removed: Sequence[bool]) -> Chart:
    '''Draw the scores of a group's channels in ascending order, those to be removed in another colour, and the cut.

    Heights are square roots, signs kept, so that small scores can be seen beside large ones.
    '''
    order = sorted(range(len(scores)), key=lambda position: scores[position])
    says = [f'channel {position}: {scores[position]:.3g}, {"removed" if removed[position] else "kept"}'
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
        height = math.copysign(max(abs(height), 1.0), height)  # so that a channel without relevance is visible
        mostly_removed = 2 * sum(removed[position] for position in order[start:end]) >= end - start
        paths[mostly_removed].append(f'M{index} {zero:.1f}v{-height:.1f}h1v{height:.1f}z')
    shapes = ''.join(f'<path class="{name}" d="{"".join(paths[kind])}"/>'
                     for kind, name in ((False, 'kept'), (True, 'gone')) if paths[kind])
    cut = sum(removed)
    if 0 < cut < len(order) and all(removed[position] for position in order[:cut]):
        at = cut / len(order) * bins
        shapes += f'<path class="cut" d="M{at:.2f} 0V{HEIGHT}"/>'
    return Chart(_svg(shapes, bins, HEIGHT), says, len(order), top=f'{max(scores):.2g}')


def columns(labels: Sequence[str], after: Sequence[float], before: Sequence[float] | None = None,
            says: Sequence[str] | None = None, top: float | None = None, top_name: str = '') -> Chart:
    '''Draw a column for each label, in front of a paler one for the value before pruning.'''
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
    '''Draw a cell for each row and label, with an opacity in proportion to its value.'''
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
    '''A curve: points of (x, y, spread), x descending.'''

    name: str
    points: list[tuple[float, float, float]]


def lines(curves: Sequence[Line], original: float) -> tuple[Chart, list[tuple[str, int]]]:
    '''Draw curves over a common axis that descends from left to right, with bands of spread, and return the legend.'''
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
    '''Return runs of labels that share their first name, each as this name and the number of labels.'''
    return [(part, len(list(run))) for part, run in groupby(label.split('.')[0] for label in labels)]


def amount(value: float) -> str:
    '''Write a number in few characters: 1.2 k, 34 M.'''
    for power, letter in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if abs(value) >= power:
            return f'{value / power:.3g} {letter}'
    return f'{value:.3g}'


def _svg(shapes: str, width: float, height: float) -> Markup:
    '''Return an SVG drawing of some shapes.'''
    return Markup(f'<svg viewBox="0 0 {width:g} {height:g}" preserveAspectRatio="none" aria-hidden="true" '
                  f'focusable="false">{shapes}</svg>')

'''``Sweep``: what pruning to several budgets cost and kept, as a table, a file or a picture.'''
from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from .cost import UNIT_NAMES
from .errors import PruneError
from .files import check_folder, write_text
from .plots import needed
from .tables import table

FORMAT = 'zennit_prune sweep'
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000', '#999999')
STYLES = ('-', '--', ':', '-.')
MARKERS = 'os^Dv*'


class Cell(NamedTuple):
    '''One combination.'''

    criterion: str
    repair: str
    seed: int
    budget: float


@dataclass(frozen=True)
class Row:
    '''What came of one combination.

    Attributes
    ----------
    criterion, repair, seed:
        What was done.
    budget: float
        The value of the budget.
    left: float or None
        What is really left of the original, in the budget's unit; seconds are measured side by side.
    value: float or None
        What ``evaluate`` returned.
    seconds: float
        What collecting, choosing, pruning and repairing took, for this row if it were alone; evaluation is left out.
    error: str
        Why there is no value.
    '''

    criterion: str
    repair: str
    seed: int
    budget: float
    left: float | None
    value: float | None
    seconds: float
    error: str = ''

    @property
    def cell(self) -> Cell:
        '''The combination.'''
        return Cell(self.criterion, self.repair, self.seed, self.budget)


class Point(NamedTuple):
    '''Mean and standard deviation over the seeds that have a value; ``total`` is how many there are.'''

    left: float
    mean: float
    spread: float
    seeds: int
    total: int


class Sweep:
    '''Accuracy over budget, by criterion, repair and seed; made by :func:`zennit_prune.sweep`.

    Attributes
    ----------
    unit: str
        What the budgets were given as, e.g. ``'flops'``.
    original: float
        What ``evaluate`` returned for the network as it is.
    rows: tuple of Row
        In the order in which they were finished.
    settings: dict
        The call, as JSON values.
    '''

    def __init__(self, unit: str, original: float, rows: Iterable[Row] = (), settings: Mapping[str, Any] | None = None):
        self.unit, self.original, self.rows = unit, original, tuple(rows)
        self.settings: dict[str, Any] = dict(settings or {})

    @property
    def evaluated(self) -> str:
        '''What the function that evaluated is called.'''
        return str(self.settings.get('evaluate', 'value')).split(' (')[0].strip('<>')

    def curves(self) -> dict[tuple[str, str], dict[float, Point]]:
        '''By criterion and repair, then by budget, descending: means over the seeds.'''
        found: dict[tuple[str, str], dict[float, list[Row]]] = {}
        for row in sorted(self.rows, key=lambda row: -row.budget):
            found.setdefault((row.criterion, row.repair), {}).setdefault(row.budget, []).append(row)
        order = list(dict.fromkeys((row.criterion, row.repair) for row in self.rows))
        return {key: {budget: _point(rows) for budget, rows in found[key].items()} for key in order}

    def table(self) -> str:
        '''Means and standard deviations over seeds; a column for each budget.'''
        curves = self.curves()
        budgets = sorted({row.budget for row in self.rows}, reverse=True)
        rows = [(criterion, repair, *(_written(points.get(budget)) for budget in budgets))
                for (criterion, repair), points in curves.items()]
        header = ('criterion', 'repair', *(f'{self.unit}={budget:.12g}' for budget in budgets))
        seeds = len({row.seed for row in self.rows})
        notes = [f'original: {self.original:.4g}' + f'; mean and standard deviation over {seeds} seeds' * (seeds > 1)]
        reasons: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.error:
                reasons.setdefault(row.error, []).append(row)
        notes += [f'{len(failed)} without a value ({failed[0].criterion}, {failed[0].repair}, seed {failed[0].seed}, '
                  f'{self.unit}={failed[0].budget:.12g}): {reason}' for reason, failed in reasons.items()]
        return '\n'.join([table(header, rows), '', *notes])

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        failed = sum(bool(row.error) for row in self.rows)
        return f'Sweep({len(self.rows)} rows over {self.unit}' + f', {failed} without a value' * bool(failed) + ')'

    # files
    def save(self, path: str | os.PathLike[str]) -> None:
        '''Write everything as JSON.'''
        write_text(path, json.dumps({'format': FORMAT, 'version': 1, 'unit': self.unit, 'original': self.original,
                                     'settings': self.settings, 'rows': [asdict(row) for row in self.rows]},
                                    indent=1) + '\n')

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sweep:
        '''Read what :meth:`save` wrote, or a checkpoint.

        Raises
        ------
        PruneError
            If the file is something else.
        '''
        try:
            data = json.loads(Path(path).read_text())
            if data['format'] != FORMAT or data['version'] != 1:
                raise ValueError(f'its format is {data["format"]!r}, version {data["version"]!r}')
            return cls(str(data['unit']), float(data['original']), [Row(**row) for row in data['rows']],
                       data['settings'])
        except (KeyError, TypeError, ValueError) as error:
            raise PruneError(f'{os.fspath(path)!r} is no {FORMAT}, version 1: {error}.') from error

    # looking
    def plot(self, path: str | os.PathLike[str]) -> None:
        '''Draw value over what is left: a line for each criterion and repair, the spread over seeds as a band.

        Parameters
        ----------
        path: path-like
            The picture; its suffix says what kind, e.g. ``.png`` or ``.svg``.

        Raises
        ------
        PruneError
            Without matplotlib, or if there is no value.
        '''
        Figure = needed('matplotlib.figure', 'plot', 'plot()').Figure
        check_folder(path)
        curves = {key: [point for point in points.values() if point.seeds] for key, points in self.curves().items()}
        if not any(curves.values()):
            raise PruneError('there is nothing to plot: no row has a value. Print the sweep for the reasons.')
        criteria, repairs = (list(dict.fromkeys(names)) for names in zip(*curves))
        figure = Figure(figsize=(7.5, 4.5), layout='constrained')
        axes = figure.add_subplot()
        axes.axhline(self.original, color='0.6', linewidth=1, label='original')
        for (criterion, repair), points in curves.items():
            if not points:
                continue
            which = criteria.index(criterion)
            colour = COLOURS[which % len(COLOURS)]
            left, mean, spread = ([getattr(point, name) for point in points] for name in ('left', 'mean', 'spread'))
            label = criterion if repairs == ['none'] else f'{criterion}, {repair}'
            axes.plot(left, mean, color=colour, linestyle=STYLES[repairs.index(repair) % len(STYLES)],
                      marker=MARKERS[which % len(MARKERS)], markersize=4, linewidth=1.6, label=label)
            axes.fill_between(left, [m - s for m, s in zip(mean, spread)], [m + s for m, s in zip(mean, spread)],
                              color=colour, alpha=0.15, linewidth=0)
        axes.invert_xaxis()
        axes.xaxis.set_major_formatter(lambda value, _: f'{value:.0%}')
        unit = self.unit.removesuffix('_fraction')
        axes.set_xlabel(f'{UNIT_NAMES.get(unit, unit)} left')
        axes.set_ylabel(self.evaluated)
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(axis='y', color='0.9', linewidth=0.8)
        axes.set_axisbelow(True)
        figure.legend(*axes.get_legend_handles_labels(), loc='outside right center', frameon=False)
        figure.savefig(path, dpi=150)


def _point(rows: list[Row]) -> Point:
    good = [row for row in rows if row.value is not None and row.left is not None]
    values = [row.value for row in good if row.value is not None]
    if not values:
        return Point(math.nan, math.nan, math.nan, 0, len(rows))
    return Point(fmean(row.left for row in good if row.left is not None), fmean(values),
                 stdev(values) if len(values) > 1 else 0.0, len(values), len(rows))


def _written(point: Point | None) -> str:
    if point is None or not point.seeds:
        return '-'
    text = f'{point.mean:.4g}' + f' ± {point.spread:.2g}' * (point.total > 1 and point.seeds > 1)
    return text + f' ({point.seeds} of {point.total})' * (point.seeds < point.total)

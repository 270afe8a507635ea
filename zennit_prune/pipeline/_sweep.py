'''Prune by several criteria to several budgets, repair in several ways, and evaluate; ``Sweep`` holds the results.'''
from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Generic, NamedTuple, TypeVar

from torch import nn
from tqdm.auto import tqdm

from ..errors import PruneError, check_names, options_for, options_of, shown
from ..planning._allocate import check_limits
from ..planning._cost import UNIT_NAMES, Budget
from ..planning._plan import Plan
from ..relevance._relevance import Relevance
from ..repairs._repair import checked_method, repaired
from ..util._display import finished, new_figure, table
from ..util._files import check_folder, write_text
from ..util._fingerprint import ATOMIC, described, fingerprint, named
from ..util._isolation import seeded
from ..util._networks import copied, device_of, tensors_by_module
from ._options import AnyCriterion, check_criterion, check_scoring, takes_options
from ._pruner import Pruner
from ._result import evaluated
from ._step import shares_left

FORMAT = 'zennit_prune sweep'
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000', '#999999')
STYLES = ('-', '--', ':', '-.')
MARKERS = 'os^Dv*'


class Cell(NamedTuple):
    '''A combination of criterion, repair, seed and budget.'''

    criterion: str
    repair: str
    seed: int
    budget: float


@dataclass(frozen=True)
class Row:
    '''The result of one combination of criterion, repair, seed and budget.

    Attributes
    ----------
    criterion, repair: str
        The criterion, and the method of repair.
    seed: int
        The seed.
    budget: float
        The value of the budget.
    left: float or None
        The share of the original that is really left, in the budget's unit; seconds are measured side by side.
    value: float or None
        The number that ``evaluate`` returned.
    seconds: float
        The duration of collecting, planning, pruning and repairing for this row if it were alone, without evaluation.
    error: str
        The reason why there is no value.
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
        '''The combination that the row is for.'''
        return Cell(self.criterion, self.repair, self.seed, self.budget)


class Point(NamedTuple):
    '''The mean and standard deviation over the ``seeds`` that have a value, of ``total``.'''

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
        The keyword of the budgets, e.g. ``'flops'``.
    original: float
        The number that ``evaluate`` returned for the original network.
    rows: tuple of Row
        One for each combination, in the order in which they were finished.
    settings: dict
        The call, as JSON values.

    Examples
    --------
    >>> import zennit_prune as zp
    >>> from zennit_prune.pipeline import Sweep
    >>> from zennit_prune.pipeline._sweep import Row
    >>> print(Sweep('flops', 0.9, [Row('l1', 'none', 0, 0.5, 0.49, 0.8, 1.0)]))
    criterion  repair  flops=0.5
    ---------  ------  ---------
    l1         none    0.8
    <BLANKLINE>
    original: 0.9
    '''

    def __init__(self, unit: str, original: float, rows: Iterable[Row] = (), settings: Mapping[str, Any] | None = None):
        self.unit, self.original, self.rows = unit, original, tuple(rows)
        self.settings: dict[str, Any] = dict(settings or {})

    @property
    def evaluated(self) -> str:
        '''The name of the function that evaluated.'''
        return str(self.settings.get('evaluate', 'value')).split(' (')[0].strip('<>')

    def curves(self) -> dict[tuple[str, str], dict[float, Point]]:
        '''Return the means over the seeds, by criterion and repair, then by budget in descending order.

        Returns
        -------
        dict of (str, str) to dict of float to Point
            For each criterion and repair, by the value of the budget: ``.left``, the share that is left, ``.mean`` and
            ``.spread``, mean and standard deviation of the evaluation, ``.seeds``, the number of seeds with a value,
            and ``.total``, the number of seeds.

        Examples
        --------
        >>> from zennit_prune.pipeline import Sweep
        >>> from zennit_prune.pipeline._sweep import Row
        >>> found = Sweep('flops', 0.9, [Row('l1', 'none', seed, 0.5, 0.49, 0.8, 1.0) for seed in (0, 1)])
        >>> found.curves()
        {('l1', 'none'): {0.5: Point(left=0.49, mean=0.8, spread=0.0, seeds=2, total=2)}}
        '''
        found: dict[tuple[str, str], dict[float, list[Row]]] = {}
        for row in sorted(self.rows, key=lambda row: -row.budget):
            found.setdefault((row.criterion, row.repair), {}).setdefault(row.budget, []).append(row)
        order = list(dict.fromkeys((row.criterion, row.repair) for row in self.rows))
        return {key: {budget: _point(rows) for budget, rows in found[key].items()} for key in order}

    def table(self) -> str:
        '''Return a table of means and standard deviations over the seeds, with a column for each budget.

        Returns
        -------
        str
            The lines of the table, and below it the evaluation of the original and the reasons of missing values.

        Examples
        --------
        >>> from zennit_prune.pipeline import Sweep
        >>> from zennit_prune.pipeline._sweep import Row
        >>> rows = [Row('l1', 'none', 0, budget, budget, value, 1.0) for budget, value in ((0.7, 0.85), (0.5, 0.8))]
        >>> print(Sweep('flops', 0.9, rows).table())
        criterion  repair  flops=0.7  flops=0.5
        ---------  ------  ---------  ---------
        l1         none    0.85       0.8
        <BLANKLINE>
        original: 0.9
        '''
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
        '''Write everything as JSON.

        Parameters
        ----------
        path: path-like
            The file; it appears when it is complete.

        Examples
        --------
        >>> import tempfile
        >>> from zennit_prune.pipeline import Sweep
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Sweep('flops', 0.9).save(f'{folder}/sweep.json')
        ...     Sweep.load(f'{folder}/sweep.json').original
        0.9
        '''
        write_text(path, json.dumps({'format': FORMAT, 'version': 1, 'unit': self.unit, 'original': self.original,
                                     'settings': self.settings, 'rows': [asdict(row) for row in self.rows]},
                                    indent=1) + '\n')

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sweep:
        '''Read a sweep that :meth:`save` wrote, or a checkpoint.

        Parameters
        ----------
        path: path-like
            The file.

        Returns
        -------
        Sweep
            The sweep; of a checkpoint, with the rows that were finished.

        Raises
        ------
        PruneError
            If the file is something else.

        Examples
        --------
        >>> import tempfile
        >>> from zennit_prune.pipeline import Sweep
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Sweep('flops', 0.9).save(f'{folder}/sweep.json')
        ...     Sweep.load(f'{folder}/sweep.json')
        Sweep(0 rows over flops)
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
    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        '''Draw the evaluation over the share that is left: a line for each criterion and repair, a band for the spread.

        Parameters
        ----------
        path: path-like, optional
            An image file to write; its suffix says of which kind, e.g. ``.png`` or ``.svg``.

        Returns
        -------
        matplotlib.figure.Figure
            The figure, with a legend of criteria and repairs.

        Raises
        ------
        PruneError
            If matplotlib is not installed, the folder of ``path`` does not exist, or no row has a value.

        Examples
        --------
        >>> from zennit_prune.pipeline import Sweep
        >>> from zennit_prune.pipeline._sweep import Row
        >>> figure = Sweep('flops', 0.9, [Row('l1', 'none', 0, 0.5, 0.49, 0.8, 1.0)]).plot()
        >>> figure.axes[0].get_xlabel()
        'FLOPs left'
        '''
        figure = new_figure(path, (7.5, 4.5))
        curves = {key: [point for point in points.values() if point.seeds] for key, points in self.curves().items()}
        if not any(curves.values()):
            raise PruneError('there is nothing to plot: no row has a value. Print the sweep for the reasons.')
        criteria, repairs = (list(dict.fromkeys(names)) for names in zip(*curves))
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
        axes.grid(axis='y', color='0.9', linewidth=0.8)
        axes.set_axisbelow(True)
        figure.legend(*axes.get_legend_handles_labels(), loc='outside right center', frameon=False)
        return finished(figure, [axes], path)


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


ORDER = 'sweep(pruner, loader, evaluate, budgets, criteria)'
Result = TypeVar('Result')


@takes_options()
def sweep(pruner: Pruner, loader: Any, evaluate: Callable[[nn.Module], float], budgets: Sequence[Budget],
          criteria: Sequence[AnyCriterion] | Mapping[str, AnyCriterion | Relevance], repairs: Sequence[str] = ('none',),
          seeds: Sequence[int] = (0,), checkpoint: str | os.PathLike[str] | None = None, progress: bool | None = None,
          *, collect: Mapping[str, Any] | None = None, plan: Mapping[str, Any] | None = None) -> Sweep:
    '''Measure accuracy over budget, for every criterion, repair and seed.

    Parameters
    ----------
    pruner: Pruner
        The network and its rules.
    loader: iterable or callable
        Reference data, for criteria and repairs; or a function of the seed that returns them: draws of references.
    evaluate: callable
        Takes a network and returns a number, more is better: the accuracy on test data, say. It is given a copy, which
        it may train on.
    budgets: sequence of Budget
        All in one unit.
    criteria: sequence or mapping
        As for :meth:`Pruner.collect`: names and functions; or a mapping of names to such, or to relevance that is there
        already. Relevance is collected once for each criterion and seed. Include ``'random'``.
    repairs: sequence of str
        Methods of :func:`zennit_prune.repair`, or ``'none'``.
    seeds: sequence of int
        Passed to criteria, and to ``loader`` if it is a function; what a loader shuffles depends on it alone.
    checkpoint: path-like, optional
        A file that always holds what is finished; the same call goes on from there. By what a network, a criterion or
        an option holds, and by the code of functions, it is known whether the call is the same; data are not compared.
    progress: bool, optional
        Show a progress bar on standard error; as the pruner unless given.
    collect, plan: mapping, optional
        Further options of :meth:`Pruner.collect` and :meth:`Pruner.plan`, e.g. ``plan={'round_to': 8}``.

    Returns
    -------
    Sweep
        Where pruning fails (a budget out of reach, a criterion that says nothing about this network), a row has the
        reason in place of a value, and the others go on.

    Raises
    ------
    PruneError
        For nothing to do, something given twice, an unknown name, budgets of several units, or a checkpoint of another
        sweep.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import zennit_prune as zp
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    >>> pruner = zp.Pruner(model, None, torch.ones(1, 3, 8, 8), progress=False)
    >>> found = zp.sweep(pruner, (), lambda network: network[0].out_channels,
    ...                  [zp.Budget(channels=0.75), zp.Budget(channels=0.5)], ['l1', 'random'])
    >>> [(row.criterion, row.budget, row.value) for row in found.rows]
    [('l1', 0.75, 3.0), ('l1', 0.5, 2.0), ('random', 0.75, 3.0), ('random', 0.5, 2.0)]
    '''
    if not isinstance(pruner, Pruner):
        raise PruneError(f'a Pruner is needed, not {shown(pruner)}: call {ORDER}.')
    if not callable(evaluate):
        raise PruneError(f'evaluate={shown(evaluate)} is no function: call {ORDER}, with a function from a network to '
                         'a number, the higher the better.')
    collect, plan = dict(collect or {}), dict(plan or {})
    for called, given, options in (('sweep: collect', collect, options_of(Pruner.collect)),
                                   ('sweep: plan', plan, options_of(Pruner.plan))):
        check_names(called, given, [name for name in options if name != 'criterion'])
    if not isinstance(criteria, Mapping):
        names = _several('criteria', criteria, named)
        criteria = dict(zip(names, criteria))
    _several('criteria', criteria)
    _several('repairs', repairs)
    for one in criteria.values():
        if not isinstance(one, Relevance):
            check_criterion(one)
    for method in repairs:
        checked_method(method, 'repairs')
    check_scoring('relevance', **collect)
    check_limits(**options_for(check_limits, plan))
    _several('seeds', seeds)
    _several('budgets', budgets)
    seeds = list(map(int, seeds))
    units = {budget.name if isinstance(budget, Budget) else repr(budget) for budget in budgets}
    if len(units) > 1 or not isinstance(budgets[0], Budget):
        raise PruneError(f'budgets are in one unit, e.g. [Budget(flops=0.8), Budget(flops=0.5)]; these are in '
                         f'{", ".join(sorted(units))}.')
    if isinstance(loader, Iterator):
        loader = list(loader)  # it is gone through more than once
    settings = {
        'network': fingerprint(dict(tensors_by_module(pruner.model))), 'rules': described(pruner.composite),
        'groups': {group.name: group.size for group in pruner.graph.groups},
        'criteria': {name: _known(criterion) for name, criterion in criteria.items()}, 'repairs': list(repairs),
        'seeds': seeds, 'budgets': [repr(budget) for budget in budgets], 'loader': _known(loader),
        'evaluate': _known(evaluate), 'options': {key: described(value) for key, value in
                                                  {**pruner._defaults, **collect, **plan}.items()},
    }
    done = _begun(checkpoint, settings)
    if done is None:
        done = Sweep(units.pop(), _value(evaluate, copied(pruner.model)), (), settings)
    finished = {row.cell for row in done.rows}
    with tqdm(desc='sweep', total=len(seeds) * len(criteria) * len(budgets) * len(repairs), initial=len(finished),
              disable=not pruner._shows(progress), leave=False) as bar:
        for row in _rows(pruner, loader, evaluate, budgets, criteria, repairs, seeds, finished, collect, plan):
            done = Sweep(done.unit, done.original, (*done.rows, row), settings)
            if checkpoint is not None:
                done.save(checkpoint)
            bar.update()
    return done


class Attempt(Generic[Result]):
    '''A result, or the reason why there is none, and the seconds spent on it.'''

    def __init__(self, work: Callable[..., Result], *arguments: Any):
        start = time.perf_counter()
        self.error: PruneError | None = None
        try:
            self._result = work(*arguments)
        except PruneError as error:
            self.error = error
        self.seconds = time.perf_counter() - start

    def result(self) -> Result:
        '''Return the result, or raise the error that kept it from being computed.'''
        if self.error is not None:
            raise self.error
        return self._result


def _rows(pruner: Pruner, loader: Any, evaluate: Callable[[nn.Module], float], budgets: Sequence[Budget],
          criteria: Mapping[str, AnyCriterion | Relevance], repairs: Sequence[str], seeds: Sequence[int],
          finished: Collection[Cell], collect: Mapping[str, Any], plan: Mapping[str, Any]) -> Iterator[Row]:
    '''Yield the rows that are missing; relevance, and a network before its repairs, are computed once for them.'''
    def missing(seed: int, criterion: str, some: Sequence[Budget]) -> list[Cell]:
        cells = [Cell(criterion, method, seed, budget.value) for budget in some for method in repairs]
        return [cell for cell in cells if cell not in finished]

    def collected(given: AnyCriterion | Relevance, data: Any, seed: int) -> Relevance:
        if isinstance(given, Relevance):
            return given
        with seeded(seed, device_of(pruner.model)):
            return pruner.collect(data, given, **{'seed': seed, 'progress': False, **collect})

    def pruned(relevance: Attempt[Relevance], budget: Budget) -> tuple[Plan, nn.Module]:
        chosen = pruner.plan(relevance.result(), budget, **{'progress': False, **plan})
        return chosen, chosen.apply(pruner.model, progress=False)

    def mended(small: Attempt[tuple[Plan, nn.Module]], data: Any, method: str, seed: int) -> nn.Module:
        chosen, network = small.result()
        if method == 'none':
            return copied(network)  # evaluate may train it on
        with seeded(seed, device_of(pruner.model)):
            return repaired(pruner.model, network, chosen, data, method, False)

    for seed in seeds:
        data = loader
        if callable(loader) and any(missing(seed, criterion, budgets) for criterion in criteria):
            with seeded(seed, device_of(pruner.model)):
                data = loader(seed)
            data = list(data) if isinstance(data, Iterator) else data
        for criterion, given in criteria.items():
            if not missing(seed, criterion, budgets):
                continue
            relevance = Attempt(collected, given, data, seed)
            for budget in budgets:
                if not missing(seed, criterion, [budget]):
                    continue
                small = Attempt(pruned, relevance, budget)
                for cell in missing(seed, criterion, [budget]):
                    network = Attempt(mended, small, data, cell.repair, seed)
                    value = Attempt(lambda network: _value(evaluate, network.result()), network)
                    left = None if small.error else _left(small.result()[0], budget)
                    yield Row(*cell, left, None if value.error else value.result(),
                              relevance.seconds + small.seconds + network.seconds, str(value.error or ''))


def _left(plan: Plan, budget: Budget) -> float:
    '''Return the share of the network that a plan leaves.'''
    if plan.timing is not None:
        return plan.timing.left
    return shares_left(plan)[budget.unit]


def _value(evaluate: Callable[[nn.Module], float], network: nn.Module) -> float:
    value = evaluated(evaluate, network)
    if not math.isfinite(value):
        raise PruneError(f'evaluate returned {value}: it must return a finite number.')
    return value


def _several(what: str, given: Any, name: Callable[[Any], str] = repr) -> list[str]:
    '''Return the names of what is given, at least one and each once.'''
    if isinstance(given, str) or not isinstance(given, Collection) or not given:
        raise PruneError(f'{what}={given!r}: give a list of at least one.')
    names = [name(item) for item in given]
    twice = next((one for one in names if names.count(one) > 1), None)
    if twice is not None:
        raise PruneError(f'{what}: {twice} is given twice. Leave one out, or give criteria as a dict by other names.')
    return names


def _known(value: Any) -> Any:
    '''Return a name that identifies a part of the call; data that it holds or encloses do not count.'''
    if isinstance(value, ATOMIC):
        return value
    if isinstance(value, Relevance):
        return f'Relevance ({fingerprint(dict(value.items()))})'
    code = getattr(value, '__code__', None)
    return named(value) if code is None else f'{named(value)} ({fingerprint(code)})'


def _begun(checkpoint: str | os.PathLike[str] | None, settings: dict[str, Any]) -> Sweep | None:
    '''Return the sweep in a checkpoint, after a check that it is of the same call.'''
    if checkpoint is None:
        return None
    check_folder(checkpoint)
    if not os.path.exists(checkpoint):
        return None
    begun = Sweep.load(checkpoint)
    other = [key for key, value in settings.items() if begun.settings.get(key) != value]
    if other:
        key = other[0]
        raise PruneError(f'{os.fspath(checkpoint)!r} is of another sweep: its {key} was {begun.settings.get(key)!r}, '
                         f'here it is {settings[key]!r}. Give another file, or remove this one.')
    return begun

'''Measure the latency of a network, and predict that of its pruned versions from a table of measured operations.

FLOPs say little about seconds: a narrow convolution takes as long as a wider one, activations and launches count, too.
So every operation that shrinks with channels is timed on the device at hand, at several widths of its inputs and
outputs. Times are interpolated between these widths, constant below the smallest one, and never fall as an operation
becomes wider. The sum over the network is calibrated against the measured latency of the network as it is and with
three quarters, a half and a quarter of its channels: by one factor between operations in a network and alone, and by a
constant that pruning leaves.
'''
from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..errors import PruneError, names_options, shown, warn
from ..graph._graph import ChannelGraph
from ..tracing._labels import Labels
from ..tracing._trace import prepare_example
from ..util._display import table
from ..util._files import write_text
from ..util._networks import device_of, structural_copy, unwrapped
from ._cost import CostModel
from ._workload import Call, calls_of, device_name, medians, running, side_by_side

FORMAT = 'zennit_prune latencies'
LADDER = (0.125, 0.25, 0.5, 0.75)
NARROWED = (0.75, 0.5, 0.25)
ROUNDS = 30
TOLERANCE = 1.05  # a measured time may exceed the budget by so much, which is noise


@names_options()
def latency(model: nn.Module, example: Any, device: torch.device | str | None = None, repeats: int = 20) -> float:
    '''Measure the median time of a forward pass.

    Parameters
    ----------
    model: torch.nn.Module
        Any network; its training flag, device and gradients are left as they are.
    example: torch.Tensor, tuple or dict
        An input, a tuple of arguments, or a dict of keyword arguments; the time is that of its whole batch.
    device: torch.device or str, optional
        The device to measure on, by default that of the network; a copy is moved there.
    repeats: int
        The most measurements: after 5 seconds no further one begins, once there were three.

    Returns
    -------
    float
        Seconds.

    Raises
    ------
    PruneError
        If ``repeats`` is below 1, or ``device`` is none.

    Examples
    --------
    >>> import torch
    >>> import zennit_prune as zp
    >>> 0 < zp.latency(torch.nn.Linear(3, 4), torch.ones(2, 3)) < 1
    True
    '''
    model = unwrapped(model)
    if not isinstance(repeats, (int, np.integer)) or repeats < 1:
        raise PruneError(f'repeats={shown(repeats)}: measure at least once, a whole number of times.')
    try:
        device = None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise PruneError(f"device={shown(device)} is no device: give e.g. 'cpu' or 'cuda'.") from error
    given = prepare_example(model, example)
    if device is not None:
        model = structural_copy(model, 'real').to(device)
    return side_by_side([model], given, repeats)[0]


@dataclass(frozen=True, eq=False)
class Grid:
    '''The seconds of one operation by the share that is left of each of its axes.

    Attributes
    ----------
    shares: tuple of numpy.ndarray
        For each axis, the measured shares, ascending.
    seconds: numpy.ndarray
        The times, with one dimension for each axis.
    '''

    shares: tuple[npt.NDArray[np.float64], ...]
    seconds: npt.NDArray[np.float64]

    def __call__(self, left: Sequence[float] | npt.NDArray[np.float64]) -> float:
        '''Return the time, interpolated between the measured shares and constant outside.'''
        seconds = self.seconds
        for shares, share in zip(self.shares, left):
            above = min(max(int(np.searchsorted(shares, share)), 1), len(shares) - 1)
            below = max(above - 1, 0)
            width = shares[above] - shares[below] or 1.0
            part = min(max((share - shares[below]) / width, 0.0), 1.0)
            seconds = seconds[below] + part * (seconds[above] - seconds[below])
        return float(seconds)


class LatencyTable:
    '''The measured seconds of the operations of a network on a device, at several widths each.

    ``pruner.latencies()`` measures a table. With a saved one, equal scores and latency budgets give equal plans, also
    for a device that is not at hand.

    Parameters
    ----------
    device: str
        The name of the device.
    original: float
        The seconds of the whole network.
    scale: float
        The time of operations in the network, divided by their time alone.
    grids: mapping of str to Grid
        The times of each kind of operation.

    Examples
    --------
    >>> import torch
    >>> import zennit_prune as zp
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> latencies = zp.Pruner(model, None, torch.ones(2, 3)).latencies(seconds=0.1, progress=False)
    >>> latencies.original > 0, len(latencies.grids)
    (True, 3)
    '''

    def __init__(self, device: str, original: float, scale: float, grids: Mapping[str, Grid]):
        self.device, self.original, self.scale, self.grids = device, original, scale, dict(grids)

    def save(self, path: str | os.PathLike[str]) -> None:
        '''Write the table as JSON.

        Parameters
        ----------
        path: path-like
            The file; it appears when it is complete.

        Examples
        --------
        >>> import tempfile
        >>> from zennit_prune.planning import LatencyTable
        >>> latencies = LatencyTable('cpu, 1 thread', 0.001, 1.0, {})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     latencies.save(f'{folder}/latencies.json')
        ...     LatencyTable.load(f'{folder}/latencies.json')
        LatencyTable(0 operations on cpu, 1 thread, the network 1.000 ms)
        '''
        grids = {key: {'shares': [shares.tolist() for shares in grid.shares], 'seconds': grid.seconds.tolist()}
                 for key, grid in self.grids.items()}
        write_text(path, json.dumps({'format': FORMAT, 'version': 1, 'device': self.device, 'original': self.original,
                                     'scale': self.scale, 'grids': grids}, indent=1) + '\n')

    @classmethod
    @names_options()
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        '''Read a table that :meth:`save` wrote, on this device or another.

        Parameters
        ----------
        path: path-like
            The file.

        Returns
        -------
        LatencyTable
            The table as it was saved.

        Raises
        ------
        PruneError
            If the file is something else.

        Examples
        --------
        >>> import tempfile
        >>> from zennit_prune.planning import LatencyTable
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     LatencyTable('cpu, 1 thread', 0.001, 1.0, {}).save(f'{folder}/latencies.json')
        ...     LatencyTable.load(f'{folder}/latencies.json').device
        'cpu, 1 thread'
        '''
        name = repr(os.fspath(path))
        try:
            data = json.loads(Path(path).read_text())
            if data['format'] != FORMAT or data['version'] != 1:
                raise ValueError(f'its format is {data["format"]!r}, version {data["version"]!r}')
            grids = {}
            for key, grid in data['grids'].items():
                shares = tuple(np.array(shares, float) for shares in grid['shares'])
                seconds = np.array(grid['seconds'], float)
                if seconds.shape != tuple(map(len, shares)) or not (seconds >= 0).all():
                    raise ValueError(f'the times of {key!r} do not fit their widths')
                grids[key] = Grid(shares, seconds)
            return cls(data['device'], float(data['original']), float(data['scale']), grids)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PruneError(f'{name} is no table of latencies, version 1: {error}.') from error

    def __str__(self) -> str:
        rows = [(f'{grid.seconds.max() * 1e3:.4f}', f'{grid.seconds.min() * 1e3:.4f}', key)
                for key, grid in sorted(self.grids.items(), key=lambda item: -float(item[1].seconds.max()))]
        return '\n'.join([table(('ms', 'ms at the least width', 'operation'), rows), '',
                          f'the network on {self.device}: {self.original * 1e3:.3f} ms'])

    def __repr__(self) -> str:
        return f'LatencyTable({len(self.grids)} operations on {self.device}, the network {self.original * 1e3:.3f} ms)'


def check_table(latencies: object) -> None:
    '''Refuse anything but a table of latencies, or None.'''
    if latencies is not None and not isinstance(latencies, LatencyTable):
        raise PruneError(f'latencies={shown(latencies)} is no LatencyTable: give what pruner.latencies() returned, or '
                         'LatencyTable.load(path).')


class LatencyModel(CostModel):
    '''A :class:`CostModel` with one more unit, ``'latency'``, in seconds.

    Parameters
    ----------
    graph, model:
        The network, traced.
    latencies: LatencyTable, optional
        The table of its operations, measured here and now unless given.
    seconds: float
        The approximate duration of the measurement.
    progress: bool
        Show a progress bar on standard error.

    Raises
    ------
    PruneError
        If the table was measured for another network, or for inputs of other shapes.
    '''

    def __init__(self, graph: ChannelGraph, model: nn.Module, latencies: LatencyTable | None = None,
                 seconds: float = 30.0, progress: bool = True):
        check_table(latencies)
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or seconds < 0:
            raise PruneError(f'seconds={shown(seconds)}: give a number of seconds, from 0 on.')
        super().__init__(graph)
        self._first: dict[bytes, int] = {}
        calls = calls_of(graph, model, self._shrinking)
        self._calls = calls
        if latencies is None:
            latencies = self._measured(model, seconds, progress)
        missing = [call.key for call in calls if call.key not in latencies.grids]
        if missing:
            raise PruneError(f'the table of latencies ({latencies.device}) was measured for another network or input: '
                             f'it lacks {missing[0]!r}. Measure again: pruner.latencies().')
        self.latencies = latencies
        nothing = np.zeros(len(self.sizes))
        self._rest = latencies.original - latencies.scale * self._total(latencies.grids, nothing)

    def _shrinking(self, labels: Labels, dim: int) -> int:
        '''Return the number of an axis; it is the same for all that shrink by the same share, whatever is removed.'''
        axis = self._axis(labels, dim)
        share = np.round(self._multiplicity[axis] / self._lengths[axis], 9)
        return self._first.setdefault(share.tobytes(), axis) if axis else 0

    def _total(self, grids: Mapping[str, Grid], removed: npt.NDArray[np.float64]) -> float:
        left = self._left(removed)
        return sum(grids[call.key](call.shares(left)) for call in self._calls)

    def __call__(self, unit: str, removed: npt.NDArray[np.float64]) -> float:
        if unit != 'latency':
            return super().__call__(unit, removed)
        return self._rest + self.latencies.scale * self._total(self.latencies.grids, removed)

    def _saved(self, unit: str) -> npt.NDArray[np.float64]:
        if unit != 'latency':
            return super()._saved(unit)
        gone = np.maximum(self.sizes - 1, 1)
        whole = self(unit, np.zeros(len(gone)))  # seconds fall in steps: the mean over all channels is used
        return np.array([whole - self(unit, row) for row in np.diag(self.sizes - 1)]) / gone

    def _measured(self, model: nn.Module, seconds: float, progress: bool) -> LatencyTable:
        '''Time every kind of operation at every width, then the network at some.'''
        device = device_of(model)
        kinds = {call.key: call for call in self._calls}
        ladders = {key: _ladder(call, device) for key, call in kinds.items()}
        points = [(key, widths) for key, ladder in ladders.items() if ladder for widths in product(*ladder)]
        nothing = np.zeros(len(self.sizes))
        together = np.array([group.step for group in self.graph.groups])
        gone = [nothing, *(np.array([size - _odd(size * share) for size in self.sizes / together]) * together
                           for share in NARROWED)]
        networks = [model, *(self.graph._narrowed(model, {
            group.name: group.order_by_block(range(group.size))[:int(count)].tolist()
            for group, count in zip(self.graph.groups, counts) if count}) for counts in gone[1:])]
        with running(networks, self.graph._recording.example.fitted(model)) as runs:
            found = medians([*(partial(kinds[key].prepared, widths, device) for key, widths in points), *runs],
                            device, ROUNDS, seconds, 'latencies' if progress else None)
        grids, start = {}, 0
        for key, ladder in ladders.items():
            if not ladder:
                grids[key] = Grid((), np.array(0.0))
                continue
            shares = tuple(np.array(widths) / size for widths, size in zip(ladder, kinds[key].sizes))
            shape = tuple(map(len, ladder))
            times = np.array(found[start:start + math.prod(shape)]).reshape(shape)
            start += times.size
            for axis in range(times.ndim):
                times = np.maximum.accumulate(times, axis)
            grids[key] = Grid(shares, times)
        original, *narrow = found[len(points):]
        totals = [self._total(grids, counts) for counts in gone]
        saved = np.array([original - time for time in narrow])
        foretold = np.array([totals[0] - total for total in totals[1:]])
        scale = float(np.clip((saved @ foretold) / max(foretold @ foretold, 1e-30), 1e-3, original / totals[0]))
        return LatencyTable(device_name(device), original, scale, grids)


def _odd(width: float) -> int:
    '''Return an odd width, as plans leave most of them: kernels are fastest at multiples of eight.'''
    return max(1, (math.ceil(width) - 1) | 1)


def _ladder(call: Call, device: torch.device) -> list[list[int]]:
    '''Return the widths at which a call is timed, ascending; only the full width where it cannot be made narrower.'''
    ladder = [sorted({*(_odd(size * share) for share in LADDER), max(size - 1, 1), size}) for size in call.sizes]
    whole = [[size] for size in call.sizes]
    for rungs in (ladder, whole):
        try:
            with torch.no_grad():
                for widths in product(*({found[0], found[-1]} for found in rungs)):
                    call.prepared(widths, device)()
            return rungs
        except Exception:  # there are sizes among its arguments; or it is not what runs on this device
            continue
    return []


@dataclass(frozen=True)
class Timing:
    '''The predicted and the measured latency of a plan for a latency budget.

    Attributes
    ----------
    device: str
        The device of the table that the plan was made from.
    predicted: float
        The latency of the pruned network by the table, as a share of the original's.
    allowed: float
        The budget, as a share of the original's latency.
    original, pruned: float or None
        Seconds of both networks, as medians of interleaved measurements; None where the table is of another device.

    Examples
    --------
    >>> timing = zp.planning.Timing('cpu, 1 thread', predicted=0.48, allowed=0.5, original=0.004, pruned=0.002)
    >>> timing.left, timing.holds
    (0.5, True)
    '''

    device: str
    predicted: float
    allowed: float
    original: float | None = None
    pruned: float | None = None

    @property
    def left(self) -> float:
        '''The share of the original's latency as measured, or as predicted where it was not measured.'''
        return self.predicted if not self.original or not self.pruned else self.pruned / self.original

    @property
    def holds(self) -> bool:
        '''Whether the budget holds as measured, but for noise (5 %).'''
        return self.left <= TOLERANCE * self.allowed

    def __str__(self) -> str:
        said = f'predicted {self.predicted:.1%}, budget {self.allowed:.1%}'
        if self.original is None or self.pruned is None:
            return f'latency on {self.device}: {said}; not measured, for this is another device'
        before, after = (f'{seconds * 1e3:.3f} ms' for seconds in (self.original, self.pruned))
        return f'latency on {self.device}: {before} -> {after} measured side by side ({self.left:.1%} left; {said})'


def timed(costs: LatencyModel, model: nn.Module, removed: Mapping[str, Sequence[int]], limit: float) -> Timing:
    '''Measure the network without these channels beside the original; warn where that is above the limit.

    Parameters
    ----------
    costs, model:
        The network, and the predicted latency of its pruned versions.
    removed: mapping of str to sequence of int
        Positions by the name of the group.
    limit: float
        The budget in seconds.
    '''
    graph, device = costs.graph, costs.latencies.device
    counts = costs.counts(removed)
    whole = costs('latency', 0 * counts)
    shares = costs('latency', counts) / whole, limit / whole
    if device != device_name(device_of(model)):
        return Timing(device, *shares)
    networks = [model, graph._narrowed(model, removed)]
    timing = Timing(device, *shares, *side_by_side(networks, graph._recording.example.fitted(model)))
    if not timing.holds:
        warn(f'the plan misses its budget as measured: {timing}. Ask for less, or measure for longer: '
             'pruner.latencies(seconds=...).')
    return timing

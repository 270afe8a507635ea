'''Measured time: of a network, and of its pruned versions from a table of what its operations take when narrower.

FLOPs say little about seconds: a narrow convolution takes as long as a wider one, activations and launches count, too.
So every operation that shrinks with channels is timed on the device at hand, at a ladder of widths of what it reads and
of what it brings forth. Between those, times are interpolated, below the least they stay what they are there, and an
operation never gains from being wider. The sum over the network is calibrated against the measured time of the network
as it is and with a half and a quarter of its channels: one factor for what operations take in a network rather than
alone, and a rest that pruning leaves.
'''
from __future__ import annotations

import json
import math
import os
import warnings
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

from ..errors import PruneError, PruneWarning
from ..graph._graph import ChannelGraph
from ..tracing._example import prepare_example
from ..tracing._labels import Labels
from ..util._display import table
from ..util._files import write_text
from ..util._networks import device_of, structural_copy, unwrapped
from ._cost import CostModel
from ._workload import Call, calls_of, device_name, medians, running, side_by_side

FORMAT = 'zennit_prune latencies'
LADDER = (0.125, 0.25, 0.5, 0.75)
NARROWED = (0.75, 0.5, 0.25)
ROUNDS = 30
TOLERANCE = 1.05  # what noise may add to a measured time


def latency(model: nn.Module, example: Any, device: torch.device | str | None = None, repeats: int = 20) -> float:
    '''Measure the median time of a forward pass.

    Parameters
    ----------
    model: torch.nn.Module
        Any network; its training flag, device and gradients are left as they are.
    example: torch.Tensor, tuple or dict
        The input to time with; its batch size counts.
    device: torch.device or str, optional
        Where to measure, if not where the network is: a copy is moved there.
    repeats: int
        How often to measure.

    Returns
    -------
    float
        Seconds.
    '''
    model = unwrapped(model)
    if repeats < 1:
        raise PruneError(f'repeats={repeats!r}: measure at least once.')
    given = prepare_example(model, example)
    if device is not None:
        model = structural_copy(model, 'real').to(device)
    return side_by_side([model], given, repeats)[0]


@dataclass(frozen=True, eq=False)
class Grid:
    '''The seconds of one operation where so much is left of each of its axes, shares ascending.'''

    shares: tuple[npt.NDArray[np.float64], ...]
    seconds: npt.NDArray[np.float64]

    def __call__(self, left: Sequence[float] | npt.NDArray[np.float64]) -> float:
        '''Interpolated, and constant outside.'''
        seconds = self.seconds
        for shares, share in zip(self.shares, left):
            above = min(max(int(np.searchsorted(shares, share)), 1), len(shares) - 1)
            below = max(above - 1, 0)
            width = shares[above] - shares[below] or 1.0
            part = min(max((share - shares[below]) / width, 0.0), 1.0)
            seconds = seconds[below] + part * (seconds[above] - seconds[below])
        return float(seconds)


class LatencyTable:
    '''What the operations of a network take on a device, at a ladder of widths; printed, saved, and read again.

    Parameters
    ----------
    device: str
        Where it was measured.
    original: float
        The seconds of the whole network.
    scale: float
        What operations take in the network over what they take alone.
    grids: mapping of str to Grid
        For each kind of operation.
    '''

    def __init__(self, device: str, original: float, scale: float, grids: Mapping[str, Grid]):
        self.device, self.original, self.scale, self.grids = device, original, scale, dict(grids)

    def save(self, path: str | os.PathLike[str]) -> None:
        '''Write the table as JSON: with it, equal scores and budgets give equal plans.'''
        grids = {key: {'shares': [shares.tolist() for shares in grid.shares], 'seconds': grid.seconds.tolist()}
                 for key, grid in self.grids.items()}
        write_text(path, json.dumps({'format': FORMAT, 'version': 1, 'device': self.device, 'original': self.original,
                                     'scale': self.scale, 'grids': grids}, indent=1) + '\n')

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        '''Read what :meth:`save` wrote, here or on the device that counts.

        Raises
        ------
        PruneError
            If the file is something else.
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


class LatencyModel(CostModel):
    '''A :class:`CostModel` that also knows seconds, in the unit ``'latency'``.

    Parameters
    ----------
    graph, model:
        The network, traced.
    latencies: LatencyTable, optional
        What its operations take; measured here and now unless given.
    seconds: float
        About how long to measure.
    progress: bool
        Show a progress bar on standard error.

    Raises
    ------
    PruneError
        If the table was measured for another network, or for inputs of other shapes.
    '''

    def __init__(self, graph: ChannelGraph, model: nn.Module, latencies: LatencyTable | None = None,
                 seconds: float = 30.0, progress: bool = True):
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
        '''The number of a dimension; the same for all that shrink by the same share, whatever is removed.'''
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

    def savings(self, unit: str) -> npt.NDArray[np.float64]:
        '''What a channel of each group saves: the first, but in seconds, which fall in steps, on average over all.'''
        if unit != 'latency':
            return super().savings(unit)
        gone = np.maximum(self.sizes - 1, 1)
        whole = self(unit, np.zeros(len(gone)))
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
            group.name: group.in_turn(range(group.size))[:int(count)].tolist()
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
    '''A width as plans have it: kernels are at their best at multiples of eight, and most widths are none.'''
    return max(1, (math.ceil(width) - 1) | 1)


def _ladder(call: Call, device: torch.device) -> list[list[int]]:
    '''The widths at which a call is timed, ascending; the whole ones alone where it cannot be made narrower.'''
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
    '''A plan for a latency budget, measured.

    Attributes
    ----------
    device: str
        Whose table it was made from.
    predicted, allowed: float
        Shares of the original's time: what the table says of the pruned network, and the budget.
    original, pruned: float or None
        Seconds of both networks, measured side by side; None where the table is another device's.
    '''

    device: str
    predicted: float
    allowed: float
    original: float | None = None
    pruned: float | None = None

    @property
    def left(self) -> float:
        '''The share of the original's time, as measured; as predicted where it was not.'''
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
        The network, and what its table says.
    removed: mapping of str to sequence of int
        Positions by group.
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
        warnings.warn(f'the plan misses its budget as measured: {timing}. Ask for less, or measure for longer: '
                      'pruner.latencies(seconds=...).', PruneWarning, stacklevel=4)
    return timing

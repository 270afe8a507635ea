'''What a network costs: parameters, floating-point operations, bytes, seconds; and budgets in these units.'''
from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .errors import PruneError
from .graph import ChannelGraph
from .labels import Labels, first
from .networks import map_tensors, structural_copy, unique_tensors, unwrapped
from .trace import prepare_example
from .verify import evaluating

UNITS = ('flops', 'params', 'bytes', 'channels')


@dataclass(frozen=True)
class Cost:
    '''What a network costs.

    Attributes
    ----------
    params: int
        The number of parameters, each counted once.
    flops: int
        Floating-point operations of one sample: a multiplication and an addition are two. Convolutions, matrix products
        and attention are counted, as by ``torch.utils.flop_counter``.
    bytes: int
        The memory of parameters and buffers.
    '''

    params: int
    flops: int
    bytes: int

    def __str__(self) -> str:
        return f'{self.params:,} parameters, {self.flops:,} FLOPs per sample, {self.bytes:,} bytes'


def cost(model: nn.Module, example: Any) -> Cost:
    '''Count parameters, FLOPs of one sample and bytes, without computing anything (the network runs on meta tensors).

    Parameters
    ----------
    model: torch.nn.Module
        Any network; it is not touched.
    example: torch.Tensor, tuple or dict
        As for :func:`zennit_prune.trace`.

    Raises
    ------
    PruneError
        If the network does not run with the example.
    '''
    model = unwrapped(model)
    given = prepare_example(model, example)
    for given.device in ('meta', 'real'):
        network = structural_copy(model, given.device).eval()
        args, kwargs = given.arguments()
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                network(*args, **kwargs)
            break
        except Exception as error:
            if given.device == 'real':
                raise PruneError(f'the network does not run with the example given: {type(error).__name__}: '
                                 f'{error}') from error
            given.resize = False
    return Cost(params=sum(parameter.numel() for parameter in model.parameters()),
                flops=counter.get_total_flops() // given.batch,
                bytes=sum(tensor.numel() * tensor.element_size() for tensor in unique_tensors(model).values()))


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
        How often to measure, after three runs that are not.

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
    given.device = 'real'
    args, kwargs = given.arguments()
    if device is not None:
        args, kwargs = map_tensors(lambda tensor: tensor.to(device), (args, kwargs))
    on_cuda = any(tensor.is_cuda for tensor in model.parameters())
    seconds = []
    with torch.no_grad(), evaluating(model):
        for repeat in range(repeats + 3):
            start = time.perf_counter()
            model(*args, **kwargs)
            if on_cuda:
                torch.cuda.synchronize()
            if repeat >= 3:
                seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


class Budget:
    '''How much is to be left of a network, in one unit.

    Parameters
    ----------
    flops, params, bytes, channels: float or int
        Exactly one. A real number in (0, 1) is a fraction of the original; an integer above 1 is absolute, FLOPs per
        sample. ``channels`` counts the removable channels, the positions of all groups.

    Raises
    ------
    PruneError
        For no or several units, an unknown unit, or a value that is neither a fraction nor an absolute number.
    '''

    def __init__(self, **amount: float):
        units = ', '.join(f'{unit}=' for unit in UNITS)
        if len(amount) != 1 or next(iter(amount)) not in UNITS:
            raise PruneError(f'a budget has exactly one of {units} (given: {amount or "nothing"}), e.g. '
                             'Budget(flops=0.5).')
        (self.unit, self.value), = amount.items()
        value = self.value
        fraction = isinstance(value, (float, np.floating)) and 0 < value < 1
        absolute = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value > 1
        if not fraction and not absolute:
            raise PruneError(f'Budget({self.unit}={value!r}) says nothing: what is to be left is a fraction between 0 '
                             f'and 1, as in Budget({self.unit}=0.5), or a whole number above 1.')
        self.is_fraction = fraction

    def limit(self, whole: float) -> float:
        '''The amount that may be left of ``whole``.'''
        return float(self.value) * whole if self.is_fraction else float(self.value)

    def __repr__(self) -> str:
        return f'Budget({self.unit}={self.value!r})'


class CostModel:
    '''The cost of a pruned network as a function of how many channels each group loses; nothing is built.

    A parameter's size is the product of its dimensions, an operation's FLOPs are proportional to the dimensions it runs
    over; each dimension shrinks by a known number for every channel of a group.

    Parameters
    ----------
    graph: ChannelGraph
        The traced network.
    '''

    def __init__(self, graph: ChannelGraph):
        self._graph = graph
        self.sizes = np.array([group.size for group in graph.groups], float)
        self._axes: dict[bytes, int] = {}
        self._lengths: list[float] = [1.0]
        self._multiplicity: list[npt.NDArray[np.float64]] = [np.zeros(len(graph.groups))]
        self._order = np.full(len(graph.solution.group) + 1, -1)
        for number, group in enumerate(graph.groups):
            self._order[group.channels] = number
        terms: dict[str, list[tuple[float, list[int]]]] = {'params': [], 'bytes': [], 'flops': []}
        for name, size in graph.recording.sizes.items():
            axes = [self._axis(field.labels) for field in graph.recording.fields.get(name, [])]
            terms['bytes'].append((math.prod(size.shape) * size.bytes_each, axes))
            if size.is_parameter:
                terms['params'].append((math.prod(size.shape), axes))
        for operation in graph.recording.runs['eval'].operations:
            if operation.flops:
                axes = [self._axis(labels) for labels in operation.contracted[:1]]
                axes += [self._axis(field.labels, dim)
                         for fields in operation.outputs for field in fields for dim in field.dims]
                terms['flops'].append((operation.flops / graph.recording.example.batch, list(dict.fromkeys(axes))))
        self._terms = {unit: self._packed(found) for unit, found in terms.items()}

    def _axis(self, labels: Labels, dim: int | None = None) -> int:
        '''The number of a dimension with these labels; 0 where it never shrinks.'''
        groups = self._order[self._graph.solution.channel[labels]]
        if dim is not None:
            channels = self._graph.solution.channel[labels]
            if labels.shape[dim] > 1 and not (channels != first(channels, dim)).any():
                return 0
            groups = np.moveaxis(groups, dim, 0).reshape(groups.shape[dim], -1)[:, 0]
        groups = groups.reshape(-1)
        if (groups < 0).all():
            return 0
        key = groups.tobytes()
        if key not in self._axes:
            self._axes[key] = len(self._lengths)
            self._lengths.append(len(groups))
            counts = np.bincount(groups[groups >= 0], minlength=len(self.sizes))
            self._multiplicity.append(counts / self.sizes)
        return self._axes[key]

    @staticmethod
    def _packed(terms: Sequence[tuple[float, list[int]]]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        width = max((len(axes) for _, axes in terms), default=0)
        return (np.array([amount for amount, _ in terms], float),
                np.array([axes + [0] * (width - len(axes)) for _, axes in terms], np.int64).reshape(len(terms), width))

    def __call__(self, unit: str, removed: npt.NDArray[np.float64]) -> float:
        '''The cost in ``unit`` when each group loses so many channels.'''
        if unit == 'channels':
            return float((self.sizes - removed).sum())
        lengths = np.array(self._lengths)
        left = (lengths - np.array(self._multiplicity) @ removed) / lengths
        amounts, axes = self._terms[unit]
        return float(amounts @ left[axes].prod(1))

    def savings(self, unit: str) -> npt.NDArray[np.float64]:
        '''What the first channel of each group saves.'''
        nothing = np.zeros(len(self.sizes))
        whole = self(unit, nothing)
        return np.array([whole - self(unit, row) for row in np.eye(len(self.sizes))])

'''The ATen calls that a network spends its time on, repeated on tensors of other widths and timed.

Times that are compared are medians of interleaved runs, so that a machine that slows down slows all of them.
'''
from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from string import ascii_lowercase
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from tqdm.auto import tqdm

from ..graph._graph import ChannelGraph
from ..surgery._verify import evaluating
from ..tracing._recorded import Operation
from ..tracing._trace import Example, run_network
from ..tracing._tracer import Tracer
from ..util._networks import device_of, map_tensors, structural_copy

SAMPLE = 2e-4  # seconds that a sample lasts at least: shorter calls are repeated within it
LEAST_ROUNDS = 3  # rounds
SECONDS = 5.0  # the longest interleaved measurement of networks

clock = time.perf_counter
Prepare = Callable[[], Callable[[], Any]]
MOST_AXES = 2  # as a convolution has; a call with more, such as a concatenation, shrinks as a whole


def medians(prepared: Sequence[Prepare], device: torch.device, rounds: int = 20, seconds: float = math.inf,
            progress: str | None = None) -> list[float]:
    '''Measure the median time of each of several calls.

    Every round takes a sample of each call. One more round, the first, warms up.

    Parameters
    ----------
    prepared: sequence of callables
        Each prepares a call, which is not timed, and returns it.
    device: torch.device
        The device that the calls run on; a sample ends when all of its work is done there.
    rounds: int
        The number of samples of each call.
    seconds: float
        No further round begins after this time, once there were three.
    progress: str, optional
        The title of a progress bar on standard error.

    Returns
    -------
    list of float
        Seconds.
    '''
    wait = _wait(device)
    samples: list[list[float]] = [[] for _ in prepared]
    repeats = [1] * len(prepared)
    start = clock()
    with torch.no_grad(), tqdm(total=(rounds + 1) * len(prepared), desc=progress, disable=progress is None,
                               leave=False) as bar:
        for done in range(-1, rounds):
            if done >= LEAST_ROUNDS and clock() - start > seconds:
                break
            for number, prepare in enumerate(prepared):
                call = prepare()
                call()
                wait()
                before = clock()
                for _ in range(repeats[number]):
                    call()
                wait()
                sample = (clock() - before) / repeats[number]
                if done < 0:
                    repeats[number] = max(1, math.ceil(SAMPLE / max(sample, 1e-6)))
                else:
                    samples[number].append(sample)
                bar.update()
    return [median(found) for found in samples]


def _wait(device: torch.device) -> Callable[[], object]:
    '''Return a function that waits until a device, current or not, has done all of its work.'''
    if device.type == 'cuda':
        return partial(torch.cuda.synchronize, device)
    return getattr(getattr(torch, device.type, None), 'synchronize', lambda: None)


def side_by_side(models: Sequence[nn.Module], example: Example, rounds: int = 30) -> list[float]:
    '''Measure the median times of several networks on one input, in interleaved runs.'''
    with running(models, example) as runs:
        return medians(runs, device_of(models[0]), rounds, SECONDS)


@contextmanager
def running(models: Sequence[nn.Module], example: Example) -> Iterator[list[Prepare]]:
    '''Yield the forward passes of several networks on one input, in evaluation mode, for :func:`medians`.'''
    device = device_of(models[0])
    args, kwargs = map_tensors(lambda tensor: tensor.to(device), replace(example, device='real').arguments())
    with evaluating(nn.ModuleList(models)):
        yield [partial(partial, model, *args, **kwargs) for model in models]


def device_name(device: torch.device) -> str:
    '''Return the name of a device, with the number of threads of a CPU.'''
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f'{device.type}, {threads} thread{"s" * (threads > 1)}' if device.type == 'cpu' else device.type


@dataclass(frozen=True)
class Like:
    '''The shape, type and memory layout of a tensor: its dimensions from the slowest to the fastest.'''

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Like:
        strides = tensor.stride()
        return cls(tuple(tensor.shape), tensor.dtype, tuple(sorted(range(tensor.dim()), key=lambda dim: -strides[dim])))

    def made(self, device: torch.device) -> torch.Tensor:
        '''Make such a tensor of ones, which stay in the normal range of numbers however often a call is repeated.

        Whole numbers are zero: they may be indices, and one out of range ends a process on a GPU.
        '''
        fill = self.dtype.is_floating_point or self.dtype.is_complex or self.dtype == torch.bool
        tensor = torch.full([self.shape[dim] for dim in self.order], int(fill), dtype=self.dtype, device=device)
        return tensor.permute(sorted(range(len(self.order)), key=lambda dim: self.order[dim]))


class Call:
    '''One ATen call of a traced network.

    Parameters
    ----------
    function: torch._ops.OpOverload
        The function.
    arguments:
        Its nested arguments, with :class:`Like` in the place of tensors.
    axes: mapping of (int, int) to int
        The number of the axis of each dimension that shrinks with channels, by the number of the tensor among the
        arguments and the dimension. Dimensions of one axis shrink by the same share.

    Attributes
    ----------
    sizes: list of int
        For each axis, the number of steps in which it can shrink.
    key: str
        Equal for calls that take the same time.
    '''

    def __init__(self, function: Any, arguments: Any, axes: dict[tuple[int, int], int]):
        self.function = function
        leaves, self._spec = tree_flatten(arguments)
        self._leaves: list[Any] = leaves
        self._tensors = [position for position, leaf in enumerate(leaves) if isinstance(leaf, Like)]
        lengths = {axis: self._like(tensor).shape[dim] for (tensor, dim), axis in axes.items()}
        self._axes, self._lengths = list(lengths), list(lengths.values())
        self._joint = len(lengths) > MOST_AXES
        self._bound = {place: 0 if self._joint else self._axes.index(axis) for place, axis in axes.items()}
        self.sizes = [min(self._like(tensor).shape[dim] for (tensor, dim), number in self._bound.items()
                          if number == axis) for axis in range(1 if self._joint else len(lengths))]
        self._convolves = str(function).startswith('aten.convolution')
        if self._convolves and arguments[0][6] and (1, 0) in self._bound:  # its groups lose equally many inputs
            per_group, axis = self._like(1).shape[0] // arguments[0][8], self._bound[1, 0]
            self.sizes[axis] = min(self.sizes[axis], per_group) if per_group > 1 else self.sizes[axis]
        self.key = ' '.join([str(function), *map(self._described, range(len(leaves)))])

    def _like(self, tensor: int) -> Like:
        return self._leaves[self._tensors[tensor]]

    def _described(self, position: int) -> str:
        leaf = self._leaves[position]
        if not isinstance(leaf, Like):
            return str(leaf)
        tensor = self._tensors.index(position)
        letters = [ascii_lowercase[self._bound[tensor, dim]] if (tensor, dim) in self._bound else ''
                   for dim in range(len(leaf.shape))]
        dense = '' if leaf.order == tuple(range(len(leaf.shape))) else f'@{",".join(map(str, leaf.order))}'
        sizes = 'x'.join(f'{size}{letter}' for size, letter in zip(leaf.shape, letters))
        return f'{str(leaf.dtype).removeprefix("torch.")}({sizes}){dense}'

    def shares(self, left: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        '''Return the share that is left of each axis, given the share that is left of every axis of the network.'''
        shares = left[self._axes]
        return np.average(shares, weights=self._lengths, keepdims=True) if self._joint else shares

    def prepared(self, widths: Sequence[int], device: torch.device) -> Callable[[], Any]:
        '''Return the call on tensors of its own, with a number of steps left of each axis.'''
        leaves = list(self._leaves)
        for number, position in enumerate(self._tensors):
            like = leaves[position]
            shape = [size if (number, dim) not in self._bound else
                     size * widths[self._bound[number, dim]] // self.sizes[self._bound[number, dim]]
                     for dim, size in enumerate(like.shape)]
            leaves[position] = replace(like, shape=tuple(shape)).made(device)
        args, kwargs = tree_unflatten(leaves, self._spec)
        if self._convolves and not args[6]:  # a depthwise one has as many groups as channels
            args = (*args[:8], args[0].shape[1] // args[1].shape[1])
        elif self._convolves and args[8] == self._like(1).shape[0]:
            args = (*args[:8], args[0].shape[1])
        if self.key.startswith('aten.native_layer_norm'):
            args = (args[0], args[0].shape[-len(args[1]):], *args[2:])
        return lambda: self.function(*args, **kwargs)


class CallTracer(Tracer):
    '''A tracer that keeps the ATen call of every recorded operation.'''

    counts_flops = False

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.made: list[tuple[Operation, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self.operations)
        leaves, spec = tree_flatten((args, kwargs or {}))
        likes = [Like.of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if any(operation.reads for operation in self.operations[before:]):  # not a constant met for the first time
            self.made.append((self.operations[-1], func, tree_unflatten(likes, spec)))
        return result


def calls_of(graph: ChannelGraph, model: nn.Module, axis_of: Callable[[Any, int], int]) -> list[Call]:
    '''Return the calls of a network that compute something from its input and take less time with fewer channels.

    Parameters
    ----------
    graph, model:
        The network, traced.
    axis_of: callable
        Returns the number of the axis of labels along a dimension, 0 where it never shrinks.
    '''
    example = replace(graph._recording.example.fitted(model), resize=False, device=graph._recording.example.device)
    tracers: list[CallTracer] = []

    def tracer(*arguments: Any) -> CallTracer:
        tracers.append(CallTracer(*arguments))
        return tracers[-1]

    run_network(structural_copy(model, example.device), example, False, tracer, graph._recording.fields)
    calls = []
    for operation, function, arguments in tracers[0].made:
        axes = {(tensor, dim): axis for tensor, fields in enumerate(operation.inputs) for field in fields
                for dim in field.narrowing for axis in [axis_of(field.labels, dim)] if axis}
        if axes and any(operation.active) and not _is_view(function):
            calls.append(Call(function, arguments, axes))
    return calls


def _is_view(function: Any) -> bool:
    '''Return whether a function returns its argument under another shape, which takes no time.'''
    infos = [argument.alias_info for argument in function._schema.arguments]
    return any(info is not None and not info.is_write for info in infos)

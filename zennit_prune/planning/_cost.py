'''What a network costs: parameters, floating-point operations, bytes; and budgets.'''
from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import PruneError
from ..graph._graph import ChannelGraph
from ..tracing._example import prepare_example
from ..tracing._labels import Labels, first
from ..util._display import panel
from ..util._isolation import isolated
from ..util._networks import structural_copy, unique_tensors, unwrapped

UNITS = ('flops', 'params', 'bytes', 'channels')
UNIT_NAMES = {'flops': 'FLOPs', 'params': 'parameters'}
BUDGETS = (*UNITS, 'latency', 'latency_fraction')


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

    def _repr_html_(self) -> str:
        rows = [('parameters', self.params), ('FLOPs per sample', self.flops), ('bytes', self.bytes)]
        return panel('Cost', [(('', 'of the network'), rows)])


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
            with torch.no_grad(), isolated(network), FlopCounterMode(display=False) as counter:
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


class Budget:
    '''How much is to be left of a network, in one unit.

    Parameters
    ----------
    flops, params, bytes, channels: float or int
        Exactly one. A real number in (0, 1) is a fraction of the original; an integer above 1 is absolute, FLOPs per
        sample. ``channels`` counts the removable channels, the positions of all groups.
    latency: float
        Or this: seconds of a forward pass with the example, see :mod:`zennit_prune.latency`.
    latency_fraction: float
        Or this: the same as a fraction of the original's.

    Attributes
    ----------
    name, value:
        What was given.
    unit: str
        What is counted, a fraction or not.
    is_fraction: bool
        Whether ``value`` is a fraction of the original.

    Raises
    ------
    PruneError
        For no or several units, an unknown unit, or a value that is neither a fraction nor an absolute number.
    '''

    def __init__(self, **amount: float):
        if len(amount) != 1 or next(iter(amount)) not in BUDGETS:
            raise PruneError(f'a budget has exactly one of {", ".join(f"{name}=" for name in BUDGETS)} (given: '
                             f'{amount or "nothing"}), e.g. Budget(flops=0.5).')
        (self.name, value), = amount.items()
        self.unit = self.name.removesuffix('_fraction')
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        real = isinstance(value, (float, np.floating))
        self.is_fraction = self.name != 'latency' and real and 0 < value < 1
        allowed = f'a fraction between 0 and 1, as in Budget({self.name}=0.5)'
        if self.name == 'latency':
            valid, allowed = (whole or real) and 0 < value < math.inf, 'a number of seconds, above 0'
        elif self.name == 'latency_fraction':
            valid = self.is_fraction
        else:
            valid, allowed = self.is_fraction or (whole and value > 1), f'{allowed}, or a whole number above 1'
        if not valid:
            raise PruneError(f'Budget({self.name}={value!r}) says nothing: what is to be left is {allowed}.')
        self.value = value.item() if isinstance(value, np.generic) else value

    def limit(self, whole: float) -> float:
        '''The amount that may be left of ``whole``.'''
        return float(self.value) * whole if self.is_fraction else float(self.value)

    def __repr__(self) -> str:
        return f'Budget({self.name}={self.value!r})'


def written(unit: str, amount: float) -> str:
    '''An amount to read, rounded up so that it can be asked for.'''
    if unit == 'latency':
        return f'{math.ceil(amount * 1e6 * (1 - 1e-12)) / 1e3:,.3f} ms'
    return f'{math.ceil(amount * (1 - 1e-12)):,} {unit}'


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
        self.graph = graph
        self.sizes = np.array([group.size for group in graph.groups], float)
        self._axes: dict[bytes, int] = {}
        self._lengths: list[float] = [1.0]
        self._multiplicity: list[npt.NDArray[np.float64]] = [np.zeros(len(graph.groups))]
        order = np.full(len(graph._solution.group) + 1, -1)
        for number, group in enumerate(graph.groups):
            order[group.channels] = number
        self._group_of = order[graph._solution.channel]
        terms: dict[str, list[tuple[float, list[int]]]] = {'params': [], 'bytes': [], 'flops': []}
        self._layers: dict[str, list[str]] = {unit: [] for unit in terms}
        for name, size in graph._recording.sizes.items():
            axes = [self._axis(field.labels) for field in graph._recording.fields.get(name, [])]
            terms['bytes'].append((math.prod(size.shape) * size.bytes_each, axes))
            self._layers['bytes'].append(name.rpartition('.')[0])
            if size.is_parameter:
                terms['params'].append((math.prod(size.shape), axes))
                self._layers['params'].append(name.rpartition('.')[0])
        for operation in graph._recording.runs['eval'].operations:
            if operation.flops:
                axes = [self._axis(labels) for labels in operation.contracted[:1]]
                axes += [self._axis(field.labels, dim)
                         for fields in operation.outputs for field in fields for dim in field.narrowing]
                terms['flops'].append((operation.flops / graph._recording.example.batch, list(dict.fromkeys(axes))))
                self._layers['flops'].append(operation.site.module)
        self._terms = {unit: self._packed(found) for unit, found in terms.items()}

    def counts(self, removed: Mapping[str, Collection[int]]) -> npt.NDArray[np.float64]:
        '''How many channels each group loses when these positions go, by the name of the group.'''
        return np.array([len(removed.get(group.name, ())) for group in self.graph.groups], float)

    def _axis(self, labels: Labels, dim: int | None = None) -> int:
        '''The number of a dimension with these labels; 0 where it never shrinks.'''
        groups = self._group_of[labels]
        if dim is not None:
            channels = self.graph._solution.channel[labels]
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
        amounts, axes = self._terms[unit]
        return float(amounts @ self._left(removed)[axes].prod(1))

    def by_layer(self, unit: str, removed: npt.NDArray[np.float64]) -> dict[str, float]:
        '''The same by module, in execution order for ``'flops'``: where parameters are held, or operations run.'''
        amounts, axes = self._terms[unit]
        found: dict[str, float] = {}
        for layer, value in zip(self._layers[unit], (amounts * self._left(removed)[axes].prod(1)).tolist()):
            found[layer] = found.get(layer, 0.0) + value
        return found

    def _left(self, removed: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        '''The share that is left of each dimension.'''
        lengths = np.array(self._lengths)
        return (lengths - np.array(self._multiplicity) @ removed) / lengths

    def savings(self, unit: str) -> npt.NDArray[np.float64]:
        '''What the first channel of each group saves.'''
        nothing = np.zeros(len(self.sizes))
        whole = self(unit, nothing)
        return np.array([whole - self(unit, row) for row in np.eye(len(self.sizes))])


def cost_model(graph: ChannelGraph) -> CostModel:
    '''The cost model of a graph, which is made once and kept with the graph.'''
    if '_costs' not in vars(graph):
        vars(graph)['_costs'] = CostModel(graph)
    costs: CostModel = vars(graph)['_costs']
    return costs

'''The cost of a network (parameters, floating-point operations, bytes, channels), and budgets.'''
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

from ..errors import PruneError, names_options
from ..graph._graph import ChannelGraph
from ..tracing._labels import Labels, first
from ..tracing._trace import prepare_example
from ..util._display import panel
from ..util._isolation import isolated
from ..util._networks import structural_copy, unique_tensors, unwrapped

UNITS = ('flops', 'params', 'bytes', 'channels')
UNIT_NAMES = {'flops': 'FLOPs', 'params': 'parameters'}
BUDGETS = (*UNITS, 'latency', 'latency_fraction')
PER_CENT = ('flops', 'bytes', 'latency_fraction')  # no network has as few as 70 of these
ONE_UNIT = f'a budget has exactly one of {", ".join(f"{name}=" for name in BUDGETS)}, e.g. Budget(flops=0.5)'


@dataclass(frozen=True)
class Cost:
    '''The parameters, floating-point operations and memory of a network, as :func:`zennit_prune.cost` counts them.

    Attributes
    ----------
    params: int
        The number of parameters, each counted once.
    flops: int
        Floating-point operations of one sample: a multiplication and an addition are two. Convolutions, matrix products
        and attention are counted, as by ``torch.utils.flop_counter``.
    bytes: int
        The memory of parameters and buffers.

    Examples
    --------
    >>> from zennit_prune.planning import Cost
    >>> print(Cost(params=12, flops=1_000, bytes=48))
    12 parameters, 1,000 FLOPs per sample, 48 bytes
    '''

    params: int
    flops: int
    bytes: int

    def __str__(self) -> str:
        return f'{self.params:,} parameters, {self.flops:,} FLOPs per sample, {self.bytes:,} bytes'

    def _repr_html_(self) -> str:
        rows = [('parameters', self.params), ('FLOPs per sample', self.flops), ('bytes', self.bytes)]
        return panel('Cost', [(('', 'of the network'), rows)])


@names_options()
def cost(model: nn.Module, example: Any) -> Cost:
    '''Count parameters, FLOPs of one sample and bytes, without computing anything (the network runs on meta tensors).

    Parameters
    ----------
    model: torch.nn.Module
        Any network; it is not touched.
    example: torch.Tensor, tuple or dict
        An input, a tuple of arguments, or a dict of keyword arguments; only shapes and types matter.

    Returns
    -------
    Cost
        FLOPs are those of one sample, whatever the batch size of the example.

    Raises
    ------
    PruneError
        If the network does not run with the example.

    Examples
    --------
    >>> import torch
    >>> import zennit_prune as zp
    >>> zp.cost(torch.nn.Linear(3, 4), torch.ones(2, 3))
    Cost(params=16, flops=24, bytes=64)
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
    '''The amount to be left of a network, in one unit.

    Parameters
    ----------
    flops, params, bytes, channels: float or int, optional
        A fraction in (0, 1) of the original, or an absolute amount above 1: floating-point operations of one sample,
        parameters, bytes, or removable channels (the positions of all groups). FLOPs and bytes from 1 to 100 are
        refused: they were meant as a share in per cent.
    latency: float, optional
        Seconds of a forward pass with the example of the trace; see :func:`zennit_prune.latency`.
    latency_fraction: float, optional
        A fraction in (0, 1) of the original's latency.

    Attributes
    ----------
    name: str
        The keyword that was given.
    value: int or float
        Its value.
    unit: str
        The unit of the amount: ``'flops'``, ``'params'``, ``'bytes'``, ``'channels'`` or ``'latency'``.
    is_fraction: bool
        Whether ``value`` is a fraction of the original.

    Raises
    ------
    PruneError
        For no unit, several or an unknown one, or a value that is neither a fraction nor an absolute amount.

    Notes
    -----
    The pruned network never has more FLOPs, parameters, bytes or channels than its budget. A latency budget holds as
    predicted from a :class:`~zennit_prune.planning.LatencyTable`.

    Examples
    --------
    >>> import zennit_prune as zp
    >>> zp.Budget(flops=0.5)
    Budget(flops=0.5)
    >>> zp.Budget(params=0.25).limit(1_000_000)
    250000.0
    >>> zp.Budget(flops=70)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    zennit_prune.errors.PruneError: Budget(flops=70): did you mean 0.7? What is to be left is a fraction between ...
    '''

    @names_options(usage='Budget(flops=0.5), which names the unit')
    def __init__(self, *, flops: float | None = None, params: float | None = None, bytes: float | None = None,
                 channels: float | None = None, latency: float | None = None, latency_fraction: float | None = None):
        amounts = (flops, params, bytes, channels, latency, latency_fraction)
        given = {name: value for name, value in zip(BUDGETS, amounts) if value is not None}
        if len(given) != 1:
            raise PruneError(f'{ONE_UNIT} (given: {given or ", ".join(f"{name}=None" for name in BUDGETS)}).')
        (self.name, value), = given.items()
        self.unit = self.name.removesuffix('_fraction')
        self.value = _checked_amount(self.name, value)
        self.is_fraction = self.name != 'latency' and self.value < 1

    def limit(self, whole: float) -> float:
        '''Return the amount that may be left of a network.

        Parameters
        ----------
        whole: float
            The cost of the original, in the unit of the budget.

        Returns
        -------
        float
            The cost that may be left, in this unit.
        '''
        return float(self.value) * whole if self.is_fraction else float(self.value)

    def __repr__(self) -> str:
        return f'Budget({self.name}={self.value!r})'


def _checked_amount(name: str, value: Any) -> int | float:
    '''Return the value of a budget as a plain number, after a check that its unit allows it.'''
    least = 100 if name in PER_CENT else 1
    allowed = f'a fraction between 0 and 1, as in Budget({name}=0.5)'
    if name == 'latency':
        allowed = 'a number of seconds, above 0'
    elif name != 'latency_fraction':
        allowed += f', or an absolute number above {least}'
    valid = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if valid and name in PER_CENT and 1 < value < 100:
        raise PruneError(f'Budget({name}={value!r}): did you mean {as_share(value)}? What is to be left is {allowed}.')
    if valid and name == 'latency':
        valid = 0 < value < math.inf
    elif valid:
        absolute = least < value < math.inf and (value > 100 or value % 1 == 0) and name != 'latency_fraction'
        valid = 0 < value < 1 or absolute
    if not valid:
        raise PruneError(f'Budget({name}={value!r}) says nothing: what is to be left is {allowed}.')
    return value.item() if isinstance(value, np.generic) else value


def as_share(percentage: float) -> float:
    '''Return a percentage as a fraction, without digits that come from rounding.'''
    return round(float(percentage) / 100, 9)


def written(unit: str, amount: float) -> str:
    '''Format an amount, rounded up so that it can be given as a budget.'''
    if unit == 'latency':
        return f'{math.ceil(amount * 1e6 * (1 - 1e-12)) / 1e3:,.3f} ms'
    return f'{math.ceil(amount * (1 - 1e-12)):,} {unit}'


class CostModel:
    '''The cost of a pruned network as a function of how many channels each group loses; nothing is built.

    Use :func:`cost_model`, which makes one for each graph. A parameter's size is the product of its dimensions, an
    operation's FLOPs are proportional to the dimensions it runs over; each dimension shrinks by a known number for
    every channel of a group.

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
        self._savings: dict[str, npt.NDArray[np.float64]] = {}

    def counts(self, removed: Mapping[str, Collection[int]]) -> npt.NDArray[np.float64]:
        '''Return how many channels each group loses, given the positions to remove by the name of the group.'''
        return np.array([len(removed.get(group.name, ())) for group in self.graph.groups], float)

    def _axis(self, labels: Labels, dim: int | None = None) -> int:
        '''Return the number of the axis with these labels; 0 where it never shrinks.'''
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
        '''Return the cost in ``unit`` when each group loses so many channels.'''
        if unit == 'channels':
            return float((self.sizes - removed).sum())
        amounts, axes = self._terms[unit]
        return float(amounts @ self._left(removed)[axes].prod(1))

    def by_layer(self, unit: str, removed: npt.NDArray[np.float64]) -> dict[str, float]:
        '''Return the cost in ``unit`` of each module that holds parameters or, for ``'flops'``, runs operations.

        For ``'flops'``, modules are in execution order.
        '''
        amounts, axes = self._terms[unit]
        found: dict[str, float] = {}
        for layer, value in zip(self._layers[unit], (amounts * self._left(removed)[axes].prod(1)).tolist()):
            found[layer] = found.get(layer, 0.0) + value
        return found

    def _left(self, removed: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        '''Return the share that is left of each axis.'''
        lengths = np.array(self._lengths)
        return (lengths - np.array(self._multiplicity) @ removed) / lengths

    def savings(self, unit: str) -> npt.NDArray[np.float64]:
        '''Return how much the first removed channel of each group saves.'''
        if unit not in self._savings:
            self._savings[unit] = self._saved(unit)
        return self._savings[unit]

    def _saved(self, unit: str) -> npt.NDArray[np.float64]:
        whole = self(unit, np.zeros(len(self.sizes)))
        return np.array([whole - self(unit, row) for row in np.eye(len(self.sizes))])


def cost_model(graph: ChannelGraph) -> CostModel:
    '''Return the cost model of a graph, which is made once and kept with the graph.'''
    if graph._costs is None:
        graph._costs = CostModel(graph)
    return graph._costs

'''Carry label fields along while a network runs.'''
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from . import contractions  # noqa: F401  (registers its rules)
from .calls import CallCounter, Site
from .errors import PruneError
from .labels import Field, Labels, narrowed_to, varying_dims
from .operations import pointwise
from .networks import tensors_in
from .rules import RULES, Call, Candidates, NoRule

TRANSPARENT = {'clone', '_to_copy', 'detach', 'alias', 'lift_fresh', 'contiguous', 'native_dropout'}
POINTWISE = set('copy_ add sub mul div relu sigmoid tanh gelu silu hardtanh hardswish hardsigmoid leaky_relu elu mish clamp '
                'clamp_min pow sqrt rsqrt exp masked_fill where _prelu_kernel prelu neg softplus copy'.split())
FILLS = {'full', 'scalar_tensor', 'lift_fresh', 'new_full', 'full_like'}  # constants made from numbers: their values must survive pruning
UNIFORM = {'empty', 'zeros', 'ones', 'full', 'rand', 'randn', 'new_empty', 'new_zeros', 'new_ones', 'new_full', 'empty_like', 'zeros_like',
           'ones_like', 'full_like', 'rand_like', 'randn_like', 'empty_permuted', 'new_empty_strided'}
REFILLED = {'bernoulli', 'uniform', 'normal', 'fill', 'zero', 'exponential'}
NEEDS_VALUE = {'_local_scalar_dense', 'is_nonzero', 'equal'}


def _batch_norm_shapes(func: Any, x: torch.Tensor, *args: Any) -> Any:
    '''What batch norm returns on meta tensors; its own meta kernel takes a third of a whole trace.'''
    if any(tensor.shape != x.shape[1:2] for tensor in args[:4] if tensor is not None):
        return func(x, *args)
    channels = x.shape[1] if args[4] else 0
    return torch.empty_like(x), x.new_empty(channels), x.new_empty(channels)


SHORTCUTS = {'native_batch_norm': _batch_norm_shapes}


@dataclass(slots=True)
class Operation:
    '''One recorded ATen call.

    ``inputs`` and ``outputs`` hold the fields of each tensor, ``reads`` and ``writes`` number the values they had. The other
    lists are what its rule stated: ``ties`` and ``locks``; labels that were ``contracted``; of these, those on the side of
    a weight (``consumers``) or between two activations (``paired``); labels that a weight brought forth (``producers``).
    '''
    name: str
    site: Site
    kind: str = ''
    inputs: list[list[Field]] = field(default_factory=list)
    outputs: list[list[Field]] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    writes: list[int] = field(default_factory=list)
    active: list[bool] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    scalars: list[float] = field(default_factory=list)
    layouts: list[list[tuple[int, ...] | None]] = field(default_factory=list)
    decisions: dict[str, Any] = field(default_factory=dict)
    ties: list[tuple[Labels, Labels]] = field(default_factory=list)
    locks: list[tuple[Labels, str]] = field(default_factory=list)
    contracted: list[Labels] = field(default_factory=list)
    consumers: list[Labels] = field(default_factory=list)
    paired: list[Labels] = field(default_factory=list)
    producers: list[Labels] = field(default_factory=list)
    flops: int = 0

    def __str__(self) -> str:
        return f'{self.name} in {self.site.module or "the network itself"}'


class Tracer(TorchDispatchMode):
    '''Carry label fields along while a network runs, and record every operation that meets one.

    Parameters
    ----------
    calls: CallCounter
        Says which module and which Python call an operation belongs to.
    parameters: mapping of int to str
        The names of the traced parameters and buffers, by ``id``.
    '''

    def __init__(self, calls: CallCounter, parameters: Mapping[int, str]):
        super().__init__()
        self.calls, self.parameters = calls, parameters
        self.operations: list[Operation] = []
        self.group_sizes: dict[str, int] = {}
        self._fields: dict[int, list[Field]] = {}
        self._values: dict[int, int] = {}
        self._active: set[int] = set()
        self._uniform: set[int] = set()
        self._alive: list[torch.Tensor] = []  # keeps every id unique while the trace runs
        self._count = 0

    # what rules ask
    def fields_of(self, tensor: Any) -> list[Field]:
        return self._fields.get(id(tensor), [])

    def is_active(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._active

    def is_uniform(self, tensor: torch.Tensor) -> bool:
        '''Whether no position of a tensor differs from another: constants and independent noise, made as large as needed.'''
        return id(tensor) in self._uniform

    def is_parameter(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self.parameters

    def keep_group_size(self, weight: torch.Tensor, size: int) -> None:
        '''The module that owns ``weight`` has as many groups as its first dimension holds blocks of ``size``.'''
        self.group_sizes[self.parameters[id(weight)]] = size

    def value_of(self, tensor: torch.Tensor) -> int:
        '''The number of the value a tensor holds now; an in-place operation gives it a new one.'''
        if id(tensor) not in self._values:
            self._alive.append(tensor)
            self.renew(tensor)
        return self._values[id(tensor)]

    def renew(self, tensor: torch.Tensor) -> None:
        self._count += 1
        self._values[id(tensor)] = self._count

    def place(self, tensor: torch.Tensor, fields: list[Field]) -> None:
        '''Give a parameter its labels.'''
        self._alive.append(tensor)
        self._fields[id(tensor)] = fields

    def activate(self, tensors: Sequence[torch.Tensor]) -> None:
        '''Mark the network's inputs: what depends on them is an activation.'''
        self._alive.extend(tensors)
        self._active.update(map(id, tensors))

    def finish(self, outputs: Sequence[torch.Tensor]) -> None:
        '''The network's outputs keep their shape: record them as one last operation that locks them.'''
        operation = Operation('output', Site('', 0, 'output', 0))
        for tensor in outputs:
            fields = self.fields_of(tensor)
            operation.inputs.append(fields)
            operation.outputs.append([])
            operation.shapes.append(tuple(tensor.shape))
            operation.reads.append(self.value_of(tensor))
            operation.locks += [(labels.labels, 'it is an output of the network') for labels in fields]
        self.record(operation)

    def record(self, operation: Operation) -> None:
        self.operations.append(operation)

    def begin(self, name: str) -> Operation:
        return Operation(name, self.calls.site, self.calls.kind)

    # dispatch
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        full_name = func._schema.name
        packet = full_name.rpartition('::')[2]
        inputs = tensors_in(args) + (tensors_in(kwargs) if kwargs else [])
        if packet in NEEDS_VALUE and any(id(tensor) in self._active for tensor in inputs):
            raise PruneError(
                f'the network cannot be traced: module {self.calls.site.module!r} uses a value of its input in Python '
                f'({packet}: an if, int(), float() or item() on a tensor), so only one of its paths would be proven. Replace '
                'the branch by tensor operations (torch.where), or prune a submodule without it.')
        shortcut = SHORTCUTS.get(packet) if inputs[:1] and inputs[0].is_meta else None
        result = shortcut(func, *args) if shortcut and not kwargs else func(*args, **kwargs)
        outputs = tensors_in(result)
        self._alive += outputs
        if not self._active.isdisjoint(map(id, inputs)):
            self._active.update(map(id, outputs))
        name = packet[:-1] if packet.endswith('_') and not packet.endswith('__') else packet
        labelled = any(self._fields.get(id(tensor)) for tensor in inputs)
        is_pointwise = name not in RULES and (torch.Tag.pointwise in func.tags or packet in POINTWISE or name in POINTWISE)
        if name in UNIFORM or (is_pointwise or name in REFILLED) and self._uniform.issuperset(map(id, inputs)):
            self._uniform.update(map(id, outputs))
        else:
            self._uniform.difference_update(map(id, outputs))
        if not labelled and name not in FILLS:
            return result
        operation = self.begin(name)
        operation.inputs = [self._fields.get(id(tensor), []) for tensor in inputs]
        operation.reads = [self.value_of(tensor) for tensor in inputs]
        operation.active = [id(tensor) in self._active for tensor in inputs]
        operation.shapes = [tuple(tensor.shape) for tensor in outputs]
        candidates: Candidates
        if not labelled:
            candidates = [[] for _ in outputs]
        else:
            candidates = self._apply(Call(self, operation, func, args, kwargs, outputs), is_pointwise, inputs)
        self.settle(operation, outputs, candidates)
        if name.startswith('new_'):
            operation.shapes = []  # made as large as asked for; a size that does not fit shows where it is used
        if name in FILLS:
            operation.scalars = _constants(name, args)
        if name in TRANSPARENT and not operation.scalars:
            for tensor in outputs:
                self._values[id(tensor)] = operation.reads[0]
        else:
            for tensor in outputs:
                self.renew(tensor)
            operation.writes = [self._values[id(tensor)] for tensor in outputs]
            operation.scalars += [value for value in _numbers((args, kwargs)) if is_pointwise or isinstance(value, float)]
            if func.overloadpacket in flop_registry:
                operation.flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
            self.record(operation)
        return result

    def _apply(self, call: Call, is_pointwise: bool, inputs: list[torch.Tensor]) -> Candidates:
        rule = pointwise if is_pointwise else RULES.get(call.name)
        try:
            if rule is None:
                raise NoRule
            return rule(call)
        except NoRule:
            for tensor in inputs:
                call.lock(f'no rule covers the operation {call.func}', *self.fields_of(tensor))
            return [[] for _ in call.outputs]

    def settle(self, operation: Operation, outputs: Sequence[torch.Tensor], candidates: Candidates) -> None:
        '''Turn the candidates of a rule into the fields of the output tensors.'''
        for tensor, options in zip(outputs, candidates):
            fields, layout = [], []
            for option in options:
                dims = self.dims_of(option, operation, len(operation.layouts), len(layout))
                layout.append(dims)
                if dims is None:
                    continue
                labels = option.labels if isinstance(option, Field) else option
                if not dims:
                    operation.locks.append((labels, 'a whole tensor depends on it'))
                elif isinstance(option, Field) and option.dims == dims:
                    fields.append(option)
                else:
                    fields.append(Field(narrowed_to(labels, dims), dims))
            operation.layouts.append(layout)
            operation.outputs.append(fields)
            self._fields[id(tensor)] = fields

    def dims_of(self, option: Field | Labels, operation: Operation, output: int, rank: int) -> tuple[int, ...] | None:
        '''The dimensions along which a candidate varies, or None where it bears no label.'''
        if isinstance(option, Field):
            return option.dims
        dims = varying_dims(option)
        return dims if dims or option.reshape(-1)[:1].any() else None


def _numbers(value: Any) -> Iterator[float]:
    '''All numbers (not booleans) in nested arguments.'''
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _numbers(item)


def _constants(name: str, args: Any) -> list[float]:
    '''The value of a constant made from a number, e.g. by ``torch.tensor(channels)``.'''
    if name == 'lift_fresh':
        known = args[0].numel() == 1 and not args[0].is_meta and not args[0].is_complex()
        return [float(args[0].detach().item())] if known else []
    return [float(value) for value in args if isinstance(value, (int, float))]

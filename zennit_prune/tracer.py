'''Carry label fields along while a network runs.'''
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from . import contractions  # noqa: F401  (registers its rules)
from .calls import CallCounter, Site
from .errors import PruneError
from .labels import Field, Labels, narrowed_to, varying_dims
from .networks import tensors_in
from .operations import pointwise
from .recorded import Operation, count_flops, numbers_in, storage_key
from .rules import OPERATIONS, UNKNOWN, Call, Candidates, NoRule, Rule, Traits, check_candidates, operation_name
from .shapes import Shapes, is_regular

SAME = {'_unsafe_view': 'view', 'reshape': 'view', '_reshape_copy': 'view'}
SMALL = 64  # constants with more values are hardly made from a width


class Known(NamedTuple):
    '''What is known of an operation, looked up once a run.'''

    name: str
    traits: Traits
    is_pointwise: bool
    rule: Rule | None
    zero: str
    counts_flops: bool
    is_regular: bool

    @classmethod
    def of(cls, func: Any) -> Known:
        name = operation_name(func._schema.name)
        name = SAME.get(name, name)
        traits = OPERATIONS.get(name, UNKNOWN)
        is_pointwise = traits.rule is None and (traits.pointwise or torch.Tag.pointwise in func.tags)
        return cls(name, traits, is_pointwise, pointwise if is_pointwise else traits.rule,
                   traits.zero or ('never' if is_pointwise else 'all'), func.overloadpacket in flop_registry,
                   is_regular(func, is_pointwise or traits.refills))


class Tracer(TorchDispatchMode):
    '''Carry label fields along while a network runs, and record every operation that meets one.

    Parameters
    ----------
    calls: CallCounter
        Says which module and which Python call an operation belongs to.
    parameters: mapping of int to str
        The names of the traced parameters and buffers, by ``id``.
    '''

    counts_flops = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and keeping the compiler away costs as much as a rule

    def __init__(self, calls: CallCounter, parameters: Mapping[int, str]):
        super().__init__()
        self.calls, self.parameters = calls, dict(parameters)
        self._silent_flops = 0
        self.silent = 0  # parametrizations that are running: what they do is one operation
        self.layernorm = 'lock'
        self.whole: frozenset[Site] = frozenset()
        self.operations: list[Operation] = []
        self.group_sizes: dict[str, int] = {}
        self._fields: dict[int, list[Field]] = {}
        self._values: dict[int, int] = {}
        self._known: dict[Any, Known] = {}
        self.shapes = Shapes()
        # of storages: what is written into a tensor is written into all its views
        self._own: set[int] = set()
        self._active: set[int] = set()
        self._uniform: set[int] = set()
        self._vanishing: set[int] = set()
        self._owners: dict[int, torch.Tensor] = {}  # by storage, to recognise aliases made around the dispatcher
        self._seen: set[int] = set()
        self._alive: list[torch.Tensor] = []  # keeps every id unique while the trace runs
        self._count = 0

    # what rules ask
    def fields_of(self, tensor: Any) -> list[Field]:
        return self._fields.get(id(tensor), [])

    def is_active(self, tensor: torch.Tensor) -> bool:
        return storage_key(tensor) in self._active

    def is_uniform(self, tensor: torch.Tensor) -> bool:
        '''Whether no position of a tensor differs from another: constants and independent noise, of any size.'''
        return storage_key(tensor) in self._uniform

    def vanishes(self, tensor: torch.Tensor) -> bool:
        '''Whether a channel of a tensor is zero once the weights that bring it forth are.'''
        return storage_key(tensor) in self._vanishing

    def constant(self, numbers: Sequence[float]) -> None:
        '''A tensor is made from numbers: pruning may not change them.'''
        operation = self.begin('constant')
        operation.scalars = list(numbers)
        self.record(operation)

    def is_parameter(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self.parameters

    def is_view_of_parameter(self, tensor: torch.Tensor) -> bool:
        '''Whether a tensor is a parameter or buffer, perhaps transposed or reshaped.'''
        return storage_key(tensor) in self._own

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
        self._seen.add(id(tensor))
        self._fields[id(tensor)] = fields
        self._owners[storage_key(tensor)] = tensor
        for facts in (self._own, self._vanishing):
            facts.add(storage_key(tensor))

    def activate(self, tensors: Sequence[torch.Tensor]) -> None:
        '''Mark the network's inputs: what depends on them is an activation.'''
        self._alive.extend(tensors)
        self._seen.update(map(id, tensors))
        self._active.update(map(storage_key, tensors))

    def computed(self, name: str, tensors: Sequence[torch.Tensor], weight: torch.Tensor) -> None:
        '''A weight was computed by its parametrization; its channels are those of the tensors that have its sizes.'''
        if self.silent or self.is_parameter(weight):
            return
        operation = self.begin('parametrization')
        operation.inputs, operation.reads = [*map(self.fields_of, tensors)], [*map(self.value_of, tensors)]
        operation.active = [False] * len(tensors)
        fields: dict[tuple[int, ...], Field] = {}
        for number in operation.decisions.setdefault('largest first', sorted(
                range(len(tensors)), key=lambda number: -tensors[number].numel())):
            for field in self.fields_of(tensors[number]):
                if tensors[number].dim() != weight.dim() or self.is_active(weight) or any(
                        tensors[number].shape[dim] != weight.shape[dim] for dim in field.dims):
                    operation.locks.append((field.labels, 'a weight is computed from it'))
                elif (0, 1) in fields and field.dims == (1,):  # the groups of a convolution share it
                    operation.locks += [(each.labels, 'a weight is computed from it') for each in (field, fields[0, 1])]
                elif field.dims in fields:
                    operation.ties.append((fields[field.dims].labels, field.labels))
                else:
                    fields[field.dims] = field
        operation.outputs = [[*fields.values()]]  # the very fields of the tensors: nothing that a replay could compare
        operation.flops, self._silent_flops = self._silent_flops, 0
        self.place(weight, operation.outputs[0])
        self.parameters[id(weight)] = name
        self.renew(weight)
        operation.writes = [self._values[id(weight)]]
        self.record(operation)

    def finish(self, outputs: Sequence[torch.Tensor]) -> None:
        '''The network's outputs keep their shape: record them as one last operation that locks them.'''
        if not outputs:
            raise PruneError('the network returns no tensor that was found: it must return tensors, or nested tuples, '
                             'lists, dicts or objects that hold them as attributes.')
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
        known = self._known.get(func)
        if known is None:
            known = self._known[func] = Known.of(func)
        name, traits = known.name, known.traits
        inputs = tensors_in(args)
        if kwargs:
            inputs += tensors_in(kwargs)
        if self.silent:
            result = func(*args, **kwargs)
            outputs = tensors_in(result)
            self._alive += outputs
            self._seen.update(map(id, outputs))
            if any(map(self.is_active, inputs)):
                self._active.update(map(storage_key, outputs))
            if self.counts_flops and known.counts_flops:
                self._silent_flops += count_flops(func.overloadpacket, args, kwargs, result)
            return result
        if traits.needs_value:
            self.refuse_values(name, inputs)
        masks = [at for at in args[1] if at is not None and at.dtype == torch.bool] if name == 'index' else []
        if traits.counts or masks:
            self.refuse_counts(name, masks or inputs)
        result = self.shapes(func, args, kwargs) if known.is_regular else func(*args, **kwargs)
        outputs = tensors_in(result)
        self._alive += outputs
        aliased = [field for tensor in inputs if id(tensor) not in self._seen for field in self._meet(tensor)]
        self._seen.update(map(id, outputs))
        storages, written = [*map(storage_key, inputs)], [*map(storage_key, outputs)]
        actives = [storage in self._active for storage in storages]
        active = any(actives)
        if active:
            self._active.update(written)
        in_place = bool(outputs) and any(outputs[0] is tensor for tensor in inputs)
        stays_uniform = (known.is_pointwise or traits.refills) and self._uniform.issuperset(storages) and (
            not in_place or outputs[0].nbytes == outputs[0].untyped_storage().nbytes())
        if traits.constant or stays_uniform:
            self._uniform.update(written)
        elif in_place:
            self._uniform.difference_update(written)
        operation = self.begin(name)
        if aliased:
            operation.locks += [(field.labels, 'an alias of another shape was made of it') for field in aliased]
        operation.inputs = [self._fields.get(id(tensor), []) for tensor in inputs]
        operation.reads = [self.value_of(tensor) for tensor in inputs]
        operation.active = [storage in self._active for storage in storages] if in_place else actives
        operation.shapes = [tuple(tensor.shape) for tensor in outputs]
        labelled = any(operation.inputs)
        candidates: Candidates
        if not labelled:
            candidates = [[] for _ in outputs]
        else:
            candidates = self._apply(known.rule, Call(self, operation, func, args, kwargs, outputs), inputs)
        self.settle(operation, outputs, candidates)
        zero = 'never' if name == 'constant_pad_nd' and (args[2:3] or [0])[0] else known.zero
        self._note_vanishing(operation, zero, storages[:len(tensors_in(args))] if kwargs else storages, written)
        if not any(operation.outputs) and self._uniform.issuperset(written):
            operation.shapes = []  # made as large as asked for; a size that does not fit shows where it is used
        if traits.transparent and not operation.locks:
            for tensor in outputs:
                self._values[id(tensor)] = operation.reads[0]
        else:
            for tensor in outputs:
                self.renew(tensor)
            operation.writes = [self._values[id(tensor)] for tensor in outputs]
            operation.scalars = self._fixed_numbers(name, traits, args, kwargs)
            if not known.is_pointwise and not traits.size_free:  # a reader of constants may see how many there are
                operation.scalars += [size for tensor, storage in zip(inputs, storages) if storage in self._uniform
                                      and not self.fields_of(tensor) for size in tensor.shape]
            if self.counts_flops and known.counts_flops:
                operation.flops = count_flops(func.overloadpacket, args, kwargs, result)
            counter = bool(outputs) and id(outputs[0]) in self.parameters  # batches seen, say
            # else a constant, kept or made anew
            if labelled or active or (operation.scalars and not counter):
                self.record(operation)
        return result

    def _fixed_numbers(self, name: str, traits: Traits, args: Any, kwargs: Any) -> list[float]:
        '''The numbers of a call that pruning may not change: all but the sizes of labelled dimensions.'''
        if traits.sized:
            return [value for value in (*args, *kwargs.values()) if isinstance(value, float)
                    or (traits.constant and type(value) is int)]
        if name == 'convolution':
            return numbers_in(args[3:8])
        if 'batch_norm' in name:  # in training it does the same to labels
            return [value for value in args[5:] if isinstance(value, float)]
        if name == 'slice':
            dim = int(args[1] if len(args) > 1 else 0) % max(args[0].dim(), 1)
            if any(dim in field.dims for field in self.fields_of(args[0])):
                return numbers_in(args[4:])
            return [dim, *slice(*args[2:5]).indices(args[0].shape[dim])]
        return numbers_in((args, kwargs))

    def _note_vanishing(self, operation: Operation, zero: str, storages: Sequence[int], written: Sequence[int]) -> None:
        '''Remember which tensors are zero in a channel once all weights that bring it forth are.'''
        vanishing = [storage in self._vanishing for storage in storages]
        if zero == 'all' or zero == 'any':
            labelled = [vanish for vanish, fields in zip(vanishing, operation.inputs) if fields]
            vanishes = bool(labelled) and all(labelled) if zero == 'all' else any([*labelled, operation.producers])
        elif zero == 'terms':
            vanishes = len(vanishing) > 1 and all(vanishing)
        elif zero == 'never':
            vanishes = False
        else:  # 'first', 'bias'
            vanishes = vanishing[:1] == [True] and (zero == 'first' or bool(operation.producers))
        if vanishes:
            self._vanishing.update(written)
        else:
            self._vanishing.difference_update(written)

    def refuse_values(self, how: str, tensors: Sequence[torch.Tensor]) -> None:
        '''Refuse a network that uses values of its input in Python.'''
        if any(map(self.is_active, tensors)):
            raise PruneError(
                f'the network cannot be traced: module {self.calls.site.module!r} uses a value of its input in Python '
                f'({how}: an if, int(), float(), item() or tolist() on a tensor), so only one of its paths would be '
                'proven. Replace the branch by tensor operations (torch.where), or prune a submodule without it.')

    def refuse_counts(self, how: str, tensors: Sequence[torch.Tensor]) -> None:
        '''Refuse a network in which sizes depend on values of its input.'''
        if any(map(self.is_active, tensors)):
            where = f'module {self.calls.site.module!r}' if self.calls.site.module else 'the network itself'
            raise PruneError(
                f'the network cannot be traced: in {where} the size of a tensor depends on '
                f'values of the input ({how}), as when boxes are selected, so no other network can be held against it. '
                "Prune the part before that, a module that returns tensors of fixed size: a detector's backbone and "
                'heads.')

    def _meet(self, tensor: torch.Tensor) -> list[Field]:
        '''Know a tensor that no operation made, an alias or a constant; returned are fields that an alias misses.'''
        self._seen.add(id(tensor))
        self._alive.append(tensor)
        owner = self._owners.get(storage_key(tensor))
        if owner is not None and self.fields_of(owner):
            if owner.shape != tensor.shape:
                return self.fields_of(owner)
            self._fields[id(tensor)] = self.fields_of(owner)
            self._values[id(tensor)] = self.value_of(owner)
        elif not tensor.is_meta and not self.is_active(tensor) and tensor.numel() <= SMALL and not tensor.is_complex():
            self.constant(tensor.detach().double().reshape(-1).tolist())
        return []

    def _apply(self, rule: Rule | None, call: Call, inputs: list[torch.Tensor]) -> Candidates:
        try:
            if rule is None:
                raise NoRule
            candidates = rule(call)
            if '::' in call.name:  # a custom operator
                check_candidates(call, candidates)
            return candidates
        except NoRule:
            for tensor in inputs:
                call.lock(f'no rule covers the operation {call.func}', *self.fields_of(tensor))
            return [[] for _ in call.outputs]

    def settle(self, operation: Operation, outputs: Sequence[torch.Tensor], candidates: Candidates) -> None:
        '''Turn the candidates of a rule into the fields of the output tensors.'''
        for tensor, options in zip(outputs, candidates):
            fields: list[Field] = []
            layout: list[tuple[int, ...] | None] = []
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
                    shape = [size if dim in dims else 1 for dim, size in enumerate(tensor.shape)]
                    fields.append(Field(np.broadcast_to(narrowed_to(labels, dims), shape), dims))
            operation.layouts.append(layout)
            operation.outputs.append(fields)
            self._fields[id(tensor)] = fields
            if fields:
                self._owners[storage_key(tensor)] = tensor

    def dims_of(self, option: Field | Labels, operation: Operation, output: int, rank: int) -> tuple[int, ...] | None:
        '''The dimensions along which a candidate varies, or None where it bears no label.'''
        if isinstance(option, Field):
            return option.dims
        dims = varying_dims(option)
        return dims if dims or option.reshape(-1)[:1].any() else None

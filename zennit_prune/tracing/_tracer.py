'''Carry label fields along while a network runs, and record its operations.

A :class:`Tracer` sees every ATen operation, asks its rule for the fields of the results, and records the call. It looks
the properties of an operation up once (:class:`Known`) and keeps a few facts about every storage. Networks that cannot
be followed, or of which a trace would prove one path only, are refused with an error that names the module.
'''
from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..errors import PruneError
from ..util._networks import tensors_in
from . import _contractions  # noqa: F401  (registers its rules)
from ._calls import CallCounter, Site
from ._labels import Field, Labels, narrowed_to, varying_dims
from ._operations import pointwise
from ._recorded import Operation, count_flops, numbers_in, numbers_of, storage_key
from ._rules import (
    OF_USERS,
    OPERATIONS,
    UNKNOWN,
    Call,
    Candidates,
    NoRule,
    Rule,
    Traits,
    check_candidates,
    operation_name,
)
from ._shapes import Shapes, described_call, is_regular

SAME = {'_unsafe_view': 'view', 'reshape': 'view', '_reshape_copy': 'view'}
ACTIVE, UNIFORM, VANISHING, OWN = 1, 2, 4, 8  # what is known of a storage
TORCHSCRIPT = 'TorchScript interpreter'
NO_FIELDS: list[Field] = []


class Known(NamedTuple):
    '''The properties of an operation that a tracer needs at each call, looked up once a run.'''

    name: str
    traits: Traits
    is_pointwise: bool
    rule: Rule | None
    zero: str
    stays_uniform: bool
    counts_flops: bool
    is_regular: bool
    may_be_refused: bool
    is_repeatable: bool

    @classmethod
    def of(cls, func: Any) -> Known:
        name = operation_name(func._schema.name)
        name = SAME.get(name, name)
        traits = OPERATIONS.get(name, UNKNOWN)
        is_pointwise = traits.rule is None and (traits.pointwise or torch.Tag.pointwise in func.tags)
        return cls(name, traits, is_pointwise, pointwise if is_pointwise else traits.rule,
                   traits.zero or ('never' if is_pointwise else 'all'), is_pointwise or traits.refills,
                   func.overloadpacket in flop_registry,
                   is_regular(func, is_pointwise or traits.refills, traits.constant),
                   traits.needs_value or traits.counts or name == 'index',
                   not traits.transparent and name not in OF_USERS)


class Outcome(NamedTuple):
    '''The record of an operation, and whether a channel of its result is zero once its weights are.'''

    operation: Operation
    vanishes: bool


def fixed_numbers(known: Known, args: Any, kwargs: Any, fields: Sequence[Field]) -> list[float]:
    '''Return the numbers of a call that pruning may not change: all but the sizes of labelled dimensions.'''
    name, traits = known.name, known.traits
    if traits.sized:
        return [value for value in (*args, *kwargs.values()) if isinstance(value, float)
                or (traits.constant and type(value) is int)]
    if name == 'convolution':
        return [*args[3], *args[4], *args[5], args[6], *args[7]]
    if 'batch_norm' in name:  # in training it does the same to labels
        return [value for value in args[5:] if isinstance(value, float)]
    if name == 'slice':
        dim = int(args[1] if len(args) > 1 else 0) % max(args[0].dim(), 1)
        if any(dim in field.dims for field in fields):
            return numbers_in(args[4:])
        return [dim, *slice(*args[2:5]).indices(args[0].shape[dim])]
    return numbers_in((args, kwargs))


def vanishes(operation: Operation, zero: str, facts: Sequence[int]) -> bool:
    '''Return whether a channel of the result is zero once all weights that produce it are.'''
    vanishing = [bool(fact & VANISHING) for fact in facts]
    if zero == 'all' or zero == 'any':
        labelled = [vanish for vanish, fields in zip(vanishing, operation.inputs) if fields]
        return bool(labelled) and all(labelled) if zero == 'all' else any(labelled) or bool(operation.producers)
    if zero == 'terms':
        return len(vanishing) > 1 and all(vanishing)
    if zero == 'never':
        return False
    return vanishing[:1] == [True] and (zero == 'first' or bool(operation.producers))  # 'first', 'bias'


def refuse_values(tracer: Tracer, how: str, tensors: Sequence[torch.Tensor]) -> None:
    '''Refuse a network that uses values of its input in Python.'''
    if any(map(tracer.is_active, tensors)):
        hook = running_hook()
        remedy = ('Replace the branch by tensor operations (torch.where), or prune a submodule without it.'
                  if hook is None else 'Remove the hook while the network is traced and pruned.')
        raise PruneError(
            f'the network cannot be traced: {hook or f"module {tracer.calls.site.module!r}"} uses a value of its input '
            f'in Python ({how}: an if, int(), float(), item() or tolist() on a tensor), so only one of its paths would '
            f'be proven. {remedy}')


def running_hook() -> str | None:
    '''Describe the hook of a module that is running now, or return None where ``forward`` itself is.'''
    called, frame = sys._getframe(), sys._getframe().f_back
    while frame is not None and frame.f_code.co_filename != nn.Module.__call__.__code__.co_filename:
        called, frame = frame, frame.f_back
    values = {} if frame is None else frame.f_locals
    hook = values.get('hook')
    if not callable(hook) or getattr(hook, '__code__', None) is not called.f_code:
        return None
    return f'the hook {called.f_code.co_name!r} of a {type(values.get("self")).__name__}'


def refuse_counts(tracer: Tracer, how: str, tensors: Sequence[torch.Tensor]) -> None:
    '''Refuse a network in which sizes depend on values of its input.'''
    if any(map(tracer.is_active, tensors)):
        where = f'module {tracer.calls.site.module!r}' if tracer.calls.site.module else 'the network itself'
        raise PruneError(
            f'the network cannot be traced: in {where} the size of a tensor depends on '
            f'values of the input ({how}), as when boxes are selected, so no other network can be held against it. '
            "Prune the part before that, a module that returns tensors of fixed size: a detector's backbone and "
            'heads.')


class OriginalUsed(PruneError):
    '''Raised where a copy of a network uses a parameter of the network itself.'''


def refuse_original(name: str) -> None:
    '''Refuse a network whose copies use a parameter of the network itself.'''
    module = name.rpartition('.')[0]
    raise OriginalUsed(
        f'the network cannot be pruned: {name!r} is used by its copies too, since a function that it keeps (a lambda, '
        f'a closure, a hook) holds {f"the module {module!r}" if module else "the network"} itself, not its copy. Make '
        'the function a method, or give it what it uses as an argument.')


class ForwardError(Exception):
    '''Raised where ``forward`` raised an error; it names the module that did.'''

    def __init__(self, module: str, index: int, error: Exception):
        super().__init__(f'{type(error).__name__}: {_said(str(error))}')
        self.module, self.index = module, index


def _said(text: str) -> str:
    '''Shorten the text of an error to its first line, and for compiled code the function and the last line.'''
    first, *others = text.strip().splitlines() or ['']
    if TORCHSCRIPT not in text:
        return first
    where = [line.strip() for line in others if line.strip().startswith('File ')]
    return f'{first} ' + ': '.join([*where[-1:], *others[-1:]])


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
        self.originals: Mapping[int, str] = {}  # of what is traced: a copy may not use them
        self.operations: list[Operation] = []
        self.group_sizes: dict[str, int] = {}
        self._fields: dict[int, list[Field]] = {}
        self._values: dict[int, int] = {}
        self._known: dict[int, Known] = {}
        self.shapes = Shapes()
        self.outcomes: dict[Any, Outcome] | None = None
        self._facts: dict[int, int] = {}  # of storages: what is written into a tensor is written into all its views
        self._owners: dict[int, torch.Tensor] = {}  # by storage, to recognise aliases made around the dispatcher
        self._alive: dict[int, torch.Tensor] = {}  # all tensors met: their ids stay unique while the trace runs
        self._numbered: list[torch.Tensor] = []  # and those asked for before they were met
        self._count = 0

    # what rules ask
    def fields_of(self, tensor: Any) -> list[Field]:
        return self._fields.get(id(tensor), [])

    def is_active(self, tensor: torch.Tensor) -> bool:
        return bool(self._facts.get(storage_key(tensor), 0) & ACTIVE)

    def is_uniform(self, tensor: torch.Tensor) -> bool:
        '''Return whether no position of a tensor differs from another, as in constants and independent noise.'''
        return bool(self._facts.get(storage_key(tensor), 0) & UNIFORM)

    def vanishes(self, tensor: torch.Tensor) -> bool:
        '''Return whether a channel of a tensor is zero once the weights that produce it are.'''
        return bool(self._facts.get(storage_key(tensor), 0) & VANISHING)

    def constant(self, numbers: Sequence[float]) -> None:
        '''Record that a tensor is made from numbers, which pruning may not change.'''
        operation = self.begin('constant')
        operation.scalars = list(numbers)
        self.record(operation)

    def is_parameter(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self.parameters

    def is_view_of_parameter(self, tensor: torch.Tensor) -> bool:
        '''Return whether a tensor is a parameter or buffer, perhaps transposed or reshaped.'''
        return bool(self._facts.get(storage_key(tensor), 0) & OWN)

    def keep_group_size(self, weight: torch.Tensor, size: int) -> None:
        '''Record that the module of ``weight`` has one group for each block of ``size`` along its first dimension.'''
        self.group_sizes[self.parameters[id(weight)]] = size

    def value_of(self, tensor: torch.Tensor) -> int:
        '''Return the number of the value that a tensor holds now; an in-place operation gives it a new one.'''
        if id(tensor) not in self._values:
            self._numbered.append(tensor)
            self.renew(tensor)
        return self._values[id(tensor)]

    def renew(self, tensor: torch.Tensor) -> None:
        self._count += 1
        self._values[id(tensor)] = self._count

    def place(self, tensor: torch.Tensor, fields: list[Field]) -> None:
        '''Give a parameter or buffer its labels.'''
        storage = storage_key(tensor)
        self._alive[id(tensor)] = self._owners[storage] = tensor
        self._fields[id(tensor)] = fields
        self._facts[storage] = self._facts.get(storage, 0) | OWN | VANISHING

    def activate(self, tensors: Sequence[torch.Tensor]) -> None:
        '''Mark the network's inputs, so that tensors which depend on them count as activations.'''
        self._alive.update((id(tensor), tensor) for tensor in tensors)
        self._mark(map(storage_key, tensors), ACTIVE, True)

    def take_silent_flops(self) -> int:
        '''Return the FLOPs of silent operations since the last call, and set their number to 0.'''
        flops, self._silent_flops = self._silent_flops, 0
        return flops

    def finish(self, outputs: Sequence[torch.Tensor]) -> None:
        '''Record the network's outputs as one last operation, which locks their channels.'''
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
        known = self._known.get(id(func))
        if known is None:
            known = self._known[id(func)] = Known.of(func)
        if self.silent:
            return self._run_silently(known, func, args, kwargs)
        inputs: list[torch.Tensor] = []
        key = described_call(func, args, kwargs, inputs)
        if known.may_be_refused:
            self._refuse(known, args, inputs)
        result = self.shapes(func, args, kwargs, key) if known.is_regular else func(*args, **kwargs)
        outputs = [result] if isinstance(result, torch.Tensor) else tensors_in(result)
        if not inputs and known.traits.constant:
            self._make(known, args, kwargs, outputs)
            return result
        aliased = [field for tensor in inputs if id(tensor) not in self._alive for field in self._meet(tensor)]
        ids = [id(tensor) for tensor in inputs]
        in_place = bool(outputs) and id(outputs[0]) in ids
        for tensor in outputs:
            self._alive[id(tensor)] = tensor
        written = [storage_key(tensor) for tensor in outputs]
        facts = self._note_facts(known, inputs, outputs, written, in_place)
        fields = [self._fields.get(number, NO_FIELDS) for number in ids]
        reads = [self._values.get(id(tensor)) or self.value_of(tensor) for tensor in inputs]
        labelled = any(fields)
        case: Any = None
        if (labelled and self.outcomes is not None and key is not None and known.is_repeatable
                and not aliased and not (in_place and facts[0] & UNIFORM)):
            case = (key, self.calls.site, self.context(known.name), *facts, *map(self.parameters.get, ids),
                    *[tuple(map(id, found)) for found in fields])
            outcome = self.outcomes.get(case)
            if outcome is not None:
                self._repeat(outcome, reads, outputs, written)
                return result
        operation = self.begin(known.name)
        if aliased:
            operation.locks += [(field.labels, 'an alias of another shape was made of it') for field in aliased]
        operation.inputs, operation.reads = fields, reads
        if in_place:
            facts = [self._facts.get(storage_key(tensor), 0) for tensor in inputs]
        operation.active = [bool(fact & ACTIVE) for fact in facts]
        operation.shapes = [tuple(tensor.shape) for tensor in outputs]
        candidates: Candidates
        if not labelled:
            candidates = [[] for _ in outputs]
        else:
            candidates = self._apply(known.rule, Call(self, operation, func, args, kwargs, outputs), inputs)
        self.assign_fields(operation, outputs, candidates)
        zero = 'never' if known.name == 'constant_pad_nd' and (args[2:3] or [0])[0] else known.zero
        vanish = vanishes(operation, zero, facts[:len(tensors_in(args))] if kwargs else facts)
        self._mark(written, VANISHING, vanish)
        if not any(operation.outputs) and all(self._facts[storage] & UNIFORM for storage in written):
            operation.shapes = []  # made as large as asked for; a size that does not fit shows where it is used
        if known.traits.transparent and not operation.locks:
            for tensor in outputs:
                self._values[id(tensor)] = operation.reads[0]
            return result
        operation.writes = self._renewed(outputs)
        operation.scalars = fixed_numbers(known, args, kwargs, fields[0] if fields else NO_FIELDS)
        if not known.is_pointwise and not known.traits.size_free:  # a reader of constants may see how many there are
            operation.scalars += [size for tensor, found, fact in zip(inputs, fields, facts)
                                  if fact & UNIFORM and not found for size in tensor.shape]
        if self.counts_flops and known.counts_flops:
            operation.flops = count_flops(func.overloadpacket, args, kwargs, result)
        counter = bool(outputs) and id(outputs[0]) in self.parameters  # batches seen, say
        # else a constant, kept or made anew
        if labelled or any(operation.active) or (operation.scalars and not counter):
            self.record(operation)
        if case is not None:
            self.outcomes[case] = Outcome(operation, vanish)  # type: ignore[index]
        return result

    def _run_silently(self, known: Known, func: Any, args: Any, kwargs: Any) -> Any:
        '''Run an operation of a parametrization without recording it.'''
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        self._alive.update((id(tensor), tensor) for tensor in outputs)
        if any(map(self.is_active, tensors_in((args, kwargs)))):
            self._mark(map(storage_key, outputs), ACTIVE, True)
        if self.counts_flops and known.counts_flops:
            self._silent_flops += count_flops(func.overloadpacket, args, kwargs, result)
        return result

    def _make(self, known: Known, args: Any, kwargs: Any, outputs: Sequence[torch.Tensor]) -> None:
        '''Record the making of a constant or of independent noise, where numbers say what it holds.'''
        operation = self.begin(known.name)
        self._alive.update((id(tensor), tensor) for tensor in outputs)
        self._mark([storage_key(tensor) for tensor in outputs], UNIFORM, True)
        operation.writes = self._renewed(outputs)
        operation.outputs, operation.layouts = [[] for _ in outputs], [[] for _ in outputs]
        for tensor in outputs:
            self._fields[id(tensor)] = []
        operation.scalars = fixed_numbers(known, args, kwargs, NO_FIELDS)
        if operation.scalars:
            self.record(operation)

    def _note_facts(self, known: Known, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor],
                    written: Sequence[int], in_place: bool) -> list[int]:
        '''Note whether the results of an operation are active and uniform; return the facts about its inputs.'''
        facts = [self._facts.get(storage_key(tensor), 0) for tensor in inputs]
        some, every = 0, ~0
        for fact in facts:
            some |= fact
            every &= fact
        constant = known.traits.constant or (
            known.stays_uniform and bool(every & UNIFORM)
            and (not in_place or outputs[0].nbytes == outputs[0].untyped_storage().nbytes()))
        gone = UNIFORM if in_place and not constant else 0
        new = some & ACTIVE | (UNIFORM if constant else 0)
        for storage in written:
            self._facts[storage] = self._facts.get(storage, 0) & ~gone | new
        return facts

    def _mark(self, storages: Iterable[int], fact: int, holds: bool) -> None:
        for storage in storages:
            facts = self._facts.get(storage, 0)
            self._facts[storage] = facts | fact if holds else facts & ~fact

    def _renewed(self, outputs: Sequence[torch.Tensor]) -> list[int]:
        '''Give new numbers to the values that an operation wrote, and return them.'''
        for tensor in outputs:
            self.renew(tensor)
        return [self._values[id(tensor)] for tensor in outputs]

    def context(self, name: str) -> Any:
        '''Return what the outcome of the next operation depends on beside its arguments and its site.'''
        return None

    def _repeat(self, outcome: Outcome, reads: list[int], outputs: Sequence[torch.Tensor],
                written: Sequence[int]) -> None:
        '''Record an operation by the outcome that another run found for equal arguments.'''
        for tensor, fields, storage in zip(outputs, outcome.operation.outputs, written):
            self._fields[id(tensor)] = fields
            if fields:
                self._owners[storage] = tensor
        self._mark(written, VANISHING, outcome.vanishes)
        self.operations.append(outcome.operation.repeated(reads, self._renewed(outputs)))

    def _refuse(self, known: Known, args: Any, inputs: list[torch.Tensor]) -> None:
        '''Refuse an operation whose result depends on values of the network's input.'''
        if known.traits.needs_value:
            refuse_values(self, known.name, inputs)
        masks = [at for at in args[1] if at is not None and at.dtype == torch.bool] if known.name == 'index' else []
        if known.traits.counts or masks:
            refuse_counts(self, known.name, masks or inputs)

    def _meet(self, tensor: torch.Tensor) -> list[Field]:
        '''Register a tensor that no operation made, an alias or a constant; return the fields that an alias misses.'''
        if id(tensor) in self.originals and not self.is_parameter(tensor):
            refuse_original(self.originals[id(tensor)])
        self._alive[id(tensor)] = tensor
        owner = self._owners.get(storage_key(tensor))
        if owner is not None and self.fields_of(owner):
            if owner.shape != tensor.shape:
                return self.fields_of(owner)
            self._fields[id(tensor)] = self.fields_of(owner)
            self._values[id(tensor)] = self.value_of(owner)
        elif not tensor.is_meta and not self.is_active(tensor) and not tensor.is_complex():
            self.constant(numbers_of(tensor))
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

    def assign_fields(self, operation: Operation, outputs: Sequence[torch.Tensor], candidates: Candidates) -> None:
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
                    labels = narrowed_to(labels, dims)
                    shape = tuple([size if dim in dims else 1 for dim, size in enumerate(tensor.shape)])
                    labels = labels if labels.shape == shape else Labels(np.broadcast_to(labels, shape))
                    fields.append(Field(labels, dims))
            operation.layouts.append(layout)
            operation.outputs.append(fields)
            self._fields[id(tensor)] = fields
            if fields:
                self._owners[storage_key(tensor)] = tensor

    def dims_of(self, option: Field | Labels, operation: Operation, output: int, rank: int) -> tuple[int, ...] | None:
        '''Return the dimensions along which a candidate varies, or None where it bears no label.'''
        if isinstance(option, Field):
            return option.dims
        dims = varying_dims(option)
        return dims if dims or option.reshape(-1)[:1].any() else None

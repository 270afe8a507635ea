'''Carry label fields along while a network runs.'''
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import contractions, reductions  # noqa: F401  (register their rules)
from .calls import CallCounter, Site
from .errors import PruneError
from .known import ACTIVE, OWN, UNIFORM, VANISHING, Known, Outcome, fixed_numbers, vanishes
from .labels import Field, Labels, narrowed_to, varying_dims
from .networks import tensors_in
from .recorded import Operation, count_flops, numbers_of, storage_key
from .refusals import refuse_counts, refuse_original, refuse_values
from .rules import Call, Candidates, NoRule, Rule, check_candidates
from .shapes import Shapes, described_call

NO_FIELDS: list[Field] = []


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
        '''Whether no position of a tensor differs from another: constants and independent noise, of any size.'''
        return bool(self._facts.get(storage_key(tensor), 0) & UNIFORM)

    def vanishes(self, tensor: torch.Tensor) -> bool:
        '''Whether a channel of a tensor is zero once the weights that bring it forth are.'''
        return bool(self._facts.get(storage_key(tensor), 0) & VANISHING)

    def constant(self, numbers: Sequence[float]) -> None:
        '''A tensor is made from numbers: pruning may not change them.'''
        operation = self.begin('constant')
        operation.scalars = list(numbers)
        self.record(operation)

    def is_parameter(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self.parameters

    def is_view_of_parameter(self, tensor: torch.Tensor) -> bool:
        '''Whether a tensor is a parameter or buffer, perhaps transposed or reshaped.'''
        return bool(self._facts.get(storage_key(tensor), 0) & OWN)

    def keep_group_size(self, weight: torch.Tensor, size: int) -> None:
        '''The module that owns ``weight`` has as many groups as its first dimension holds blocks of ``size``.'''
        self.group_sizes[self.parameters[id(weight)]] = size

    def value_of(self, tensor: torch.Tensor) -> int:
        '''The number of the value a tensor holds now; an in-place operation gives it a new one.'''
        if id(tensor) not in self._values:
            self._numbered.append(tensor)
            self.renew(tensor)
        return self._values[id(tensor)]

    def renew(self, tensor: torch.Tensor) -> None:
        self._count += 1
        self._values[id(tensor)] = self._count

    def place(self, tensor: torch.Tensor, fields: list[Field]) -> None:
        '''Give a parameter its labels.'''
        storage = storage_key(tensor)
        self._alive[id(tensor)] = self._owners[storage] = tensor
        self._fields[id(tensor)] = fields
        self._facts[storage] = self._facts.get(storage, 0) | OWN | VANISHING

    def activate(self, tensors: Sequence[torch.Tensor]) -> None:
        '''Mark the network's inputs: what depends on them is an activation.'''
        self._alive.update((id(tensor), tensor) for tensor in tensors)
        self._mark(map(storage_key, tensors), ACTIVE, True)

    def take_silent_flops(self) -> int:
        '''What was computed silently since this was last asked.'''
        flops, self._silent_flops = self._silent_flops, 0
        return flops

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
        facts = self._settle_facts(known, inputs, outputs, written, in_place)
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
        self.settle(operation, outputs, candidates)
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
        '''Run a step of what computes a weight.'''
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        self._alive.update((id(tensor), tensor) for tensor in outputs)
        if any(map(self.is_active, tensors_in((args, kwargs)))):
            self._mark(map(storage_key, outputs), ACTIVE, True)
        if self.counts_flops and known.counts_flops:
            self._silent_flops += count_flops(func.overloadpacket, args, kwargs, result)
        return result

    def _make(self, known: Known, args: Any, kwargs: Any, outputs: Sequence[torch.Tensor]) -> None:
        '''Record a constant or independent noise, as large as asked for, if numbers say what it holds.'''
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

    def _settle_facts(self, known: Known, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor],
                      written: Sequence[int], in_place: bool) -> list[int]:
        '''Note whether what an operation wrote is active and uniform; returned is what was known of its inputs.'''
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
        '''Number what an operation wrote.'''
        for tensor in outputs:
            self.renew(tensor)
        return [self._values[id(tensor)] for tensor in outputs]

    def context(self, name: str) -> Any:
        '''What the outcome of an operation that comes next depends on, beside its arguments and where it is.'''
        return None

    def _repeat(self, outcome: Outcome, reads: list[int], outputs: Sequence[torch.Tensor],
                written: Sequence[int]) -> None:
        '''Record an operation that another run has met, on tensors of which the same is known.'''
        for tensor, fields, storage in zip(outputs, outcome.operation.outputs, written):
            self._fields[id(tensor)] = fields
            if fields:
                self._owners[storage] = tensor
        self._mark(written, VANISHING, outcome.vanishes)
        self.operations.append(outcome.operation.repeated(reads, self._renewed(outputs)))

    def _refuse(self, known: Known, args: Any, inputs: list[torch.Tensor]) -> None:
        '''Refuse what cannot be traced.'''
        if known.traits.needs_value:
            refuse_values(self, known.name, inputs)
        masks = [at for at in args[1] if at is not None and at.dtype == torch.bool] if known.name == 'index' else []
        if known.traits.counts or masks:
            refuse_counts(self, known.name, masks or inputs)

    def _meet(self, tensor: torch.Tensor) -> list[Field]:
        '''Know a tensor that no operation made, an alias or a constant; returned are fields that an alias misses.'''
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
                    labels = narrowed_to(labels, dims)
                    shape = tuple([size if dim in dims else 1 for dim, size in enumerate(tensor.shape)])
                    fields.append(Field(labels if labels.shape == shape else np.broadcast_to(labels, shape), dims))
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

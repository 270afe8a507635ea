'''What a trace keeps: the recorded operations, and facts about tensors.'''
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch.utils.flop_counter import flop_registry

from ._calls import Site
from ._labels import Field, Labels, same

MANY = 64


@dataclass(slots=True)
class Operation:
    '''One recorded ATen call.

    ``inputs`` and ``outputs`` hold the fields of each tensor, ``reads`` and ``writes`` number the values they had. The
    other lists are what its rule stated: ``ties`` and ``locks``; arrays whose rows must lose equally many labels
    (``balances``); labels that were ``contracted``; of these, those on the side of a weight (``consumers``) or between
    two activations (``paired``); labels that a weight brought forth (``producers``); labels that vary along a stack of
    matrices and within them (``joint``).
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
    balances: list[Labels] = field(default_factory=list)
    contracted: list[Labels] = field(default_factory=list)
    consumers: list[Labels] = field(default_factory=list)
    paired: list[Labels] = field(default_factory=list)
    producers: list[Labels] = field(default_factory=list)
    joint: list[Labels] = field(default_factory=list)
    flops: int = 0

    def repeated(self, reads: list[int], writes: list[int]) -> Operation:
        '''The same operation on other values, with the lists of this one; see :func:`distinct`.'''
        return Operation(self.name, self.site, self.kind, self.inputs, self.outputs, reads, writes, self.active,
                         self.shapes, self.scalars, self.layouts, self.decisions, self.ties, self.locks, self.balances,
                         self.contracted, self.consumers, self.paired, self.producers, self.joint, self.flops)

    def states_the_same(self, other: Operation) -> bool:
        '''Whether it says of the same fields what another one says, as batch norm does in both modes.'''
        if self.outputs is other.outputs:
            return True
        if [list(map(id, found)) for found in self.inputs] != [list(map(id, found)) for found in other.inputs]:
            return False
        if [reason for _, reason in self.locks] != [reason for _, reason in other.locks]:
            return False
        return all(len(mine) == len(theirs) and all(map(same, mine, theirs))
                   for mine, theirs in zip(self._statements(), other._statements()))

    def _statements(self) -> Iterator[list[Labels]]:
        yield [labels for tie in self.ties for labels in tie]
        yield [labels for labels, _ in self.locks]
        yield from (self.balances, self.contracted, self.consumers, self.paired, self.producers, self.joint)
        yield [field.labels for found in self.outputs[:1] for field in found]

    def fields(self) -> Iterator[Field]:
        '''All fields that meet in the operation.'''
        for found in (*self.inputs, *self.outputs):
            yield from found

    def __str__(self) -> str:
        return f'{self.name} in {self.site.module or "the network itself"}'


def distinct(operations: Iterable[Operation]) -> list[Operation]:
    '''Operations without those that state what an earlier one at the same site did.'''
    found: list[Operation] = []
    earlier: dict[tuple[str, Site], list[Operation]] = {}
    for operation in operations:
        alike = earlier.setdefault((operation.name, operation.site), [])
        if not any(operation.states_the_same(other) for other in alike):
            alike.append(operation)
            found.append(operation)
    return found


class Argument(NamedTuple):
    '''A tensor that a function was given: the number of its value, whether it depends on the input, its shape.'''

    value: int
    active: bool
    shape: tuple[int, ...]


@dataclass(slots=True)
class FunctionCall:
    '''One call of a torch function from Python that was given activations.

    Its tensor arguments; the values that it returned; the operations it ran; and which argument it wrote into, if any.
    '''

    site: Site
    arguments: list[Argument]
    results: list[int]
    operations: list[Operation]
    in_place: int | None

    @property
    def active(self) -> list[int]:
        '''The positions of the arguments that depend on the network's input.'''
        return [position for position, argument in enumerate(self.arguments) if argument.active]


def storage_key(tensor: torch.Tensor) -> int:
    '''Equal for views of one tensor, as long as one of them is alive.'''
    return int(tensor.untyped_storage()._cdata)


def count_flops(packet: Any, args: Any, kwargs: Any, result: Any) -> int:
    '''Torch's own count; its formulas take shapes, and the wrapper that finds them in nested arguments is slow.'''
    if packet is torch.ops.aten.addmm:  # whose formula asks for that of mm, with its wrapper
        packet, args = torch.ops.aten.mm, args[1:3]
    formula = getattr(flop_registry[packet], '__wrapped__', None)
    if formula is None or not isinstance(result, torch.Tensor):
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    shapes = [value.shape if isinstance(value, torch.Tensor) else value for value in args]
    return int(formula(*shapes, **kwargs, out_shape=result.shape))


def numbers_in(value: Any) -> list[float]:
    '''All numbers and flags in nested arguments.'''
    if isinstance(value, (int, float)):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    found: list[float] = []
    for item in value:
        kind = type(item)
        if kind is int or kind is float or kind is bool:
            found.append(item)
        elif kind is list or isinstance(item, (int, float, tuple, list, dict)):
            found += numbers_in(item)
    return found


def numbers_of(tensor: torch.Tensor) -> list[float]:
    '''The numbers that a constant holds; of many, the first and a checksum of the others.'''
    flat = tensor.detach().reshape(-1)
    numbers: list[float] = flat[:MANY].double().tolist()
    if len(flat) > MANY:
        numbers.append(crc32(flat[MANY:].cpu().contiguous().view(torch.uint8).numpy().tobytes()))
    return numbers

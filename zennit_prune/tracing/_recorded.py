'''The records that a trace keeps of operations and of calls of torch functions.'''
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
    '''The record of one ATen call, with the statements of its rule.

    Attributes
    ----------
    name: str
        The operation without namespace, overload and in-place underscore.
    site: Site
        The Python-level call that it ran in.
    kind: str
        The class name of the module that it ran in.
    inputs, outputs: list of list of Field
        The fields of each tensor among its arguments and its results.
    reads, writes: list of int
        The numbers of the values that these tensors held.
    active: list of bool
        Whether each argument depends on the network's input.
    shapes: list of tuple of int
        The shapes of the results.
    scalars: list of float
        The numbers of the call that pruning may not change.
    layouts: list of list of tuple of int or None
        For each candidate of each result, the dimensions along which it varies, or None where it bears no label.
    decisions: dict of str to object
        The answers of :meth:`Call.decide`.
    ties: list of pairs of numpy.ndarray
        Labels that are removed or stay together.
    locks: list of pairs of numpy.ndarray and str
        Labels that must stay, and why.
    balances: list of numpy.ndarray
        Arrays of labels whose rows must lose equally many.
    contracted: list of numpy.ndarray
        Labels that were summed over in a product.
    consumers, paired: list of numpy.ndarray
        Of the contracted labels, those on the side of a weight, and those of products of two activations.
    producers: list of numpy.ndarray
        Labels of channels that a weight produces.
    joint: list of numpy.ndarray
        Labels that vary along a stack of matrices and within the matrices.
    flops: int
        The floating-point operations of the call.
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
        '''Copy the record for other values; the copy shares the lists of this one, see :func:`distinct`.'''
        return Operation(self.name, self.site, self.kind, self.inputs, self.outputs, reads, writes, self.active,
                         self.shapes, self.scalars, self.layouts, self.decisions, self.ties, self.locks, self.balances,
                         self.contracted, self.consumers, self.paired, self.producers, self.joint, self.flops)

    def states_the_same(self, other: Operation) -> bool:
        '''Return whether the statements equal those of another record, as those of batch norm do in both modes.'''
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
        '''Yield all fields that meet in the operation.'''
        for found in (*self.inputs, *self.outputs):
            yield from found

    def __str__(self) -> str:
        return f'{self.name} in {self.site.module or "the network itself"}'


def distinct(operations: Iterable[Operation]) -> list[Operation]:
    '''Return the operations without those that repeat the statements of an earlier one at the same site.'''
    found: list[Operation] = []
    earlier: dict[tuple[str, Site], list[Operation]] = {}
    for operation in operations:
        alike = earlier.setdefault((operation.name, operation.site), [])
        if not any(operation.states_the_same(other) for other in alike):
            alike.append(operation)
            found.append(operation)
    return found


class Argument(NamedTuple):
    '''A tensor argument: the number of its value, whether it depends on the network's input, and its shape.'''

    value: int
    active: bool
    shape: tuple[int, ...]


@dataclass(slots=True)
class FunctionCall:
    '''One call of a torch function from Python with activations among its arguments.

    Attributes
    ----------
    site: Site
        The place of the call.
    arguments: list of Argument
        Its tensor arguments.
    results: list of int
        The numbers of the values that it returned.
    operations: list of Operation
        The operations that it ran.
    in_place: int or None
        The position of the argument that it wrote into, if any.
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
    '''Return a number that views of one tensor have in common as long as one of them is alive.'''
    return int(tensor.untyped_storage()._cdata)


def count_flops(packet: Any, args: Any, kwargs: Any, result: Any) -> int:
    '''Count FLOPs by torch's formulas, without the slow wrapper that looks for shapes in nested arguments.'''
    if packet is torch.ops.aten.addmm:  # whose formula asks for that of mm, with its wrapper
        packet, args = torch.ops.aten.mm, args[1:3]
    formula = getattr(flop_registry[packet], '__wrapped__', None)
    if formula is None or not isinstance(result, torch.Tensor):
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    shapes = [value.shape if isinstance(value, torch.Tensor) else value for value in args]
    return int(formula(*shapes, **kwargs, out_shape=result.shape))


def numbers_in(value: Any) -> list[float]:
    '''Return all numbers and flags in nested arguments.'''
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
    '''Return the numbers that a constant holds; of many, the first and a checksum of the others.'''
    flat = tensor.detach().reshape(-1)
    numbers: list[float] = flat[:MANY].double().tolist()
    if len(flat) > MANY:
        numbers.append(crc32(flat[MANY:].cpu().contiguous().view(torch.uint8).numpy().tobytes()))
    return numbers

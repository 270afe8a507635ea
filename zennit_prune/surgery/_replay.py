'''The proof: a narrowed network is traced again and must be the original with the removed labels deleted.

Operation by operation, names, numbers, shapes, the labels *in order*, ties and locks are compared. The first difference
names the operation that does not survive pruning: a hard-coded size, an uneven split, a scale computed from a width.
'''
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..tracing._calls import CallCounter
from ..tracing._labels import BlockField, Field, Labels, every, same, varies
from ..tracing._recorded import Operation
from ..tracing._trace import Recording, run_network
from ..tracing._tracer import ForwardError, Outcome, Tracer
from ..util._display import some
from ..util._networks import structural_copy
from ._surgery import Solved

Kept = dict[int, npt.NDArray[np.bool_]]


class Mismatch(Exception):
    '''The pruned network does something else than the original with the removed channels deleted.'''


@dataclass
class Failure:
    '''The first difference that a replay found.

    Attributes
    ----------
    operation: Operation
        The operation of the original.
    index: int
        Its number in the run.
    mode: str
        The name of the run, such as ``'eval'`` or ``'train'``.
    reason: str
        The difference, in words.
    '''

    operation: Operation
    index: int
    mode: str
    reason: str

    def __str__(self) -> str:
        return f'{self.reason} ({self.operation})'


class Deletion:
    '''Delete the ``removed`` labels from fields; results are kept, since most fields flow through many operations.'''

    def __init__(self, removed: npt.NDArray[np.bool_]):
        self.removed = removed
        self._kept: dict[int, tuple[Field, Kept]] = {}
        self._results: dict[tuple[int, ...], tuple[list[Field], Kept]] = {}
        self._shapes: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, ...]] = {}

    def kept(self, field: Field) -> Kept:
        '''Return the positions that stay, for each dimension along which some are removed.'''
        if id(field) not in self._kept:
            kept: Kept = {}
            gone = self.removed[field.labels]
            if not every(~gone):
                if len(field.dims) == 1:
                    kept[field.dims[0]] = np.logical_not(gone.reshape(-1))
                for dim in field.dims if not kept else ():
                    whole = gone.all(axis=tuple(d for d in range(gone.ndim) if d != dim))
                    if whole.any():
                        kept[dim] = np.logical_not(whole)
            self._kept[id(field)] = field, kept
        return self._kept[id(field)][1]

    def __call__(self, fields: list[Field]) -> tuple[list[Field], Kept]:
        '''Return the fields of a tensor after the deletion, and the positions kept per dimension.'''
        key = tuple(map(id, fields))
        if key not in self._results:
            kept: Kept = {}
            for field in fields:
                for dim, mask in self.kept(field).items():
                    kept[dim] = kept[dim] & mask if dim in kept else mask
            self._results[key] = [self._narrowed(field, kept) for field in fields], kept
        return self._results[key]

    def shape(self, fields: list[Field], shape: tuple[int, ...]) -> tuple[int, ...]:
        '''Return the shape of a tensor with these fields after the deletion.'''
        key = tuple(map(id, fields)), shape
        if key not in self._shapes:
            kept = self(fields)[1]
            self._shapes[key] = tuple(int(np.count_nonzero(kept[dim])) if dim in kept else size
                                      for dim, size in enumerate(shape))
        return self._shapes[key]

    def _narrowed(self, field: Field, kept: Kept) -> Field:
        labels = field.labels
        for dim, mask in kept.items():
            if dim in field.dims:
                labels = Labels(np.compress(mask, labels, dim))
        if isinstance(field, BlockField):
            narrowed = BlockField(labels).without(self.removed)
            if narrowed is None:
                raise Mismatch('the blocks of a grouped convolution lose different numbers of channels')
            return narrowed
        if len(field.dims) > 1 and self.removed[labels].any():
            raise Mismatch('the removed channels do not form a block of the tensor')
        return field if labels is field.labels else Field(labels, field.dims)


class Replayer(Tracer):
    '''Trace a pruned network and compare every operation with the original's.'''

    counts_flops = False

    def __init__(self, calls: CallCounter, parameters: Mapping[int, str], expected: list[Operation], deletion: Deletion,
                 solution: Solved):
        super().__init__(calls, parameters)
        self.expected, self.deletion, self.solution = expected, deletion, solution
        self._equal: set[tuple[int, int]] = set()
        self._new: list[Operation] = []  # that no other run has met

    def context(self, name: str) -> int | None:
        expected = self._counterpart(name)
        return None if expected is None else id(expected.outputs)

    def begin(self, name: str) -> Operation:
        operation = super().begin(name)
        expected = self._counterpart(name)
        if expected is not None:
            operation.decisions = dict(expected.decisions)
        return operation

    def _counterpart(self, name: str) -> Operation | None:
        index = len(self.operations)
        found = self.expected[index] if index < len(self.expected) else None
        return found if found is not None and found.name == name else None

    def dims_of(self, option: Field | Labels, operation: Operation, output: int, rank: int) -> tuple[int, ...] | None:
        if isinstance(option, Field):
            return option.dims
        expected = self._counterpart(operation.name)
        if expected is None or output >= len(expected.layouts) or rank >= len(expected.layouts[output]):
            raise Mismatch(f'the pruned network runs {operation.name} here')
        dims = expected.layouts[output][rank]
        if any(varies(option, dim) for dim in range(option.ndim) if dim not in (dims or ())):
            raise Mismatch('channels end up along another dimension')
        return dims

    def record(self, operation: Operation) -> None:
        expected = self._counterpart(operation.name)
        if expected is None:
            raise Mismatch(f'the pruned network runs {operation.name} here')
        if expected.scalars != operation.scalars:
            _compare(expected.scalars, operation.scalars)
        if len(expected.outputs) != len(operation.outputs):
            raise Mismatch(f'{operation.name} returns {len(operation.outputs)} tensors, not {len(expected.outputs)}')
        for fields, shape, new_fields, new_shape in zip(expected.outputs, expected.shapes,
                                                        operation.outputs, operation.shapes):
            narrowed, _ = self.deletion(fields)
            narrow_shape = self.deletion.shape(fields, shape)
            if narrow_shape != new_shape:
                raise Mismatch(f'a tensor of shape {shape} becomes {new_shape}, not {narrow_shape}')
            if len(narrowed) != len(new_fields):
                raise Mismatch('other channels come out')
            for old, new in zip(narrowed, new_fields):
                if old is not new and (id(old), id(new)) not in self._equal:
                    if old.dims != new.dims or not same(old.labels, new.labels):
                        raise Mismatch('other channels come out')
                    self._equal.add((id(old), id(new)))
        self._new.append(operation)
        super().record(operation)

    def finish(self, outputs: Sequence[torch.Tensor]) -> None:
        '''Check at the end that nothing is tied or locked that the original does not tie or lock.'''
        super().finish(outputs)
        for operation in self._new:
            reason = self._new_statement(operation)
            if reason:
                index = next(index for index, found in enumerate(self.operations) if found is operation)
                del self.operations[index:]
                raise Mismatch(reason)

    def _new_statement(self, operation: Operation) -> str:
        component, locked = self.solution.component, self.solution.locked
        for left, right in operation.ties:
            left_roots, right_roots = component[left], component[right]
            if same(left_roots, right_roots):
                continue
            apart = left_roots != right_roots
            if apart.any() and not all(locked[np.broadcast_to(side, apart.shape)[apart]].all()
                                       for side in (left, right)):
                return 'other channels meet'
        return next((reason for labels, reason in operation.locks if not every(locked[labels])), '')


def _compare(old: list[float], new: list[float]) -> None:
    '''Refuse numbers that differ; one NaN equals another.'''
    if len(old) != len(new):
        shown = [some([f'{number:.6g}' for number in numbers], 4) for numbers in (old, new)]
        raise Mismatch(f'numbers change with the number of channels, from [{shown[0]}] to [{shown[1]}]')
    for before, after in zip(old, new):
        if before != after and (before == before or after == after):
            raise Mismatch(f'a number changes with the number of channels, from {before:.6g} to {after:.6g}')


def replay(recording: Recording, solution: Solved, pruned: nn.Module,
           removed: npt.NDArray[np.bool_]) -> Failure | None:
    '''Trace ``pruned`` and compare it with the recorded original.

    Parameters
    ----------
    recording: Recording
        The original network.
    solution: Solved
        Its channels.
    pruned: torch.nn.Module
        The narrowed network, a copy of its own without data: ``forward`` may write into it.
    removed: numpy.ndarray
        For each label, whether it was removed.

    Returns
    -------
    Failure or None
        The first difference, or None if there is none.
    '''
    deletion = Deletion(removed)
    outcomes: dict[Any, Outcome] | None = {} if len(recording.runs) > 1 else None
    fields = {name: deletion(list(found))[0] for name, found in recording.fields.items()}
    for mode, run in recording.runs.items():
        tracers: list[Replayer] = []

        def tracer_type(calls: CallCounter, parameters: Mapping[int, str], made: list[Replayer] = tracers,
                        expected: list[Operation] = run.operations) -> Replayer:
            made.append(Replayer(calls, parameters, expected, deletion, solution))
            return made[-1]

        example, last = run.example.fitted(pruned), mode == list(recording.runs)[-1]
        as_it_is = last and example.device == recording.device
        network = pruned if as_it_is else structural_copy(pruned, example.device)
        try:
            run_network(network, example, run.training, tracer_type, fields, recording.shapes, outcomes=outcomes)
            done, reason = len(tracers[-1].operations), 'the pruned network runs fewer operations'
        except ForwardError as error:
            mismatch = isinstance(error.__cause__, Mismatch)
            done, reason = error.index, str(error.__cause__ if mismatch else error)
        if done < len(run.operations):
            return Failure(run.operations[done], done, mode, reason)
    return None

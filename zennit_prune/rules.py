'''What a rule is: a statement of what one ATen operation does to label fields.

A rule is a function of one :class:`Call`. It returns, for every output tensor, the candidates for that tensor's fields:
a :class:`~zennit_prune.labels.Field`, or a plain label array whose varying dimensions are yet to be found. On the way
it *ties* labels that must go together and *locks* labels that must stay. An operation without a rule locks all that
flows into it.

The rules themselves are in ``operations.py`` and, for operations with weights, in ``contractions.py``.
'''
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .labels import Field, Labels, first
from .networks import tensors_in

if TYPE_CHECKING:
    from .recorded import Operation
    from .tracer import Tracer

Candidates = Sequence[Sequence[Field | Labels]]
Rule = Callable[['Call'], Candidates]

RULES: dict[str, Rule] = {}


class NoRule(Exception):
    '''Raised by a rule that does not cover the case at hand; the operation then locks what flows into it.'''


class Call:
    '''One ATen call as a rule sees it.

    Attributes
    ----------
    name: str
        The operation without its namespace, overload and in-place underscore, e.g. ``'add'``.
    args, kwargs:
        What the operation was called with; tensors hold no data.
    outputs: list of torch.Tensor
        The tensors it returned.
    operation: Operation
        The record of this call, filled by the methods below.
    '''

    def __init__(self, tracer: Tracer, operation: Operation, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
                 outputs: list[torch.Tensor]):
        self.tracer, self.operation, self.func = tracer, operation, func
        self.args, self.kwargs, self.outputs = args, kwargs, outputs
        self.name = operation.name

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        '''An argument given by position or by name.'''
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def dim(self, position: int, name: str = 'dim', default: int = 0) -> int:
        '''A dimension argument, counted from the front of the first tensor.'''
        return int(self.argument(position, name, default)) % max(tensors_in(self.args)[0].dim(), 1)

    def fields(self, tensor: Any) -> list[Field]:
        '''The label fields of a tensor (none for anything else).'''
        return self.tracer.fields_of(tensor)

    def is_weight(self, tensor: torch.Tensor) -> bool:
        '''Whether a tensor depends on parameters only, not on the network's input.'''
        return not self.tracer.is_active(tensor)

    def is_uniform(self, tensor: torch.Tensor) -> bool:
        '''Whether a tensor without labels is constant or independent noise, so that it fits any choice of channels.'''
        return self.tracer.is_uniform(tensor) and not self.fields(tensor)

    @property
    def in_place(self) -> bool:
        '''Whether the operation writes into its first argument.'''
        return bool(self.outputs) and any(self.outputs[0] is tensor for tensor in tensors_in((self.args, self.kwargs)))

    def tie(self, left: Labels, right: Labels) -> None:
        '''Labels at the same position of two arrays go or stay together (arrays broadcast).'''
        self.operation.ties.append((left, right))

    def tie_along(self, field: Field, dims: Iterable[int]) -> Field:
        '''Tie the labels along ``dims``; return the field without these dimensions.'''
        labels = field.labels
        for dim in dims:
            if dim in field.dims:
                self.tie(labels, first(labels, dim))
                labels = first(labels, dim)
        return Field(labels, tuple(dim for dim in field.dims if dim not in dims))

    def lock(self, reason: str, *fields: Field | Labels) -> None:
        '''The labels of ``fields`` must stay; ``reason`` is what the user reads.'''
        for field in fields:
            self.operation.locks.append((field.labels if isinstance(field, Field) else field, reason))

    def decide(self, question: str, answer: Any) -> Any:
        '''Keep an answer that depends on sizes: the trace of a pruned network is given the original's answer.'''
        return self.operation.decisions.setdefault(question, answer)

    def vector(self, tensor: torch.Tensor, dim: int) -> Labels | None:
        '''The labels of ``tensor`` along ``dim`` alone, or None; labels that vary elsewhere are tied or locked.'''
        result: Labels | None = None
        for field in self.fields(tensor):
            if dim not in field.dims:
                self.lock('it varies along a dimension other than the channels', field)
                continue
            vector = self.tie_along(field, [d for d in field.dims if d != dim]).labels.reshape(-1)
            if result is None:
                result = vector
            else:
                self.tie(result, vector)
        return result


def operation_rule(*names: str) -> Callable[[Rule], Rule]:
    '''Register a rule for ATen operations, named without namespace and overload.'''
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule
    return register

'''What a rule is: a statement of what one ATen operation does to label fields.

A rule is a function of one :class:`Call`. It returns, for every output tensor, the candidates for that tensor's fields:
a :class:`~zennit_prune.labels.Field`, or a plain label array whose varying dimensions are yet to be found. On the way
it *ties* labels that must go together and *locks* labels that must stay. An operation without a rule locks all that
flows into it.

The rules themselves are in ``operations.py`` and, for operations with weights, in ``contractions.py``; users add theirs
with :func:`register_operation`. Beside its rule, an operation is registered with what else is known of it
(:class:`Traits`).
'''
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from ..errors import PruneError
from ..util._networks import tensors_in
from ._calls import Site
from ._labels import Field, Labels, first, flat, in_rows
from ._recorded import Operation

Candidates = Sequence[Sequence[Field | Labels]]
Rule = Callable[['Call'], Candidates]
KERNEL = 'it is a kernel dimension'


@dataclass(frozen=True)
class Traits:
    '''What is known of an operation beside its rule; several only matter where numbers or constants are compared.

    Attributes
    ----------
    rule: callable or None
        What it does to labels.
    pointwise: bool
        It acts on each element by itself, on tensors that broadcast, and needs no rule.
    transparent: bool
        Its result is the same value, perhaps a copy or a view of it.
    constant: bool
        It makes a constant or independent noise, as large as asked for.
    refills: bool
        It overwrites a tensor with a constant or with independent noise.
    sized: bool
        Its whole numbers are sizes, which follow the channels.
    size_free: bool
        What it makes of a constant is as constant, of whatever size.
    needs_value: bool
        It hands a value to Python.
    counts: bool
        How many values it returns depends on values.
    zero: str
        When a channel of its result is zero: where ``'all'`` labelled inputs are, where ``'any'`` factor, or the
        ``'first'`` input is; where ``'terms'``, all inputs, are; ``'never'`` for certain. By default ``'all'``, and for
        pointwise operations ``'never'``.
    '''

    rule: Rule | None = None
    pointwise: bool = False
    transparent: bool = False
    constant: bool = False
    refills: bool = False
    sized: bool = False
    size_free: bool = False
    needs_value: bool = False
    counts: bool = False
    zero: str = ''


UNKNOWN = Traits()
OPERATIONS: dict[str, Traits] = {}


class Tracing(Protocol):
    '''What a rule may ask the tracer that calls it.'''

    layernorm: str
    whole: frozenset[Site]

    def fields_of(self, tensor: Any) -> list[Field]:
        '''The label fields of a tensor.'''

    def is_active(self, tensor: torch.Tensor) -> bool:
        '''Whether a tensor depends on the network's input.'''

    def is_uniform(self, tensor: torch.Tensor) -> bool:
        '''Whether a tensor is constant or independent noise.'''

    def vanishes(self, tensor: torch.Tensor) -> bool:
        '''Whether a tensor is zero where its channels are.'''

    def is_parameter(self, tensor: torch.Tensor) -> bool:
        '''Whether a tensor is a parameter or buffer of the network.'''

    def is_view_of_parameter(self, tensor: torch.Tensor) -> bool:
        '''Whether a tensor shares its memory with a parameter or buffer of the network.'''

    def keep_group_size(self, weight: torch.Tensor, size: int) -> None:
        '''Record that the module of a weight has one group for so many of its channels.'''


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

    def __init__(self, tracer: Tracing, operation: Operation, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
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

    def balance(self, blocks: Labels) -> None:
        '''Every row of ``blocks``, shape (blocks, ...), must lose equally many labels, whichever they are.'''
        self.operation.balances.append(in_rows(blocks, len(blocks)))

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
            vector = flat(self.tie_along(field, [d for d in field.dims if d != dim]).labels)
            if result is None:
                result = vector
            else:
                self.tie(result, vector)
        return result


def declare(*names: str, **traits: Any) -> None:
    '''State traits of ATen operations, named without namespace and overload, beside those already stated.'''
    for name in names:
        OPERATIONS[name] = replace(OPERATIONS.get(name, UNKNOWN), **traits)


def operation_rule(*names: str, **traits: Any) -> Callable[[Rule], Rule]:
    '''Register a rule for ATen operations, with further traits.'''
    def register(rule: Rule) -> Rule:
        declare(*names, rule=rule, **traits)
        return rule
    return register


def operation_name(schema_name: str) -> str:
    '''The name an operation is registered under: ``'add'`` for ``'aten::add_'``, others with their namespace.'''
    name = schema_name.removeprefix('aten::')
    return name[:-1] if name.endswith('_') and not name.endswith('__') else name


OF_USERS: set[str] = set()


def register_operation(*names: str, pointwise: bool = False,
                       zero: str = '') -> Callable[[Rule], Rule]:
    '''Teach the trace a custom operator, or an ATen operation that no rule covers.

    A rule says what the operation does to label fields. It is called with one :class:`~zennit_prune.rules.Call`, while
    the network is traced: ``call.args`` and ``call.kwargs`` are the arguments, ``call.fields(tensor)`` the fields of a
    tensor, ``call.tie(left, right)`` couples labels, ``call.balance(blocks)`` makes rows of labels lose equally many,
    ``call.lock(reason, field, ...)`` keeps channels. It returns, for every output tensor, the list of its fields:
    :class:`~zennit_prune.labels.Field`, or label arrays that broadcast to the tensor. Everything is proven all the
    same: the narrowed network is traced again under the same rule, and must be the original with the removed channels
    deleted; numbers are compared after.

    The operator needs a kernel for meta tensors (``torch.library.register_fake``), or the trace runs on real values.

    Parameters
    ----------
    *names: str
        Operations with their namespace, without overload: ``'mylib::scale'``, ``'aten::cummax'``.
    pointwise: bool
        It acts on each element by itself and on tensors that broadcast: labels that meet are tied, and no rule is
        needed. Call it without decorating anything.
    zero: str
        When a channel of its result is zero, so that a masked network can be made: where ``'all'`` labelled inputs are
        (the default), ``'any'`` of them, the ``'first'``, or ``'never'`` (the default of pointwise operations).

    Returns
    -------
    callable
        A decorator that registers a rule and returns it.

    Raises
    ------
    PruneError
        For a name without namespace, or an operation that the library has a rule for.

    Examples
    --------
    >>> register_operation('mylib::scaled_relu', pointwise=True, zero='all')
    >>> @register_operation('mylib::swap_halves')
    ... def swap_halves(call):
    ...     return [[np.roll(field.labels, field.labels.shape[1] // 2, 1) for field in call.fields(call.args[0])]]
    '''
    if zero not in ('', 'all', 'any', 'first', 'never'):
        raise PruneError(f"zero={zero!r} is not one of 'all', 'any', 'first', 'never'.")
    if not names:
        raise PruneError("no operation is named: register_operation('mylib::scale').")
    keys = []
    for name in names:
        if not isinstance(name, str) or '::' not in name or '.' in name:
            raise PruneError(f"{name!r} is no operation: name it with its namespace and without overload, e.g. "
                             "'mylib::scale' or 'aten::cummax'.")
        keys.append(operation_name(name))
        if keys[-1] in OPERATIONS and keys[-1] not in OF_USERS:
            raise PruneError(f'{name!r} has a rule already, which cannot be replaced.')
    OF_USERS.update(keys)
    for key in keys:
        OPERATIONS[key] = Traits(pointwise=pointwise, zero=zero)

    def register(rule: Rule) -> Rule:
        for key in keys:
            OPERATIONS[key] = Traits(rule=rule, zero=zero)
        return rule

    return register


def check_candidates(call: Call, candidates: Candidates) -> None:
    '''Refuse what cannot be the fields of the outputs, with an error that names the operation.'''
    where = f'the rule of {call.func}, run in module {call.operation.site.module!r},'
    if not isinstance(candidates, (list, tuple)) or len(candidates) != len(call.outputs):
        raise PruneError(f'{where} must return one list of fields for each of its {len(call.outputs)} output tensors, '
                         f'not {candidates!r}.')
    for tensor, options in zip(call.outputs, candidates):
        for option in options:
            labels = option.labels if isinstance(option, Field) else option
            whole = option.dims if isinstance(option, Field) else ()
            fits = labels.ndim == tensor.dim() and all(
                labels.shape[dim] == size or (labels.shape[dim] == 1 and dim not in whole)
                for dim, size in enumerate(tensor.shape))
            if not fits:
                raise PruneError(f'{where} gives labels of shape {labels.shape} to a tensor of shape '
                                 f'{tuple(tensor.shape)}: they must broadcast to it.')

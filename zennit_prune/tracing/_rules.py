'''A rule states what one ATen operation does to label fields.

A rule is a function of one :class:`Call`. It returns, for every output tensor, the candidates for that tensor's fields:
a :class:`~zennit_prune.tracing.Field`, or a plain label array whose varying dimensions are yet to be found. On the way
it *ties* labels that must go together and *locks* labels that must stay. An operation without a rule locks all labels
that flow into it.

The rules themselves are in ``_operations.py`` and, for operations with weights, in ``_contractions.py``; users add
theirs with :func:`register_operation`. Beside its rule, an operation is registered with its other properties
(:class:`Traits`).
'''
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from ..errors import PruneError, names_options
from ..util._networks import tensors_in
from ._calls import Site
from ._labels import Field, Labels, first, flat, in_rows
from ._recorded import Operation

Candidates = Sequence[Sequence[Field | Labels]]
Rule = Callable[['Call'], Candidates]
KERNEL = 'it is a kernel dimension'


@dataclass(frozen=True)
class Traits:
    '''The properties of an operation; several only matter where numbers or constants are compared.

    Attributes
    ----------
    rule: callable or None
        The function that states what the operation does to labels.
    pointwise: bool
        The operation acts on each element by itself, on tensors that broadcast, and needs no rule.
    transparent: bool
        The result is the input's value, perhaps a copy or a view of it.
    constant: bool
        The operation makes a constant or independent noise, as large as asked for.
    refills: bool
        The operation overwrites a tensor with a constant or with independent noise.
    sized: bool
        The whole numbers among the arguments are sizes, which follow the channels.
    size_free: bool
        The result for a constant of any size is a constant.
    needs_value: bool
        The operation hands a value to Python.
    counts: bool
        The number of values in the result depends on values.
    zero: str
        When a channel of the result is zero: where ``'all'`` labelled inputs are, where ``'any'`` factor, or the
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
    '''The questions that a rule may ask the tracer that calls it.'''

    layernorm: str
    whole: frozenset[Site]

    def fields_of(self, tensor: Any) -> list[Field]:
        '''Return the label fields of a tensor.'''

    def is_active(self, tensor: torch.Tensor) -> bool:
        '''Return whether a tensor depends on the network's input.'''

    def is_uniform(self, tensor: torch.Tensor) -> bool:
        '''Return whether a tensor is constant or independent noise.'''

    def vanishes(self, tensor: torch.Tensor) -> bool:
        '''Return whether a channel of a tensor is zero once the weights that produce it are.'''

    def is_parameter(self, tensor: torch.Tensor) -> bool:
        '''Return whether a tensor is a parameter or buffer of the network.'''

    def is_view_of_parameter(self, tensor: torch.Tensor) -> bool:
        '''Return whether a tensor shares its memory with a parameter or buffer of the network.'''

    def keep_group_size(self, weight: torch.Tensor, size: int) -> None:
        '''Record that the module of ``weight`` has one group for each ``size`` of its channels.'''


class NoRule(Exception):
    '''Raised by a rule that does not cover the case at hand, so that all channels that flow into the operation stay.

    Examples
    --------
    >>> import torch
    >>> import zennit_prune as zp
    >>> from torch import nn
    >>> from zennit_prune.tracing import NoRule
    >>> @zp.register_operation('aten::cummin')
    ... def cummin(call):
    ...     fields = call.fields(call.args[0])
    ...     if any(call.dim(1) in field.dims for field in fields):
    ...         raise NoRule
    ...     return [fields, fields]  # of the values and of their positions
    >>> class Smallest(nn.Module):
    ...     def forward(self, x):
    ...         return x.cummin(1).values
    >>> model = nn.Sequential(nn.Linear(3, 8), Smallest(), nn.Linear(8, 4))
    >>> zp.trace(model, torch.zeros(1, 3)).locked['0']
    'no rule covers the operation aten.cummin.default (cummin in 1)'
    '''


class Call:
    '''One call of an ATen operation, as it is handed to the rule of that operation.

    Attributes
    ----------
    name: str
        The name of the operation without overload and in-place underscore, e.g. ``'add'``; with its namespace where
        that is not ``aten``.
    args: tuple
        The positional arguments of the call; tensors hold no data.
    kwargs: dict
        The keyword arguments of the call.
    outputs: list of torch.Tensor
        The tensors that the call returned.
    func: torch._ops.OpOverload
        The function that was called.
    operation: Operation
        The record of this call, which the methods fill.
    tracer: Tracing
        The tracer that met the call.

    Examples
    --------
    A call is made by the trace. It is kept here to be looked at:

    >>> import torch
    >>> import zennit_prune as zp
    >>> from torch import nn
    >>> calls = []
    >>> @zp.register_operation('aten::cumprod')
    ... def cumprod(call):
    ...     calls.append(call)
    ...     return [call.fields(call.args[0])]
    >>> class Products(nn.Module):
    ...     def forward(self, x):
    ...         return x.cumprod(2)
    >>> graph = zp.trace(nn.Sequential(nn.Conv1d(3, 8, 1), Products(), nn.Conv1d(8, 4, 1)), torch.zeros(1, 3, 6))
    >>> call = calls[0]
    >>> call.name, call.dim(1), call.outputs[0].shape
    ('cumprod', 2, torch.Size([2, 8, 6]))
    >>> call.fields(call.args[0])
    [Field(shape=(1, 8, 1), dims=(1,))]
    >>> call.argument(1, 'dim'), call.is_weight(call.args[0]), call.is_uniform(call.args[0])
    (2, False, False)
    '''

    def __init__(self, tracer: Tracing, operation: Operation, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
                 outputs: list[torch.Tensor]):
        self.tracer, self.operation, self.func = tracer, operation, func
        self.args, self.kwargs, self.outputs = args, kwargs, outputs
        self.name = operation.name

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        '''Return an argument that was given by position or by name.

        Parameters
        ----------
        position: int
            The position of the argument in the operation's schema.
        name: str
            The name of the argument in the operation's schema.
        default: object
            The value of an argument that was not given.

        Returns
        -------
        object
            The argument.
        '''
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def dim(self, position: int, name: str = 'dim', default: int = 0) -> int:
        '''Return an argument that is a dimension of the first tensor, counted from the front.

        Parameters
        ----------
        position: int
            The position of the argument in the operation's schema.
        name: str
            The name of the argument in the operation's schema.
        default: int
            The dimension where none was given.

        Returns
        -------
        int
            The dimension, from 0.
        '''
        return int(self.argument(position, name, default)) % max(tensors_in(self.args)[0].dim(), 1)

    def fields(self, tensor: Any) -> list[Field]:
        '''Return the label fields of a tensor.

        Parameters
        ----------
        tensor: torch.Tensor or object
            An argument or a result of the call.

        Returns
        -------
        list of Field
            The fields, in no particular order; none for a tensor without labels and for anything but a tensor.
        '''
        return self.tracer.fields_of(tensor)

    def is_weight(self, tensor: torch.Tensor) -> bool:
        '''Return whether a tensor depends on parameters only, not on the network's input.

        Parameters
        ----------
        tensor: torch.Tensor
            An argument or a result of the call.

        Returns
        -------
        bool
            Whether the tensor is a parameter or computed from parameters and constants alone.
        '''
        return not self.tracer.is_active(tensor)

    def is_uniform(self, tensor: torch.Tensor) -> bool:
        '''Return whether a tensor without labels is constant or independent noise.

        Such a tensor fits any choice of channels.

        Parameters
        ----------
        tensor: torch.Tensor
            An argument or a result of the call.

        Returns
        -------
        bool
            Whether no position of the tensor differs from another.
        '''
        return self.tracer.is_uniform(tensor) and not self.fields(tensor)

    @property
    def in_place(self) -> bool:
        '''Whether the operation writes into its first argument.'''
        return bool(self.outputs) and any(self.outputs[0] is tensor for tensor in tensors_in((self.args, self.kwargs)))

    def tie(self, left: Labels, right: Labels) -> None:
        '''Tie labels, so that they are removed together or stay together.

        Parameters
        ----------
        left: numpy.ndarray
            An array of labels.
        right: numpy.ndarray
            An array of labels that broadcasts with ``left``; labels at equal positions are tied.

        Examples
        --------
        >>> def both_halves(call):  # lose equal positions
        ...     for field in call.fields(call.args[0]):
        ...         left, right = np.split(field.labels, 2, field.dims[0])
        ...         call.tie(left, right)
        '''
        self.operation.ties.append((left, right))

    def balance(self, blocks: Labels) -> None:
        '''Let every block lose equally many labels, whichever they are.

        Parameters
        ----------
        blocks: numpy.ndarray
            An array of labels of shape (blocks, ...), with one row for each block.

        Examples
        --------
        >>> def both_halves(call):  # stay equally long
        ...     for field in call.fields(call.args[0]):
        ...         call.balance(field.labels.reshape(2, -1))
        '''
        self.operation.balances.append(in_rows(blocks, len(blocks)))

    def tie_along(self, field: Field, dims: Iterable[int]) -> Field:
        '''Tie the labels along some dimensions, so that they vary along the others only.

        Parameters
        ----------
        field: Field
            A field of a tensor.
        dims: iterable of int
            The dimensions.

        Returns
        -------
        Field
            The field with size 1 along ``dims``.

        Examples
        --------
        >>> def one_choice_for_all_positions(call):  # of the last two dimensions
        ...     ndim = call.args[0].dim()
        ...     return [[call.tie_along(field, (ndim - 2, ndim - 1)) for field in call.fields(call.args[0])]]
        '''
        labels = field.labels
        for dim in dims:
            if dim in field.dims:
                self.tie(labels, first(labels, dim))
                labels = first(labels, dim)
        return Field(labels, tuple(dim for dim in field.dims if dim not in dims))

    def lock(self, reason: str, *fields: Field | Labels) -> None:
        '''Lock labels, so that their channels stay.

        Parameters
        ----------
        reason: str
            The reason that ``graph.locked`` and ``graph.why`` give, e.g. ``'its rows are looked up by number'``.
        *fields: Field or numpy.ndarray
            The fields, or arrays of labels.

        Examples
        --------
        >>> def over_channels(call):
        ...     call.lock(f'{call.name} runs over it', *call.fields(call.args[0]))
        '''
        for field in fields:
            self.operation.locks.append((field.labels if isinstance(field, Field) else field, reason))

    def decide(self, question: str, answer: Any) -> Any:
        '''Keep an answer that depends on sizes, so that the trace of a pruned network uses the original's answer.

        Parameters
        ----------
        question: str
            The question, which is asked once a call.
        answer: object
            The answer for the sizes at hand.

        Returns
        -------
        object
            The answer for the sizes of the original network.

        Examples
        --------
        >>> def pairs(call):  # a pruned network of one channel would look as if it had no pairs
        ...     if call.decide('has pairs', call.args[0].shape[1] > 1):
        ...         call.balance(call.vector(call.args[0], 1).reshape(2, -1))
        '''
        return self.operation.decisions.setdefault(question, answer)

    def vector(self, tensor: torch.Tensor, dim: int) -> Labels | None:
        '''Return the labels of a tensor along one dimension; labels that vary elsewhere are tied or locked.

        Parameters
        ----------
        tensor: torch.Tensor
            An argument of the call.
        dim: int
            The dimension, from 0.

        Returns
        -------
        numpy.ndarray or None
            The labels, an array of shape (size of the dimension,), or None where the dimension bears none.

        Examples
        --------
        >>> def reversed_channels(call):
        ...     labels = call.vector(call.args[0], 1)
        ...     return [[] if labels is None else [Field.along(labels[::-1], 1, call.args[0].dim())]]
        '''
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
    '''Add traits to ATen operations, which are named without namespace and overload.'''
    for name in names:
        OPERATIONS[name] = replace(OPERATIONS.get(name, UNKNOWN), **traits)


def operation_rule(*names: str, **traits: Any) -> Callable[[Rule], Rule]:
    '''Register a rule for ATen operations, together with further traits.'''
    def register(rule: Rule) -> Rule:
        declare(*names, rule=rule, **traits)
        return rule
    return register


def operation_name(schema_name: str) -> str:
    '''Return the name that an operation is registered under: ``'add'`` for ``'aten::add_'``, else with a namespace.'''
    name = schema_name.removeprefix('aten::')
    return name[:-1] if name.endswith('_') and not name.endswith('__') else name


OF_USERS: set[str] = set()


@names_options()
def register_operation(*names: str, pointwise: bool = False,
                       zero: str = '') -> Callable[[Rule], Rule]:
    '''Teach the trace a custom operator, or an ATen operation that no rule covers.

    A rule states what the operation does to label fields. While a network is traced, it is called with one
    :class:`~zennit_prune.tracing.Call`: ``call.args`` and ``call.kwargs`` are the arguments, ``call.fields(tensor)``
    the fields of a tensor, ``call.tie(left, right)`` couples labels, ``call.balance(blocks)`` makes rows of labels lose
    equally many, ``call.lock(reason, field, ...)`` keeps channels. It returns, for every output tensor, the list of its
    fields: :class:`~zennit_prune.tracing.Field`, or label arrays that broadcast to the tensor. A wrong rule is noticed:
    the narrowed network is traced again under the rule and must be the original with the removed channels deleted, and
    numbers are compared after that.

    The operator needs a kernel for meta tensors (``torch.library.register_fake``), or the trace runs on real values.

    Parameters
    ----------
    *names: str
        The operations with their namespace, without overload, e.g. ``'mylib::scale'``, ``'aten::cummax'``.
    pointwise: bool
        Whether the operation acts on each element by itself and on tensors that broadcast. Labels that meet are tied,
        and no rule is needed: the call decorates nothing.
    zero: str
        When a channel of the result is zero, so that a masked network can be made: where ``'all'`` labelled inputs are
        (the default), ``'any'`` of them, the ``'first'``, or ``'never'`` (the default of pointwise operations).

    Returns
    -------
    callable
        A decorator that registers a rule and returns it.

    Raises
    ------
    PruneError
        If a name has no namespace, if the library has a rule for an operation, or if ``zero`` is none of its values.

    Examples
    --------
    Products along space keep channels apart, products over channels do not:

    >>> import torch
    >>> import zennit_prune as zp
    >>> from torch import nn
    >>> @zp.register_operation('aten::cumprod')
    ... def cumprod(call):
    ...     fields = []
    ...     for field in call.fields(call.args[0]):
    ...         if call.dim(1) in field.dims:
    ...             call.lock('cumprod runs over it', field)
    ...         else:
    ...             fields.append(field)
    ...     return [fields]
    >>> class Products(nn.Module):
    ...     def forward(self, x):
    ...         return x.cumprod(2)
    >>> model = nn.Sequential(nn.Conv1d(3, 8, 1), Products(), nn.Conv1d(8, 4, 1))
    >>> zp.trace(model, torch.zeros(1, 3, 6)).groups
    (ChannelGroup(name='0', size=8),)

    An operator that acts on each element by itself needs no rule:

    >>> decorator = zp.register_operation('mylib::scaled_relu', pointwise=True, zero='all')
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
    '''Refuse candidates that cannot be the fields of the outputs, with an error that names the operation.'''
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

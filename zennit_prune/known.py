'''What a tracer knows of operations and of storages.'''
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

from .labels import Field
from .operations import pointwise
from .recorded import Operation, numbers_in
from .rules import OF_USERS, OPERATIONS, UNKNOWN, Rule, Traits, operation_name
from .shapes import is_regular

SAME = {'_unsafe_view': 'view', 'reshape': 'view', '_reshape_copy': 'view'}
ACTIVE, UNIFORM, VANISHING, OWN = 1, 2, 4, 8  # what is known of a storage


class Known(NamedTuple):
    '''What is known of an operation, looked up once a run.'''

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
    '''What an operation did to labels, and whether its result is zero in a channel once its weights are.'''

    operation: Operation
    vanishes: bool


def fixed_numbers(known: Known, args: Any, kwargs: Any, fields: Sequence[Field]) -> list[float]:
    '''The numbers of a call that pruning may not change: all but the sizes of labelled dimensions.'''
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
    '''Whether a result is zero in a channel once all weights that bring it forth are.'''
    vanishing = [bool(fact & VANISHING) for fact in facts]
    if zero == 'all' or zero == 'any':
        labelled = [vanish for vanish, fields in zip(vanishing, operation.inputs) if fields]
        return bool(labelled) and all(labelled) if zero == 'all' else any(labelled) or bool(operation.producers)
    if zero == 'terms':
        return len(vanishing) > 1 and all(vanishing)
    if zero == 'never':
        return False
    return vanishing[:1] == [True] and (zero == 'first' or bool(operation.producers))  # 'first', 'bias'

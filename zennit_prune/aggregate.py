'''How relevance over space becomes one number, and which way suits the rules in force.'''
from __future__ import annotations

import torch
from zennit.core import Composite
from zennit.rules import AlphaBeta, Epsilon, Flat, Gamma, WSquare, ZBox, ZPlus

from .errors import PruneError
from .states import State

SIGNED_RULES = (AlphaBeta, Flat, Gamma, WSquare, ZBox, ZPlus)  # contributions of either sign are kept apart
AGGREGATES = ('auto', 'abs', 'sumabs', 'signed', 'positive')


def holds_lrp(composite: Composite) -> bool:
    '''Whether any rule in force is one of LRP.'''
    return any(isinstance(hook, (Epsilon, *SIGNED_RULES)) for hook in composite.hook_refs)


def suitable_aggregate(composite: Composite) -> str:
    '''What suits the rules in force: ``'sumabs'`` where most keep contributions of both signs apart, else ``'abs'``.'''
    apart = sum(isinstance(hook, SIGNED_RULES) for hook in composite.hook_refs)
    together = sum(isinstance(hook, Epsilon) for hook in composite.hook_refs)
    return 'sumabs' if apart > together else 'abs'


def aggregated(how: str, state: State, relevance: torch.Tensor, batch: int) -> torch.Tensor:
    '''The score of every sample and channel at a state, shape (batch, size of the group).'''
    if relevance.shape[0] % batch:
        raise PruneError(f'relevance at {state.place.module!r} has shape {tuple(relevance.shape)} for a batch of '
                         f'{batch}: its first dimension does not hold the samples.')
    if how == 'sumabs':
        return state.per_sample(relevance.abs(), batch)
    values = state.per_sample(relevance, batch)
    if how == 'abs':
        return values.abs()
    return values.clamp(min=0) if how == 'positive' else values

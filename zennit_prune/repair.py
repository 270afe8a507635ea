'''A stand-in.'''
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .errors import PruneError
from .networks import copied

if TYPE_CHECKING:
    from .plan import Plan


def repair(small: nn.Module, model: nn.Module, plan: Plan, data: Any, method: str = 'refit',
           progress: bool = True) -> nn.Module:
    '''Only ``'none'``.'''
    if method != 'none':
        raise PruneError(f'method={method!r}')
    return copied(small)

'''What a user's function says of a network.'''
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .errors import PruneError


def evaluated(evaluate: Callable[[nn.Module], Any], network: nn.Module) -> float:
    '''The number that ``evaluate`` returns, the higher the better.

    Raises
    ------
    PruneError
        If it is none.
    '''
    value = evaluate(network)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise PruneError(f'evaluate returned {value!r}: return a number, the higher the better.') from error

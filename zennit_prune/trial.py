'''Does a repair help for inputs that it did not see?'''
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .chunks import Inputs
from .divergence import Divergence, divergence, outputs
from .errors import PruneError

MANY = 32  # inputs: a fit to so many that leaves less than half of their error is no accident
PARTS = 4  # one of them is held out at a time


def objection(network: nn.Module, small: nn.Module, model: nn.Module, inputs: Inputs,
              repaired: Callable[[torch.Tensor], nn.Module]) -> str:
    '''What speaks against a repair, nothing if it helps.

    Where the answer is not clear from the inputs that the network was repaired with, or they are few, the repair is
    tried with three quarters of them, and judged by the others; of few inputs, every quarter judges in turn until the
    answer is clear. A single input judges it itself.

    Parameters
    ----------
    network, small, model: torch.nn.Module
        The repaired network, the one without repair and the original, all of the same type.
    inputs: Inputs
        What it was repaired with.
    repaired: callable
        Repairs ``small`` with some of the inputs.
    '''
    after: list[torch.Tensor] = []
    before: list[torch.Tensor] = []
    wanted: list[torch.Tensor] = []

    def compared(network: nn.Module, chosen: torch.Tensor) -> tuple[Divergence, Divergence]:
        '''How far the outputs are from the original's, repaired and not, for these and all inputs before.'''
        parts = [chunk.inputs for chunk in inputs.chunks(chosen)]
        for said, each in zip((after, before, wanted), (network, small, model)):
            said += outputs(each, parts)
        return divergence(after, wanted), divergence(before, wanted)

    if len(inputs) >= MANY:
        if _clear(*compared(network, inputs.order[:MANY])):
            return ''
        for said in (after, before, wanted):
            said.clear()
    for held in inputs.order.tensor_split(min(len(inputs), PARTS)):
        fitted = inputs.order[~torch.isin(inputs.order, held)]
        try:
            found, without = compared(repaired(fitted) if len(fitted) else network, held)
        except PruneError as error:
            return f'it cannot be tried with {len(fitted)} of the {len(inputs)} inputs ({error})'
        if _clear(found, without) or len(inputs) >= MANY:
            break
    if not found.worse_than(without):
        return ''
    tried = 'tried without some of the inputs, it brings the outputs for these' if len(fitted) else \
        'it brings the outputs for its only input'
    return f'{tried} from {without} to {found}, further from those of the original'


def _clear(after: Divergence, before: Divergence) -> bool:
    return 2 * after.error < before.error and 2 * after.kl <= before.kl

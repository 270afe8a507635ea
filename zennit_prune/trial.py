'''Does a repair help for inputs that it did not see?'''
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .chunks import Inputs
from .divergence import Divergence, divergence, outputs

MANY = 32  # inputs: a fit to so many that leaves less than half of their error is no accident


def objection(network: nn.Module, small: nn.Module, model: nn.Module, inputs: Inputs,
              repaired: Callable[[torch.Tensor], nn.Module]) -> str:
    '''What speaks against a repair, nothing if it helps.

    Where the answer is not clear from the inputs that the network was repaired with, the repair is tried with three
    quarters of them, and judged by the others. Fewer than four inputs judge it themselves.

    Parameters
    ----------
    network, small, model: torch.nn.Module
        The repaired network, the one without repair and the original, all of the same type.
    inputs: Inputs
        What it was repaired with.
    repaired: callable
        Repairs ``small`` with some of the inputs.
    '''
    def compared(network: nn.Module, chosen: torch.Tensor) -> tuple[Divergence, Divergence]:
        parts = [chunk.inputs for chunk in inputs.chunks(chosen)]
        after, before, wanted = (outputs(each, parts) for each in (network, small, model))
        return divergence(after, wanted), divergence(before, wanted)

    if len(inputs) >= MANY:
        after, before = compared(network, inputs.order[:MANY])
        if 2 * after.error < before.error and 2 * after.kl <= before.kl:
            return ''
    held, fitted = inputs.order.tensor_split([len(inputs) // 4])
    if len(held):
        after, before = compared(repaired(fitted), held)
        tried = f'tried with {len(fitted)} of the inputs, it brings the outputs for the other {len(held)}'
    else:
        after, before = compared(network, inputs.order)
        tried = f'it brings the outputs for all {len(inputs)} of its inputs'
    return f'{tried} from {before} to {after}, further from those of the original' if after.worse_than(before) else ''

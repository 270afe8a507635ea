'''Test on held-out inputs whether a repair brings a network's outputs closer to the original's, without labels.'''
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import PruneError
from ..util._arguments import call_network
from ..util._networks import map_tensors, output_tensors
from ._chunks import Inputs
from ._references import LEAST_CLASSES

MANY = 32  # a repair with at least so many inputs that halves their error needs no further trial
PARTS = 4  # the inputs are split into so many parts, of which one is held out at a time
LEAST_VARIANCE = 1e-12  # a smaller share of the mean square is rounding
NOISE = 1e-9  # a smaller share of the outputs' variance is squares of rounding errors


class Divergence(NamedTuple):
    '''The distance of outputs from those of the original.

    Attributes
    ----------
    error: float
        The mean squared error divided by the variance of the original's outputs, or by their mean square where these do
        not differ.
    kl: float
        The mean Kullback-Leibler divergence of the softmax over classes from the original's, in nats; 0 where outputs
        are not of shape (N, at least 3).
    '''

    error: float
    kl: float

    def worse_than(self, other: Divergence) -> bool:
        '''Return whether the product of both numbers is larger than the other's, by more than rounding.'''
        product, limit = (max(each.error, NOISE) * max(each.kl, NOISE) for each in (self, other))
        return not product <= limit

    def __str__(self) -> str:
        return f'squared error {self.error:.4g}' + (f', KL {self.kl:.4g}' if self.kl else '')


Outputs = list[list[torch.Tensor]]  # of each batch, all tensors of real numbers that the network returned


def outputs(network: nn.Module, inputs: Iterable[Any]) -> Outputs:
    '''Return all outputs for some batches, in float64.'''
    returned = (output_tensors(call_network(network, map_tensors(torch.clone, batch))) for batch in inputs)
    return [[tensor.detach().double() for tensor in tensors if tensor.is_floating_point()] for tensors in returned]


def divergence(found: Outputs, original: Outputs) -> Divergence:
    '''Return the distance of outputs from the original's for the same batches: the mean over the network's outputs.'''
    each = [_of_one_output(*parts) for parts in zip(zip(*found), zip(*original))]
    if not each:
        raise PruneError('the network returns no tensor of real numbers, so that networks cannot be compared by it.')
    return Divergence(sum(one.error for one in each) / len(each), sum(one.kl for one in each) / len(each))


def _of_one_output(found: Sequence[torch.Tensor], original: Sequence[torch.Tensor]) -> Divergence:
    after, wanted = map(_joined, (found, original))
    variance = (wanted - wanted.mean(0)).square().mean()
    if variance <= LEAST_VARIANCE * wanted.square().mean():  # of a single input, say
        variance = wanted.square().mean()
    error = float((after - wanted).square().mean() / variance.clamp(min=1e-30))
    kl = 0.0
    if wanted.dim() == 2 and wanted.shape[1] >= LEAST_CLASSES:
        kl = float(F.kl_div(after.log_softmax(1), wanted.log_softmax(1), reduction='batchmean', log_target=True))
    return Divergence(error, kl)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    '''Join outputs to one row per sample, or to one list of numbers where they differ in shape.'''
    alike = len({part.shape[1:] for part in parts}) == 1 and parts[0].dim() > 0
    return torch.cat([part if alike else part.flatten() for part in parts])


def holdout_check(model: nn.Module, small: nn.Module, network: nn.Module, inputs: Inputs,
                  repaired: Callable[[torch.Tensor], nn.Module]) -> str:
    '''Return in words why a repair does not help on held-out inputs; an empty text if it does.

    Unless a repair with at least 32 inputs clearly reduces their error, it is tried with three quarters of the inputs
    and judged by the others. With fewer inputs, the quarters judge one after the other until the answer is clear. A
    single input judges its own repair.

    Parameters
    ----------
    model, small, network: torch.nn.Module
        The original, the pruned network and the repaired one, all of the same type.
    inputs: Inputs
        The inputs of the repair.
    repaired: callable
        Repairs ``small`` with some of the inputs, given by their indices.
    '''
    after: Outputs = []
    before: Outputs = []
    wanted: Outputs = []

    def compared(network: nn.Module, chosen: torch.Tensor) -> tuple[Divergence, Divergence]:
        '''Return the distances with and without repair, over these inputs and all before.'''
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
    '''Return whether a repair halves both distances.'''
    return 2 * after.error < before.error and 2 * after.kl <= before.kl

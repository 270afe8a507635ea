'''How far what a network returns is from what the original returns, without labels.'''
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .attribute import call_network, main_output
from .networks import map_tensors
from .references import LEAST

LEAST_VARIANCE = 1e-12  # of the mean square: the rest is rounding
NOISE = 1e-9  # of the outputs' variance: squares of rounding errors


class Divergence(NamedTuple):
    '''How far outputs are from those of the original.

    Attributes
    ----------
    error: float
        The mean squared error over the variance of the original's outputs, or over their mean square where they do not
        differ.
    kl: float
        The mean Kullback-Leibler divergence of the softmax over classes from the original's, in nats; 0 where outputs
        are not of shape (N, at least 3).
    '''

    error: float
    kl: float

    def worse_than(self, other: Divergence) -> bool:
        '''Whether the product of both is larger, and not by rounding alone: the clearer one counts.'''
        product, limit = (max(each.error, NOISE) * max(each.kl, NOISE) for each in (self, other))
        return not product <= limit

    def __str__(self) -> str:
        return f'squared error {self.error:.4g}' + (f', KL {self.kl:.4g}' if self.kl else '')


def outputs(network: nn.Module, inputs: Iterable[Any]) -> list[torch.Tensor]:
    '''The main outputs for some batches, in float64.'''
    return [main_output(call_network(network, map_tensors(torch.clone, batch))).detach().double() for batch in inputs]


def divergence(found: Sequence[torch.Tensor], original: Sequence[torch.Tensor]) -> Divergence:
    '''Compare outputs with the original's for the same batches.'''
    after, wanted = map(_joined, (found, original))
    variance = (wanted - wanted.mean(0)).square().mean()
    if variance <= LEAST_VARIANCE * wanted.square().mean():  # of a single input, say
        variance = wanted.square().mean()
    error = float((after - wanted).square().mean() / variance.clamp(min=1e-30))
    kl = 0.0
    if wanted.dim() == 2 and wanted.shape[1] >= LEAST:
        kl = float(F.kl_div(after.log_softmax(1), wanted.log_softmax(1), reduction='batchmean', log_target=True))
    return Divergence(error, kl)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    '''One row a sample, or numbers alone where outputs differ in shape.'''
    alike = len({part.shape[1:] for part in parts}) == 1
    return torch.cat([part if alike else part.flatten() for part in parts])

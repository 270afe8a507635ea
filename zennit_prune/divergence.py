'''How far what a network returns is from what the original returns, without labels.'''
from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .attribute import call_network, main_output
from .networks import map_tensors
from .references import LEAST

NOISE = 1e-9  # of the outputs' variance: squares of rounding errors


class Divergence(NamedTuple):
    '''How far outputs are from those of the original.

    Attributes
    ----------
    error: float
        The mean squared error over the variance of the original's outputs.
    kl: float
        The mean Kullback-Leibler divergence of the softmax over classes from the original's, in nats; 0 where outputs
        are not of shape (N, at least 3).
    '''

    error: float
    kl: float

    def worse_than(self, other: Divergence) -> bool:
        '''Whether either is larger, and not by rounding alone.'''
        return not self.error <= max(other.error, NOISE) or not self.kl <= max(other.kl, NOISE)

    def __str__(self) -> str:
        return f'squared error {self.error:.4g}' + (f', KL {self.kl:.4g}' if self.kl else '')


def outputs(network: nn.Module, inputs: Iterable[Any]) -> torch.Tensor:
    '''The main outputs for some batches, in float64.'''
    parts = []
    for batch in inputs:
        parts.append(main_output(call_network(network, map_tensors(torch.clone, batch))).detach().double())
    shapes = {part.shape[1:] for part in parts}
    return torch.cat(parts if len(shapes) == 1 else [part.flatten() for part in parts])


def divergence(found: torch.Tensor, original: torch.Tensor) -> Divergence:
    '''Compare outputs with the original's, which are of the same shape.'''
    variance = (original - original.mean(0)).square().mean().clamp(min=1e-30)
    error = float((found - original).square().mean() / variance)
    kl = 0.0
    if original.dim() == 2 and original.shape[1] >= LEAST:
        kl = float(F.kl_div(found.log_softmax(1), original.log_softmax(1), reduction='batchmean', log_target=True))
    return Divergence(error, kl)

'''The statistics of BatchNorm, from inputs.'''
from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from zennit.types import BatchNorm

from .attribute import call_network
from .errors import PruneWarning
from .networks import map_tensors, tensors_in

DEAD = 1e-4  # of the largest factor of a BatchNorm: a channel that it scales by less is left as it is


def _norms(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, BatchNorm)
            and module.running_mean is not None]  # type: ignore[union-attr]


def reestimate(network: nn.Module, chunks: Sequence[Any], needed: bool) -> None:
    '''Estimate all statistics of BatchNorm anew; where that is ``needed`` since nothing else can be done, say so.'''
    norms = _norms(network)
    found = 'its BatchNorm is estimated anew' if norms else 'it has no BatchNorm with statistics: nothing was repaired'
    if needed or not norms:
        reason = 'the network has no layer that can be refitted, and ' if needed else 'the network was left as it is: '
        warnings.warn(f'{reason}{found}.', PruneWarning, stacklevel=4)
    before = [(norm.momentum, norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    for inputs in chunks:
        call_network(network, map_tensors(torch.clone, inputs))
    for norm, (momentum, mean, variance) in zip(norms, before):
        norm.momentum = momentum
        if not norm.num_batches_tracked:  # of a head that runs in training only
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)


def settle(network: nn.Module, chunks: Sequence[Any]) -> None:
    '''Give every BatchNorm the statistics of what it reads now, without changing what it returns.'''
    sums: dict[Any, list[Any]] = {}

    def add(norm: nn.Module, args: Any, kwargs: Any) -> None:
        read = tensors_in((args, kwargs))[0].transpose(0, 1).flatten(1).double()
        terms = [read.shape[1], read.sum(1), read.square().sum(1)]
        sums[norm] = [old + new for old, new in zip(sums.get(norm, [0, 0, 0]), terms)]

    handles = [norm.register_forward_pre_hook(add, with_kwargs=True) for norm in _norms(network)
               if norm.weight is not None]
    for inputs in chunks:
        call_network(network, map_tensors(torch.clone, inputs))
    for handle in handles:
        handle.remove()
    for norm, (count, total, squares) in sums.items():
        if count == 1:
            continue
        scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
        shift = norm.bias.double() - scale * norm.running_mean
        mean = total / count
        variance = (squares / count - mean.square()).maximum(DEAD * norm.running_var)  # training divides by it
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_(scale * (norm.running_var.double() + norm.eps).sqrt())
        norm.bias.copy_(shift + scale * norm.running_mean)

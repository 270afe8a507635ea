'''The statistics of BatchNorm, from inputs.'''
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from zennit.types import BatchNorm

from .attribute import call_network
from .errors import PruneError
from .loaders import batch_size
from .networks import map_tensors, tensors_in

FEW = 16  # inputs: fewer do not tell statistics alone
DEAD = 1e-4  # of the largest factor of a BatchNorm: a channel that it scales by less is left as it is


def norms_of(network: nn.Module) -> list[Any]:
    '''Every BatchNorm that holds statistics.'''
    return [module for module in network.modules() if isinstance(module, BatchNorm)
            and module.running_mean is not None]  # type: ignore[union-attr]


def reestimate(network: nn.Module, chunks: Sequence[Any]) -> None:
    '''Estimate all statistics of BatchNorm anew.'''
    norms = norms_of(network)
    before = [(norm.momentum, norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    try:
        for inputs in chunks:
            call_network(network, map_tensors(torch.clone, inputs))
    except PruneError as error:
        raise PruneError(f'BatchNorm cannot be estimated anew: {error} Statistics take more than one value of each '
                         'channel: give more inputs.') from error
    for norm, (momentum, mean, variance) in zip(norms, before):
        norm.momentum = momentum
        if not norm.num_batches_tracked:  # of a head that runs in training only
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)


def settle(network: nn.Module, chunks: Sequence[Any]) -> None:
    '''Give every BatchNorm the statistics of what it reads now, without changing what it returns.

    From few inputs, those it has keep a share: a refitted layer returns much what it did before.
    '''
    sums: dict[Any, list[Any]] = {}

    def add(norm: nn.Module, args: Any, kwargs: Any) -> None:
        read = tensors_in((args, kwargs))[0].transpose(0, 1).flatten(1).double()
        terms = [read.shape[1], read.sum(1), read.square().sum(1)]
        sums[norm] = [old + new for old, new in zip(sums.get(norm, [0, 0, 0]), terms)]

    handles = [norm.register_forward_pre_hook(add, with_kwargs=True) for norm in norms_of(network)
               if norm.weight is not None]
    for inputs in chunks:
        call_network(network, map_tensors(torch.clone, inputs))
    for handle in handles:
        handle.remove()
    share = min(1.0, sum(map(batch_size, chunks)) / FEW)
    for norm, (count, total, squares) in sums.items():
        if count == 1:
            continue
        scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
        shift = norm.bias.double() - scale * norm.running_mean
        mean = share * total / count + (1 - share) * norm.running_mean
        square = share * squares / count + (1 - share) * (norm.running_var + norm.running_mean.double().square())
        variance = (square - mean.square()).maximum(DEAD * norm.running_var)  # training divides by it
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_(scale * (norm.running_var.double() + norm.eps).sqrt())
        norm.bias.copy_(shift + scale * norm.running_mean)

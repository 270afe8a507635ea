'''The criteria that people compare relevance with: each gives a :class:`Relevance` for a graph and a network.'''
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .graph import ChannelGraph
from .networks import tensors_by_module
from .relevance import Relevance


def random(graph: ChannelGraph, model: nn.Module, seed: int = 0) -> Relevance:
    '''Uniform random numbers: the baseline that every criterion has to beat.'''
    generator = torch.Generator().manual_seed(seed)
    scores = {group.name: torch.rand(group.size, generator=generator, dtype=torch.float64) for group in graph.groups}
    return Relevance(scores, info={'criterion': 'random', 'seed': seed})


def weight_norm(graph: ChannelGraph, model: nn.Module, order: int) -> Relevance:
    '''The norm of the filters that bring forth a channel, averaged over the group's producers.

    ``order`` 1 is the criterion of Li et al., "Pruning Filters for Efficient ConvNets" (arXiv 1608.08710): the sum of a
    filter's absolute weights; 2 takes the root of the sum of squares.
    '''
    tensors = dict(tensors_by_module(model))
    scores = {}
    for group in graph.groups:
        norms = []
        for member in group.members:
            if member.role == 'producer':
                weight = tensors[member.parameter].detach().double().movedim(member.dim, 0).flatten(1).cpu()
                filters = weight[torch.from_numpy(member.index)]
                norms.append(torch.linalg.vector_norm(filters.flatten(1), order, dim=1))
        if norms:
            scores[group.name] = torch.stack(norms).mean(0)
    return Relevance(scores, info={'criterion': f'l{order}'})


CRITERIA: dict[str, Callable[[ChannelGraph, nn.Module, int], Relevance]] = {
    'random': random,
    'l1': lambda graph, model, seed: weight_norm(graph, model, 1),
    'l2': lambda graph, model, seed: weight_norm(graph, model, 2),
}

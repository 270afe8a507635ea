'''The criteria that people compare relevance with and that do not look at data.

Each gives a :class:`Relevance` for a graph and a network; ``measures.py`` has those that look at data.
'''
from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import PruneError, PruneWarning
from .graph import ChannelGraph
from .groups import Member
from .parametrized import computed_tensors
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
    def norm(slices: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(slices[index].flatten(1), order, dim=1)

    return _averaged(graph, model, f'l{order}', norm)


def geometric_median(graph: ChannelGraph, model: nn.Module) -> Relevance:
    '''The sum of the l2 distances of a channel's filter to all filters of its layer, averaged over the producers.

    He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration" (arXiv
    1811.00250): a filter near all others is one that they can stand in for. A channel that holds several filters of a
    layer has the sum of theirs.
    '''
    return _averaged(graph, model, 'fpgm', lambda slices, index: torch.cdist(slices, slices).sum(1)[index].sum(1))


def batch_norm_scale(graph: ChannelGraph, model: nn.Module) -> Relevance:
    '''The absolute factor ``|gamma|`` of the BatchNorm that follows, averaged over the group's BatchNorms.

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming" (arXiv 1708.06519), for networks
    trained with or without their penalty. Groups without BatchNorm have no scores.
    '''
    scales = {f'{name}.weight' for name, module in model.named_modules(remove_duplicate=False)
              if isinstance(module, _BatchNorm)}
    return _averaged(graph, model, 'batchnorm', lambda slices, index: slices.abs()[index].mean((1, 2)),
                     lambda member: member.parameter in scales)


def _averaged(graph: ChannelGraph, model: nn.Module, criterion: str,
              score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
              chosen: Callable[[Member], bool] = lambda member: member.role == 'producer') -> Relevance:
    '''The mean of ``score(slices, index)`` over the chosen members of each group.

    ``slices`` are the weight's along the member's dimension, as rows in float64, and ``index`` is the member's.
    '''
    tensors = computed_tensors(model)
    scores = {}
    for group in graph.groups:
        found = []
        for member in filter(chosen, group.members):
            weight = tensors[member.parameter].detach().double().cpu().movedim(member.dim, 0)
            found.append(score(weight.reshape(len(weight), -1), torch.from_numpy(member.index)))
        if found:
            scores[group.name] = torch.stack(found).mean(0)
    silent = [group.name for group in graph.groups if group.name not in scores]
    if silent and not scores:
        raise PruneError(f'criterion={criterion!r} says nothing about any channel of this network: no group has the '
                         "parameters it looks at. Use another, e.g. 'l1'.")
    if silent:
        warnings.warn(f'criterion={criterion!r} says nothing about some groups, so they will be kept whole: '
                      f'{", ".join(silent)}', PruneWarning, stacklevel=5)
    return Relevance(scores, info={'criterion': criterion})


CRITERIA: dict[str, Callable[[ChannelGraph, nn.Module, int], Relevance]] = {
    'random': random,
    'l1': lambda graph, model, seed: weight_norm(graph, model, 1),
    'l2': lambda graph, model, seed: weight_norm(graph, model, 2),
    'fpgm': lambda graph, model, seed: geometric_median(graph, model),
    'batchnorm': lambda graph, model, seed: batch_norm_scale(graph, model),
}

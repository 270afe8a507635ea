'''The criteria that channels are scored by: LRP relevance, and those that it is compared with.

A :class:`Criterion` describes a criterion that uses data: where values are read, what is computed there, and how that
becomes a score; one collector computes all of them. Criteria without data are functions of a graph, a network and a
seed. ``CRITERIA`` has both by name, and a new criterion needs an entry there.

Criteria with a formula of their own run the plain network, without rules. Where they read a channel behind its norm and
nonlinearity, that is the last value that norms and activations alone compute from it (``Flow.behind_activations``); a
residual stream, which several layers read, has several such values, over which the score is averaged.
'''
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import PruneError, unknown, warn
from ..graph._graph import ChannelGraph
from ..graph._groups import ChannelGroup, Member
from ..tracing._parametrized import computed_tensors
from ..tracing._recorded import Operation
from ._initial import Initial
from ._relevance import Relevance
from ._sites import ActivationSite, Flow, find_sites

FindSites = Callable[[ChannelGraph, nn.Module], tuple[list[ActivationSite], dict[str, str]]]
Quantity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Criterion:
    '''A criterion that uses data: where it reads, what it computes there, and how that becomes a score.

    For each sample, the collector computes ``quantity`` at every activation site, sums it over space as the aggregate
    says, and turns the sums into the sample's ``score``. These are averaged over the sites of a group and over samples;
    ``finish`` makes the score of the mean.

    Parameters
    ----------
    name: str
        Its name, for ``criterion=``.
    sites: callable
        From a graph and a network to the activation sites, and the reason for each group without any.
    quantity: callable
        From the activation and the gradient (or relevance) at a site, shaped as the tensor there, to what is summed,
        of the same shape.
    aggregate: str
        The meaning of ``aggregate='auto'``; ``'auto'`` itself where the rules decide.
    initial: str or callable
        The meaning of ``initial='auto'``.
    lrp: bool
        Whether the composite's rules are in force; else the plain network runs.
    activations, gradients: bool
        The arguments that ``quantity`` uses; the other one is an empty tensor. Gradients need labels.
    per_element: bool
        The mean over space is used in place of the sum.
    score: callable
        From the sums, shape (samples, channels), and their site to the scores of single samples, shaped alike.
    finish: callable
        From the mean over samples, shape (channels,), to the score of a channel.
    per_sample: bool
        Whether the score of a single sample means something, so that reference samples can be kept for each channel.

    Examples
    --------
    The mean squared activation of a channel:

    >>> import torch
    >>> import zennit_prune as zp
    >>> from zennit_prune.relevance import CRITERIA, Criterion
    >>> energy = Criterion('energy', CRITERIA['activation'].sites, lambda activation, gradient: activation ** 2,
    ...                    'sumabs', 'one-hot', activations=True, gradients=False)
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> x = torch.rand(6, 4)
    >>> scores = zp.Pruner(model, None, x, progress=False).collect([x], energy, progress=False)['0']
    >>> torch.allclose(scores, model[:2](x).double().square().mean(0))
    True
    '''

    name: str
    sites: FindSites
    quantity: Quantity
    aggregate: str
    initial: Initial
    lrp: bool = False
    activations: bool = False
    gradients: bool = True
    per_element: bool = True
    score: Callable[[torch.Tensor, ActivationSite], torch.Tensor] = lambda sums, site: sums
    finish: Callable[[torch.Tensor], torch.Tensor] = lambda mean: mean
    per_sample: bool = True


Computed = Callable[[ChannelGraph, nn.Module, int], Relevance]


def _behind_activations(graph: ChannelGraph, model: nn.Module) -> tuple[list[ActivationSite], dict[str, str]]:
    return find_sites(graph, Flow.behind_activations)


def _where_read(graph: ChannelGraph, model: nn.Module) -> tuple[list[ActivationSite], dict[str, str]]:
    '''Return the sites where layers with weights read channels, each with the sums of the absolute weights.'''
    flow, tensors = Flow(graph), computed_tensors(model)
    sites: list[ActivationSite] = []
    missing = {}
    for group in graph.groups:
        found = [replace(site, weights=weights) for value, operation in flow.consumed(group)
                 for weights in [_weights_read(graph, group, operation, tensors)] for site in flow.sites(group, value)]
        sites += found
        if not found:
            missing[group.name] = 'no layer reads its channels with a weight, or not where it can be seen'
    return sites, missing


def _weights_read(graph: ChannelGraph, group: ChannelGroup, operation: Operation,
                  tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    '''Return the sums of the absolute weights with which an operation reads the channels of a group.'''
    total = torch.zeros(group.size, dtype=torch.float64, device='cpu')
    axes = graph._recording.axes
    numbers = {number for labels in operation.consumers for number in graph._roles.axis[labels].flat}
    read = {(axes[number].parameter, axes[number].dim) for number in numbers if number >= 0}
    for member in group.members:
        if (member.parameter, member.dim) in read:
            weight = tensors[member.parameter].detach().cpu().double().abs().unflatten(0, (member.blocks, -1))
            sums = weight.movedim(member.dim + 1, 1).flatten(2).sum(2).flatten()
            total += sums[torch.from_numpy(member.index)].sum(1)
    return total


def _times_weights(sums: torch.Tensor, site: ActivationSite) -> torch.Tensor:
    assert site.weights is not None
    return sums * (site.weights ** 2).to(sums)


RELEVANCE = Criterion(
    'relevance', lambda graph, model: find_sites(graph), lambda activation, relevance: relevance, 'auto', 'one-hot',
    lrp=True, per_element=False)
'''The relevance of a channel by LRP, summed over space and averaged over samples.

Yeom et al., "Pruning by Explaining: A Novel Criterion for Deep Neural Network Pruning" (arXiv 1912.08881), section 3.
'''

GRADIENT = Criterion(
    'gradient', _behind_activations, lambda activation, gradient: gradient, 'abs', 'cross-entropy')
'''Mean over samples of ``|mean over space of dL/dz|``, z the channel behind its nonlinearity, L the loss.

The gradient criterion that "Pruning by Explaining" (arXiv 1912.08881) compares with, in the absolute value per sample,
and without its l2 normalization per layer.
'''

TAYLOR = Criterion(
    'taylor', _behind_activations, lambda activation, gradient: gradient * activation, 'abs', 'cross-entropy',
    activations=True)
'''Mean over samples of ``|mean over space of z dL/dz|``, z the channel behind its nonlinearity, L the loss.

The first-order estimate of how the loss changes when the channel is set to zero: Molchanov et al., "Pruning
Convolutional Neural Networks for Resource Efficient Inference" (arXiv 1611.06440), without their l2 normalization
per layer.
'''

TAYLOR_WEIGHTS = Criterion(
    'taylor-weights', lambda graph, model: find_sites(graph, Flow.produced),
    lambda activation, gradient: gradient * activation, 'abs', 'cross-entropy', activations=True, per_element=False,
    score=lambda sums, site: sums ** 2)
'''Mean over samples of ``(sum over w of w dL/dw)^2``, w the weights and the bias that produce the channel.

The squared first-order estimate of Molchanov et al., "Importance Estimation for Neural Network Pruning" (arXiv
1906.10771), of a whole filter, with the gradient of each sample where the paper uses that of each batch, so that the
batch size does not matter; averaged over the layers that produce the group.

A layer's output z, before any norm, is linear in weights and bias, so that the sum over w of ``w dL/dw`` is the sum
over space of ``z dL/dz``: gradients per sample at the cost of one backward pass. Each call of a reused layer counts as
a layer.
'''

ACTIVATION = Criterion(
    'activation', _behind_activations, lambda activation, gradient: activation, 'sumabs', 'cross-entropy',
    activations=True, gradients=False)
'''Mean over samples and space of ``|z|``, z the channel behind its nonlinearity; labels are not needed.

Molchanov et al. (arXiv 1611.06440) compare with the mean activation, which is equal behind a ReLU; the absolute value
suits other nonlinearities as well, and channels without any.
'''

WANDA = Criterion(
    'wanda', _where_read, lambda activation, gradient: activation ** 2, 'sumabs', 'cross-entropy', activations=True,
    gradients=False, per_element=False, score=_times_weights, finish=torch.sqrt, per_sample=False)
'''Root of the mean over samples of ``(sum over i of |W[i, c]| times ||X[c]||)^2``; labels are not needed.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695) score a weight by its
absolute value times the l2 norm of the input that it reads. Here these are summed over all weights with which a layer
reads channel c, kernel and output channels included: W is that layer's weight, and ``||X[c]||`` the norm over space of
its input. Over samples, and over layers where several read the channel, the score is the root of the mean square: the
norm over all samples, up to a constant.
'''


def random(graph: ChannelGraph, model: nn.Module, seed: int = 0) -> Relevance:
    '''Draw uniform random numbers: the baseline that every criterion has to beat.'''
    generator = torch.Generator().manual_seed(seed)
    scores = {group.name: torch.rand(group.size, generator=generator, dtype=torch.float64, device='cpu')
              for group in graph.groups}
    return Relevance(scores, info={'criterion': 'random', 'seed': seed})


def weight_norm(graph: ChannelGraph, model: nn.Module, order: int) -> Relevance:
    '''Return the norm of the filters that produce a channel, averaged over the layers that produce the group.

    ``order`` 1 is the criterion of Li et al., "Pruning Filters for Efficient ConvNets" (arXiv 1608.08710): the sum of a
    filter's absolute weights; 2 takes the root of the sum of squares.
    '''
    def norm(slices: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(slices[index].flatten(1), order, dim=1)

    return _averaged(graph, model, f'l{order}', norm)


def geometric_median(graph: ChannelGraph, model: nn.Module) -> Relevance:
    '''Return the sum of the distances of a channel's filter to all filters of its layer, averaged over its layers.

    He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration" (arXiv
    1811.00250): a filter near all others can be replaced by them. A channel that holds several filters of a layer has
    the sum of their distances.
    '''
    return _averaged(graph, model, 'fpgm', lambda slices, index: torch.cdist(slices, slices).sum(1)[index].sum(1))


def batch_norm_scale(graph: ChannelGraph, model: nn.Module) -> Relevance:
    '''Return the absolute factor ``|gamma|`` of the BatchNorm that follows, averaged over the group's BatchNorms.

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
    '''Return the mean of ``score(slices, index)`` over the chosen members of each group.

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
                         "parameters it uses. Use another, e.g. 'l1'.")
    if silent:
        warn(f'criterion={criterion!r} says nothing about some groups, so they will be kept whole: '
             f'{", ".join(silent)}')
    return Relevance(scores, info={'criterion': criterion})


CRITERIA: dict[str, Criterion | Computed] = {
    **{criterion.name: criterion for criterion in (RELEVANCE, GRADIENT, TAYLOR, TAYLOR_WEIGHTS, ACTIVATION, WANDA)},
    'random': random,
    'l1': lambda graph, model, seed: weight_norm(graph, model, 1),
    'l2': lambda graph, model, seed: weight_norm(graph, model, 2),
    'fpgm': lambda graph, model, seed: geometric_median(graph, model),
    'batchnorm': lambda graph, model, seed: batch_norm_scale(graph, model),
}


def uses_data(criterion: object) -> bool:
    '''Return whether ``criterion`` is a :class:`Criterion` or the name of one, so that a collector computes it.'''
    return isinstance(CRITERIA.get(criterion) if isinstance(criterion, str) else criterion, Criterion)


def known_criterion(criterion: object) -> Criterion | Computed:
    '''Look up a criterion by its name; a :class:`Criterion` is returned as it is.

    Raises
    ------
    PruneError
        If there is no such name; with all names, and the nearest.
    '''
    if isinstance(criterion, Criterion):
        return criterion
    if not isinstance(criterion, str) or criterion not in CRITERIA:
        raise unknown('criterion', criterion, CRITERIA, ', or a function of (graph, model, loader)')
    return CRITERIA[criterion]


def collected_criterion(criterion: object) -> Criterion:
    '''Look up a criterion that uses data.

    Raises
    ------
    PruneError
        If there is no such name, or the criterion uses no data.
    '''
    found = known_criterion(criterion)
    if not isinstance(found, Criterion):
        raise PruneError(f'criterion={criterion!r} is no criterion that uses data: use one of '
                         f'{", ".join(repr(name) for name in CRITERIA if uses_data(name))}.')
    return found

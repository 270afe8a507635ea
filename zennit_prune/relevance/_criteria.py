'''Criteria that look at data, each a :class:`Collector` of the plain network: gradients and activations, no rules.

Where a channel is read after its norm and nonlinearity, that is the last value that its norms and activations alone
have made of it (``Flow.settled``); a residual stream, which several layers read, has several such values, over which
the score is averaged. What is measured there is averaged over the value's elements (over space), per sample.

The criteria that people compare relevance with and that do not look at data.

Each gives a :class:`Relevance` for a graph and a network; ``measures.py`` has those that look at data.
'''
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from zennit.core import Composite

from ..errors import PruneError, PruneWarning
from ..graph._graph import ChannelGraph
from ..graph._groups import ChannelGroup, Member
from ..tracing._boundaries import Place
from ..tracing._parametrized import computed_tensors
from ..tracing._recorded import Operation
from ..util._networks import tensors_in
from ._attribute import Attribution, Reader, attributing, call_network, differentiable, main_output
from ._collect import Collector
from ._initial import Initial, of_classes
from ._relevance import Relevance
from ._states import Flow, State, find_states


def random(graph: ChannelGraph, model: nn.Module, seed: int = 0) -> Relevance:
    '''Uniform random numbers: the baseline that every criterion has to beat.'''
    generator = torch.Generator().manual_seed(seed)
    scores = {group.name: torch.rand(group.size, generator=generator, dtype=torch.float64, device='cpu')
              for group in graph.groups}
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


class Measure(Collector):
    '''What all criteria that look at data share.

    Parameters
    ----------
    graph: ChannelGraph
        The channels.
    model: torch.nn.Module
        The network that was traced; it is copied, never changed.
    aggregate: str
        As for :class:`Collector`; ``'auto'`` is what the criterion's formula says.
    initial: str or callable
        What the gradients start from, where the criterion needs any: ``'cross-entropy'``, or what else
        :func:`zennit_prune.initial.initial_relevance` takes. For another loss, give a function of the output that
        returns the gradient of each sample's loss.

    options:
        Those of :class:`Collector`, but for ``attributor``.

    Raises
    ------
    PruneError
        If the criterion says nothing about any channel of the network.
    '''

    _reader: Keeper
    per_element = True  # the mean over space, not the sum
    aggregate_of_formula = 'abs'

    def __init__(self, graph: ChannelGraph, model: nn.Module, aggregate: str = 'auto',
                 initial: Initial = 'cross-entropy', **options: Any):
        super().__init__(graph, model, Composite(),
                         self.aggregate_of_formula if aggregate == 'auto' else aggregate, initial, **options)
        if self.attributor is not None:
            raise PruneError(f"attributor= is for criterion='relevance'; {self.criterion!r} has a formula of its own.")
        if not self.states:
            raise PruneError(f'criterion={self.criterion!r} says nothing about any channel of this network: '
                             f'{"; ".join(f"{name} ({why})" for name, why in self.unread.items())}. Use another.')

    def _find_states(self) -> tuple[list[State], dict[str, str]]:
        return find_states(self.graph, Flow.settled)

    def _attributing(self) -> AbstractContextManager[Attribution]:
        places = [state.place for state in self.states]
        return attributing(self.model, self.composite, None, lambda network: Keeper(network, places))

    def _aggregated(self, state: State, relevance: torch.Tensor, batch: int) -> torch.Tensor:
        values = super()._aggregated(state, relevance, batch)
        if not self.per_element:
            return values
        one_sample = torch.ones_like(relevance[:relevance.shape[0] // batch])
        return values / state.per_sample(one_sample, 1).clamp(min=1)

    def compute(self) -> Relevance:
        relevance = super().compute()
        relevance.info.pop('composite', None)
        return relevance


class Keeper(Reader):
    '''A reader that keeps the tensors of the last pass themselves, too.'''

    def __init__(self, network: nn.Module, places: Sequence[Place]):
        super().__init__(network, places)
        self.values: dict[Place, torch.Tensor] = {}
        network.register_forward_pre_hook(lambda *_: self.values.clear())

    def _catch(self, place: Place, value: Any) -> None:
        super()._catch(place, value)
        tensors = tensors_in(value)
        if place.position < len(tensors):  # a copy, for the network may go on to write into it
            value = tensors[place.position].detach()
            self.values[place] = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)


class Gradient(Measure):
    '''Mean over samples of ``|mean over space of dL/dz|``, z the channel after its nonlinearity, L the loss.

    The gradient criterion that "Pruning by Explaining" (arXiv 1912.08881) compares with, in the absolute value per
    sample, and without its l2 normalisation per layer.
    '''

    criterion = 'gradient'


class Taylor(Measure):
    '''Mean over samples of ``|mean over space of z dL/dz|``, z the channel after its nonlinearity, L the loss.

    The first-order estimate of what the loss changes by when the channel is zero: Molchanov et al., "Pruning
    Convolutional Neural Networks for Resource Efficient Inference" (arXiv 1611.06440), without their l2 normalisation
    per layer.
    '''

    criterion = 'taylor'

    def _measured(self, inputs: Any, target: Any) -> Iterator[tuple[dict[Place, torch.Tensor], torch.Tensor]]:
        for gradients, share in super()._measured(inputs, target):
            yield {place: gradient * self._reader.values[place] for place, gradient in gradients.items()}, share


class TaylorWeights(Taylor):
    '''Mean over samples of ``(sum over w of w dL/dw)^2``, w the weights and the bias that bring forth the channel.

    The squared first-order estimate of Molchanov et al., "Importance Estimation for Neural Network Pruning" (arXiv
    1906.10771), of a whole filter, with the gradient of each sample where the paper takes that of each batch, so that
    the batch size does not matter; averaged over the group's producers.

    Notes
    -----
    A layer's output z, before any norm, is linear in weights and bias, so that the sum over w of ``w dL/dw`` is the sum
    over space of ``z dL/dz``: gradients per sample at the cost of one backward pass. Each call of a reused layer counts
    as a producer.
    '''

    criterion = 'taylor-weights'
    per_element = False

    def _find_states(self) -> tuple[list[State], dict[str, str]]:
        return find_states(self.graph, Flow.produced)

    def _aggregated(self, state: State, relevance: torch.Tensor, batch: int) -> torch.Tensor:
        return super()._aggregated(state, relevance, batch) ** 2


class Activations(Measure):
    '''Mean over samples and space of ``|z|``, z the channel after its nonlinearity; labels are not needed.

    Molchanov et al. (arXiv 1611.06440) compare with the mean activation, the same after a ReLU; the absolute value
    makes it fit for other nonlinearities, and for channels without any.
    '''

    criterion = 'activation'
    aggregate_of_formula = 'sumabs'

    def _measured(self, inputs: Any, target: Any) -> Iterator[tuple[dict[Place, torch.Tensor], torch.Tensor]]:
        if self.classes is not None and of_classes(target, self.classes) is None:
            raise PruneError(f'classes={self.classes} needs a label for each sample, as criterion={self.criterion!r} '
                             'looks at no output.')
        inputs = differentiable(inputs, self._network)
        with torch.no_grad():
            output = main_output(call_network(self._network, inputs))
        yield dict(self._reader.values), torch.ones(len(output), device=output.device)

    def compute(self) -> Relevance:
        relevance = super().compute()
        relevance.info.pop('initial', None)
        return relevance


@dataclass(eq=False)
class Read(State):
    '''Where a layer reads channels; ``weights`` holds the sum of the absolute weights with which it reads each.'''

    weights: torch.Tensor


class Wanda(Activations):
    '''Root of the mean over samples of ``(sum over i of |W[i, c]| times ||X[c]||)^2``; labels are not needed.

    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695) score a weight by
    its absolute value times the l2 norm of the input that it reads. Here these are summed over all weights with which a
    layer reads channel c, kernel and output channels included: W is the consumer's weight, and ``||X[c]||`` the norm
    over space of its input. Over samples, and over consumers where there are several, the root of the mean square is
    taken: the norm over all samples, but for a constant.
    '''

    criterion = 'wanda'
    per_element = False
    per_sample = False

    def _find_states(self) -> tuple[list[State], dict[str, str]]:
        flow, tensors = Flow(self.graph), computed_tensors(self.model)
        states: list[State] = []
        missing = {}
        for group in self.graph.groups:
            found = [Read(**vars(state), weights=weights) for value, operation in flow.consumed(group)
                     for weights in [self._reading(group, operation, tensors)] for state in flow.state(group, value)]
            states += found
            if not found:
                missing[group.name] = 'no layer reads its channels with a weight, or not where it can be seen'
        return states, missing

    def _reading(self, group: ChannelGroup, operation: Operation, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        '''The sums of the absolute weights with which an operation reads the channels of a group.'''
        total = torch.zeros(group.size, dtype=torch.float64, device='cpu')
        axes = self.graph._recording.axes
        numbers = {number for labels in operation.consumers for number in self.graph._roles.axis[labels].flat}
        read = {(axes[number].parameter, axes[number].dim) for number in numbers if number >= 0}
        for member in group.members:
            if (member.parameter, member.dim) in read:
                weight = tensors[member.parameter].detach().cpu().double().abs().unflatten(0, (member.blocks, -1))
                sums = weight.movedim(member.dim + 1, 1).flatten(2).sum(2).flatten()
                total += sums[torch.from_numpy(member.index)].sum(1)
        return total

    def _measured(self, inputs: Any, target: Any) -> Iterator[tuple[dict[Place, torch.Tensor], torch.Tensor]]:
        for values, share in super()._measured(inputs, target):
            yield {place: value ** 2 for place, value in values.items()}, share

    def _aggregated(self, state: State, relevance: torch.Tensor, batch: int) -> torch.Tensor:
        assert isinstance(state, Read)
        squares = super()._aggregated(state, relevance, batch)
        return squares * (state.weights ** 2).to(squares)

    def compute(self) -> Relevance:
        squares = super().compute()
        return Relevance({name: values.sqrt() for name, values in squares.items()},
                         {name: values.sqrt() for name, values in squares._halves.items()}, squares.info)


MEASURES: dict[str, Callable[..., Measure]] = {
    'gradient': Gradient,
    'taylor': Taylor,
    'taylor-weights': TaylorWeights,
    'activation': Activations,
    'wanda': Wanda,
}

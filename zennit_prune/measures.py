'''Criteria that look at data, each a :class:`Collector` of the plain network: gradients and activations, no rules.

Where a channel is read after its norm and nonlinearity, that is the last value that its norms and activations alone
have made of it (``Flow.settled``); a residual stream, which several layers read, has several such values, over which
the score is averaged. What is measured there is averaged over the value's elements (over space), per sample.
'''
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from zennit.core import Composite

from .attribute import Attribution, Reader, attributing, call_network, differentiable, main_output
from .boundaries import Place
from .collect import Collector
from .errors import PruneError
from .graph import ChannelGraph
from .groups import ChannelGroup
from .initial import Initial, of_classes
from .networks import tensors_in
from .parametrized import computed_tensors
from .recorded import Operation
from .relevance import Relevance
from .states import Flow, State, find_states


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
        total = torch.zeros(group.size, dtype=torch.float64)
        axes = self.graph.recording.axes
        numbers = {number for labels in operation.consumers for number in self.graph.roles.axis[labels].flat}
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

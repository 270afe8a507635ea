'''Activation sites: the tensors that carry a channel's complete value, where its relevance is read.

For a plain convolution that is its output. In a residual stream it is the first value and the output of every coupling
operation; what a branch adds is only a summand, and what one branch reads is only a part. A depthwise convolution gives
a channel a new value, with a bias that is removed with the channel, so the channel is read behind it: a channel that is
zero before it may be a constant that matters behind. The same holds for a norm whose statistics depend on the sample
(before it, relevance sums to zero), and for a gated linear unit, which makes one value of two.
'''
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..graph._graph import ChannelGraph
from ..graph._groups import ChannelGroup
from ..tracing._boundaries import Place
from ..tracing._labels import Field, Labels
from ..tracing._recorded import Operation
from ..tracing._rules import OPERATIONS, UNKNOWN

MOVES = {'view', 'permute', 'transpose', 't', 'unsqueeze', 'squeeze'}


@dataclass(eq=False)
class ActivationSite:
    '''A tensor in which channels of a group can be read.

    Attributes
    ----------
    group: str
        The group.
    value: int
        The number of the value in the trace.
    place: Place
        Where the tensor is found when the network runs.
    dims: tuple of int
        The dimensions along which the channels lie.
    positions: torch.Tensor
        int64, shaped as these dimensions: the position in the group, or its size where something else sits.
    size: int
        The number of channels of the group.
    weights: torch.Tensor, optional
        float64, shape (size,): the sum of the absolute weights with which a layer reads each channel there, for
        criteria that ask for it.
    '''

    group: str
    value: int
    place: Place
    dims: tuple[int, ...]
    positions: torch.Tensor
    size: int
    weights: torch.Tensor | None = None

    def per_sample(self, relevance: torch.Tensor, batch: int) -> torch.Tensor:
        '''Sum over space, tokens and all positions that are removed with the channel.

        Parameters
        ----------
        relevance: torch.Tensor
            Shaped as the tensor; its first dimension may hold several entries of each sample.
        batch: int
            The number of samples.

        Returns
        -------
        torch.Tensor
            float64 (float32 on devices without it), shape (batch, size of the group).
        '''
        relevance = relevance.to(accumulation_dtype(relevance.device))
        others = [dim for dim in range(1, relevance.dim()) if dim not in self.dims]
        if others:
            relevance = relevance.sum(others)
        relevance = relevance.reshape(batch, -1, self.positions.numel()).sum(1)
        result = relevance.new_zeros(batch, self.size + 1)
        result.index_add_(1, self.positions.to(relevance.device).reshape(-1), relevance)
        return result[:, :self.size]


def accumulation_dtype(device: torch.device) -> torch.dtype:
    '''Return the type of sums: float64 where the device has it, else float32.'''
    return torch.float32 if device.type == 'mps' else torch.float64


def keeps_elements(name: str) -> bool:
    '''Return whether an operation is a norm, a view, or acts on each element by itself.'''
    packet = getattr(torch.ops.aten, name, None)
    tags = {tag for overload in packet.overloads() for tag in getattr(packet, overload).tags} if packet else set()
    is_pointwise = torch.Tag.pointwise in tags or OPERATIONS.get(name, UNKNOWN).pointwise
    return is_pointwise or 'batch_norm' in name or name == 'view'


Values = Callable[['Flow', ChannelGroup], Iterable[int]]


def find_sites(graph: ChannelGraph, values: Values | None = None) -> tuple[list[ActivationSite], dict[str, str]]:
    '''Find the activation sites of all groups.

    Parameters
    ----------
    graph: ChannelGraph
        The groups.
    values: callable, optional
        From a :class:`Flow` and a group to the numbers of the values to read; :meth:`Flow.complete` by default.

    Returns
    -------
    tuple of (list of ActivationSite, dict of str to str)
        The sites; and, for each group without any, the reason.
    '''
    flow = Flow(graph)
    sites: list[ActivationSite] = []
    missing: dict[str, str] = {}
    for group in graph.groups:
        found = [site for value in (values or Flow.complete)(flow, group) for site in flow.sites(group, value)]
        if not found:
            runs = any(flow.carries(value, group) for value in flow.fields)
            missing[group.name] = 'its channels do not appear in a tensor that a module or torch function returns' \
                if runs else 'only a further example of the trace runs it'
        unique = {(site.place.side, site.place.module, site.place.call, site.place.position, site.place.site): site
                  for site in found}
        sites += unique.values()
    return sites, missing


class Flow:
    '''The operations that write and read each value in evaluation mode, and the channels that the value carries.'''

    def __init__(self, graph: ChannelGraph):
        self.graph = graph
        run = graph._recording.runs['eval']
        self.operations, self.places = run.operations, run.places
        self.fields: dict[int, list[Field]] = {}
        self.readers: defaultdict[int, list[Operation]] = defaultdict(list)
        self.writer: dict[int, Operation] = {}
        for operation in self.operations:
            for value, fields in zip(operation.writes, operation.outputs):
                self.fields[value] = fields
                self.writer[value] = operation
            for value, active in zip(operation.reads, operation.active or [True] * len(operation.reads)):
                if active:
                    self.readers[value].append(operation)
        owner = np.full(len(graph._solution.group) + 1, -1)
        for number, group in enumerate(graph.groups):
            owner[group.channels] = number
        self.owner = owner[graph._solution.channel]
        self.number = {group.name: number for number, group in enumerate(graph.groups)}
        self._producing: defaultdict[int, list[Operation]] = defaultdict(list)
        self._renewing: defaultdict[int, list[Operation]] = defaultdict(list)
        for operation in self.operations:
            for number in self._numbers(operation.producers):
                self._producing[number].append(operation)
            carried = [set(self._numbers([field.labels for field in fields]))
                       for fields, active in zip(operation.inputs, operation.active) if active]
            if operation.contracted or operation.name == 'cat':
                continue
            source = self.writer.get(operation.reads[0]) if operation.name == 'sum' else None
            anew = (operation.name in ('convolution', 'native_group_norm', 'glu')
                    or operation.decisions.get('statistics of the batch')
                    or (source is not None and source.name == 'stack'))  # zennit.layer.Sum
            for number in set().union(*carried):
                if anew or sum(number in numbers for numbers in carried) > 1:
                    self._renewing[number].append(operation)

    def _numbers(self, arrays: list[Labels]) -> list[int]:
        '''Return the numbers of the groups whose channels are in label arrays.'''
        return sorted({number for labels in arrays for number in np.unique(self.owner[labels]).tolist() if number >= 0})

    def carries(self, value: int, group: ChannelGroup) -> Field | None:
        '''Return the field of a value that holds channels of a group.'''
        for field in self.fields.get(value, ()):
            if (self.owner[field.labels] == self.number[group.name]).any():
                return field
        return None

    def complete(self, group: ChannelGroup) -> Iterator[int]:
        '''Yield the values that carry a channel's complete value.'''
        number = self.number[group.name]
        for value in self._written(group, self._producing[number] + self._renewing[number]):
            if self.is_complete(value, group):
                yield value

    def behind_activations(self, group: ChannelGroup) -> Iterator[int]:
        '''Yield the complete values, each behind the norms and activations that are its only readers.'''
        renewing = {id(operation) for operation in self._renewing[self.number[group.name]]}
        for value in self.complete(group):
            last = value
            while len(self.readers[value]) == 1:
                operation = self.readers[value][0]
                if (sum(operation.active) != 1 or id(operation) in renewing or not keeps_elements(operation.name)
                        or not self.carries(operation.writes[0], group)):
                    break
                value = operation.writes[0]
                last = value if value in self.places else last
            yield last

    def produced(self, group: ChannelGroup) -> Iterator[int]:
        '''Yield the values that layers with weights produce.'''
        return self._written(group, self._producing[self.number[group.name]])

    def consumed(self, group: ChannelGroup) -> Iterator[tuple[int, Operation]]:
        '''Yield the values that layers with weights read, each with the operation that reads it.'''
        for operation in self.operations:
            if self.number[group.name] in self._numbers(operation.consumers):
                for value, active in zip(operation.reads, operation.active):
                    if active and self.carries(value, group):
                        yield self._before_moves(value), operation

    def _written(self, group: ChannelGroup, operations: Iterable[Operation]) -> Iterator[int]:
        for operation in operations:
            for value in operation.writes[:1] if operation.name != 'stack' else ():
                if self.carries(value, group):
                    yield value

    def _before_moves(self, value: int) -> int:
        '''Return the value before views and permutations, where it enters or leaves a module or function.'''
        while value not in self.places and value in self.writer and self.writer[value].name in MOVES:
            value = self.writer[value].reads[0]
        return value

    def is_complete(self, value: int, group: ChannelGroup) -> bool:
        '''Return whether anything but a coupling operation reads the value, perhaps behind norms and activations.'''
        renewing = {id(operation) for operation in self._renewing[self.number[group.name]]}
        front, seen = [value], {value}
        while front:
            for operation in self.readers[front.pop()]:
                if id(operation) in renewing:
                    continue
                onward = [written for written in operation.writes if self.carries(written, group)]
                contracted = operation.contracted and self.number[group.name] in self._numbers(operation.contracted)
                if contracted or not onward:
                    return True
                front += [written for written in onward if written not in seen]
                seen.update(onward)
        return False

    def sites(self, group: ChannelGroup, value: int) -> Iterator[ActivationSite]:
        '''Yield the site of a value: where it, or what is computed from it alone, enters or leaves a call.'''
        while True:
            field = self.carries(value, group)
            if field is None:
                return
            places = sorted(self.places.get(value, ()),
                            key=lambda place: ('output', 'input', 'function').index(place.side))
            if places and 0 not in field.dims:
                yield self._site(group, value, field, places[0])
                return
            readers = self.readers[value]
            if len(readers) != 1 or readers[0].contracted or sum(readers[0].active) != 1 or not readers[0].writes:
                return
            value = readers[0].writes[0]

    def _site(self, group: ChannelGroup, value: int, field: Field, place: Place) -> ActivationSite:
        position = np.full(len(self.graph._solution.group) + 1, group.size)
        position[group.channels] = np.arange(group.size)
        labels = np.squeeze(field.labels, tuple(dim for dim in range(field.labels.ndim) if dim not in field.dims))
        positions = torch.from_numpy(position[self.graph._solution.channel[labels]])
        return ActivationSite(group.name, value, place, field.dims, positions, group.size)

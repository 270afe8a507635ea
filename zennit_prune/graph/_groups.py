'''Build channel groups: channels that share producers, followers and consumers, and the place of each in these.'''
from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from ..errors import PruneError, shown
from ..tracing._labels import Array, Channels, Field, Labels, Positions
from ..tracing._trace import Recording
from ..util._networks import Indices, computed_name
from ._solve import NOT_READ, Solution

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Member:
    '''One dimension of one parameter or buffer that holds the channels of a group.

    Attributes
    ----------
    parameter: str
        The name of the tensor in ``named_parameters`` or ``named_buffers``.
    dim: int
        The dimension.
    role: str
        ``'producer'`` where the weight produces the channels, ``'consumer'`` where it reads them, ``'follower'`` where
        it scales or shifts them, as norms, biases, depthwise kernels and layer scales do.
    index: numpy.ndarray
        An array of int64 of shape (size of the group, slices per channel): the indices of each channel along the
        dimension.
    blocks: int
        With several, the dimension is that of the input channels of a grouped convolution (the output channels of a
        transposed one), and the index counts those of the first block of dimension 0, then those of the second, and so
        on.

    Examples
    --------
    >>> import torch
    >>> import zennit_prune as zp
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(96, 4))
    >>> graph = zp.trace(model, torch.zeros(1, 3, 6, 6))
    >>> for member in graph.group('0').members:
    ...     print(member.layer, member.role, member.dim, member.index.shape)
    0 producer 0 (6, 1)
    0.bias follower 0 (6, 1)
    2 consumer 1 (6, 16)
    '''

    parameter: str
    dim: int
    role: str
    index: Indices = field(repr=False)
    blocks: int = 1

    @property
    def layer(self) -> str:
        '''The name of the layer, which is that of the parameter without ``.weight``.'''
        return layer_name(self.parameter)


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    '''A dependency group: channels of coupled layers, each of which can be removed by itself from all of these layers.

    The i-th channel of the group has the indices ``member.index[i]`` in every member. Positions in a group count from
    0.

    Attributes
    ----------
    name: str
        The name of the group, which begins with that of its first producer in execution order.
    size: int
        The number of channels.
    members: tuple of Member
        Every dimension of a parameter or buffer that holds these channels.
    channels: numpy.ndarray
        The numbers of the channels in the solution of the graph, an array of int64 of shape (size,).
    blocks: numpy.ndarray or None
        Where equally many channels of several blocks must be removed (the groups of a convolution, the parts of a
        split), the number of each channel's block, from 0; None where any channel may be removed.

    Examples
    --------
    >>> import torch
    >>> import zennit_prune as zp
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 2, 1))
    >>> graph = zp.trace(model, torch.zeros(1, 3, 8, 8))
    >>> group = graph.group('0')
    >>> group.name, group.size, group.layers('producer'), group.layers('consumer')
    ('0', 4, ['0'], ['1'])

    The grouped convolution reads two blocks of two channels, of which equally many are removed:

    >>> group.blocks, group.step
    (array([0, 0, 1, 1]), 2)
    >>> group.order_by_block([0.3, 0.1, 0.4, 0.2])
    array([1, 3, 0, 2])
    '''

    name: str
    size: int
    members: tuple[Member, ...] = field(repr=False)
    channels: Channels = field(repr=False)
    blocks: Array | None = field(default=None, repr=False)

    @property
    def step(self) -> int:
        '''The number of channels that are removed at once, one of each block; 1 where any channel may be removed.'''
        return 1 if self.blocks is None else int(self.blocks.max()) + 1

    def order_by_block(self, scores: npt.ArrayLike) -> Positions:
        '''Order positions by ascending score, alternating between the blocks of the group.

        Parameters
        ----------
        scores: array_like
            The scores of the channels, of shape (size,).

        Returns
        -------
        numpy.ndarray
            The positions, an array of int64 of shape (size,), of which the first ``n * step`` can be removed.
        '''
        order = np.argsort(np.asarray(scores, float), kind='stable')
        if self.blocks is None:
            return Positions(order)
        by_block = order[np.argsort(self.blocks[order], kind='stable')].reshape(self.step, -1)
        return Positions(by_block.T.reshape(-1))

    def layers(self, *roles: str) -> list[str]:
        '''Return the names of the layers that hold the channels.

        Parameters
        ----------
        *roles: str
            The roles to look for, of ``'producer'``, ``'consumer'`` and ``'follower'``; all if none is given.

        Returns
        -------
        list of str
            The names, each once.
        '''
        return list(dict.fromkeys(member.layer for member in self.members if not roles or member.role in roles))


def layer_name(parameter: str) -> str:
    '''Return the layer of a parameter, ``'features.0'`` for ``'features.0.weight'``; others keep their name.'''
    return computed_name(parameter).removesuffix('.weight')


class Roles:
    '''The roles of each label in the recorded operations.

    Attributes
    ----------
    axis: numpy.ndarray
        For each label, the number of its axis (-1 for label 0).
    consumes, produces: numpy.ndarray
        For each label, whether a weight reads it, and whether a weight produces it.
    order: dict of int to int
        For each axis that is produced, the position of the first operation that produces it.
    '''

    def __init__(self, recording: Recording):
        sizes = [axis.size for axis in recording.axes]
        self.axis = np.concatenate([[-1], np.repeat(np.arange(len(recording.axes)), sizes)])
        self.consumes = np.zeros(recording.size, bool)
        self.produces = np.zeros(recording.size, bool)
        self.order: dict[int, int] = {}
        for position, operation in enumerate(recording.operations):
            for labels in operation.consumers:
                self.consumes[labels] = True
            for labels in operation.producers:
                self.produces[labels] = True
                for axis in np.unique(self.axis[labels]).tolist():
                    self.order.setdefault(axis, position)
        self.consumes[0] = self.produces[0] = False
        self.order.pop(-1, None)


def build_groups(recording: Recording, solution: Solution, roles: Roles) -> tuple[ChannelGroup, ...]:
    '''Build all groups, in execution order of their first producers.'''
    labels = np.flatnonzero(solution.channel >= 0)
    if not len(labels):
        return ()
    number = solution.group[solution.channel[labels]]
    order = np.argsort(number, kind='stable')
    labels, number = labels[order], number[order]
    axis = roles.axis[labels]
    cuts = np.flatnonzero((np.diff(number) != 0) | (np.diff(axis) != 0)) + 1
    segments: dict[int, list[tuple[int, Labels]]] = {}
    for segment in np.split(labels, cuts):
        group = int(solution.group[solution.channel[segment[0]]])
        segments.setdefault(group, []).append((int(roles.axis[segment[0]]), Labels(segment)))
    drafts = []
    for places in segments.values():
        last = len(roles.order) + len(recording.operations)
        when, first_axis, segment = min((roles.order.get(axis, last), axis, segment) for axis, segment in places)
        found = solution.channel[segment]
        channels = Channels(found[np.sort(np.unique(found, return_index=True)[1])])
        members = tuple(_member(recording, solution, roles, axis, segment, channels) for axis, segment in places)
        drafts.append((when, int(segment[0]), layer_name(recording.axes[first_axis].parameter), members, channels))
    drafts.sort(key=lambda draft: draft[:2])
    shared = Counter(name for _, _, name, _, _ in drafts)
    seen: Counter[str] = Counter()
    groups = []
    for _, _, name, members, channels in drafts:
        seen[name] += 1
        suffix = f'#{seen[name]}' if shared[name] > 1 else ''
        groups.append(ChannelGroup(name + suffix, len(channels), members, channels, _blocks(solution, channels)))
    return tuple(groups)


def _blocks(solution: Solution, channels: Channels) -> Array | None:
    '''Return the block of each channel, numbered in order of appearance, or None if there is only one.'''
    _, starts, inverse = np.unique(solution.block[channels], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(starts))[inverse] if len(starts) > 1 else None


def _member(recording: Recording, solution: Solution, roles: Roles, number: int, labels: Labels,
            channels: Channels) -> Member:
    axis = recording.axes[number]
    numbers = solution.channel[labels]
    at = labels - axis.start
    if not np.array_equal(numbers, channels):
        order = np.argsort(channels)
        position = order[np.searchsorted(channels, numbers, sorter=order)]
        at = at[np.argsort(position, kind='stable')]
    role = 'consumer' if roles.consumes[labels].any() else 'producer' if roles.produces[labels].any() else 'follower'
    return Member(axis.parameter, axis.dim, role, Indices(at.reshape(len(channels), -1)), axis.blocks)


def build_locked(recording: Recording, solution: Solution, roles: Roles) -> dict[str, str]:
    '''Return the layers whose output channels must stay in all or in part, and unused parameters, with reasons.'''
    locked: dict[str, str] = {}
    for number in sorted(roles.order, key=lambda number: roles.order[number]):
        axis = recording.axes[number]
        labels = axis.labels
        stuck = labels[solution.locked[labels] & roles.produces[labels]]
        if len(stuck):
            reasons = Counter(solution.reason(label) for label in stuck.tolist())
            share = '' if len(stuck) == axis.size else f'{len(stuck)} of {axis.size} channels: '
            locked.setdefault(layer_name(axis.parameter), share + '; '.join(reasons))
    for name in unused_tensors(recording):
        locked.setdefault(layer_name(name), 'it is not used when the network runs')
    produced = np.zeros(recording.size, bool)
    produced[solution.component[roles.produces]] = True
    explained = produced[solution.component] | ~solution.locked
    by_weight: dict[str, list[Field]] = {}
    for name, fields in recording.fields.items():
        by_weight.setdefault(computed_name(name), []).extend(fields)
    for name, fields in by_weight.items():  # parameters that no producer explains
        if fields and not any(explained[field.labels].any() for field in fields):
            found = [solution.reason(int(label)) for field in fields for label in field.labels.reshape(-1)[:1]]
            locked.setdefault(layer_name(name), next((reason for reason in found if reason != NOT_READ), NOT_READ))
    return locked


def unused_tensors(recording: Recording) -> list[str]:
    '''Return the parameters and buffers with channels that no operation reads; those of one number have none.'''
    met = {id(field) for operation in recording.operations for fields in operation.inputs for field in fields}
    return [name for name, fields in recording.fields.items()
            if fields and not any(id(field) in met for field in fields)]


def trial_counts(groups: Sequence[ChannelGroup]) -> list[int]:
    '''Return how many channels each block of each group loses on trial, which is about a third.

    No two groups lose equal shares as long as their sizes allow it: an operation that works only for groups of equal
    width would not be noticed.
    '''
    last: dict[float, int] = {}  # when each share was used
    counts: list[int] = []
    for turn, group in enumerate(groups):
        size = group.size // group.step
        third = max(1, size // 3)
        most = min(size - 1 - (size > 3), third + len(groups))
        found = range(max(1, third - len(groups)), most + 1)
        counts.append(min(found, key=lambda count: (last.get(count / size, -1), abs(count - third))))
        last[counts[-1] / size] = turn
    return counts


def checked_positions(group: ChannelGroup, positions: Iterable[int]) -> tuple[int, ...]:
    '''Return sorted positions, after a check that each is a whole number within the group and given once.'''
    if isinstance(positions, str) or not isinstance(positions, Iterable) or getattr(positions, 'ndim', 1) == 0:
        raise PruneError(f'positions of group {group.name!r} are a list, not {shown(positions)}.')
    numbers = []
    for position in positions:
        try:
            flag = isinstance(position, (bool, np.bool_)) or getattr(position, 'dtype', None) == torch.bool
            number = None if flag else operator.index(position)
        except TypeError:
            number = None
        if number is None:
            raise PruneError(f'{position!r} is no position in group {group.name!r}: give whole numbers from 0 to '
                             f'{group.size - 1}.')
        numbers.append(number)
        if not 0 <= numbers[-1] < group.size:
            raise PruneError(f'position {position} is out of range for group {group.name!r}: it has positions 0 to '
                             f'{group.size - 1}.')
    if len(set(numbers)) < len(numbers):
        twice = next(number for number in numbers if numbers.count(number) > 1)
        raise PruneError(f'position {twice} of group {group.name!r} is given twice.')
    return tuple(sorted(numbers))

'''Two plans in a row as one: what the second removes from the pruned network, in channels of the original.

A pruned network traced anew may show other groups under other names: a grouped convolution that is left with one
channel a group is a depthwise one. What relates the two is where channels sit in parameters.
'''
from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from .errors import PruneError
from .graph import ChannelGraph
from .tables import some

Removed = Mapping[str, Sequence[int]]


def composed(before: ChannelGraph, first: Removed, after: ChannelGraph, second: Removed) -> dict[str, list[int]]:
    '''The positions that go, by group of the original.

    Parameters
    ----------
    before, first:
        The original, and what the first plan removes from it.
    after, second:
        The pruned network, and what the second plan removes from that.

    Raises
    ------
    PruneError
        If ``after`` is not what ``first`` leaves, or the original cannot lose these channels at once.
    '''
    gone = before.removed_labels(first)
    lost, matched = _carried(before, gone, after, after.removed_labels(second))
    channel = before.solution.channel
    new = np.unique(channel[lost])
    stuck = lost & (channel < 0)
    if stuck.any():
        raise PruneError(f'{_where(before, stuck)} must stay in the original '
                         f'({before.solution.reason(int(stuck.argmax()))}): the later plan cannot be joined to this '
                         'one. Apply one after the other.')
    part = matched & ~lost & ~gone & np.isin(channel, new) & (channel >= 0)
    if part.any():
        raise PruneError(f'the later plan removes parts of channels of the original, which also sit in '
                         f'{_where(before, part)}: it cannot be joined to this one. Apply one after the other.')
    chosen = np.zeros(len(before.solution.group), bool)
    chosen[new] = True
    removed = {}
    for group in before.groups:
        positions = sorted({*first.get(group.name, ()), *np.flatnonzero(chosen[group.channels]).tolist()})
        counts = np.bincount(group.blocks[positions], minlength=group.step) if group.blocks is not None else [0]
        if len(set(counts)) > 1:
            raise PruneError(f'the later plan removes whole blocks of group {group.name!r}, whose {group.step} blocks '
                             'must lose equally many channels in the original, for '
                             f'{some(before.balanced_by(group), 3)}: left with one channel each, they are a depthwise '
                             'convolution. It cannot be joined to this one. Apply one after the other.')
        if positions:
            removed[group.name] = positions
    return removed


def _carried(before: ChannelGraph, gone: npt.NDArray[np.bool_], after: ChannelGraph,
             lost_after: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    '''For each label of the original, whether it goes with those of ``after``, and whether it is there at all.'''
    axes = {(axis.parameter, axis.dim): axis for axis in after.recording.axes}
    lost, matched = np.zeros((2, len(gone)), bool)
    for axis in before.recording.axes:
        labels = np.arange(axis.start, axis.start + axis.size)
        labels = labels[~gone[labels]]
        there = axes.pop((axis.parameter, axis.dim), None)
        if there is not None and there.size == len(labels):
            lost[labels] = lost_after[there.start:there.start + there.size]
            matched[labels] = True
        elif there is not None or len(labels) > axis.blocks:  # a dimension of one index has no labels
            raise PruneError(f'{axis.parameter!r} has {len(labels) // axis.blocks} indices along dimension {axis.dim} '
                             f'after this plan, but {"no such dimension" if there is None else there.length} in the '
                             'later one: the later plan was made for another network.')
    if axes:
        raise PruneError(f'{next(iter(axes))[0]!r} is not in the network of this plan: the later plan was made for '
                         'another network.')
    return lost, matched


def _where(graph: ChannelGraph, labels: npt.NDArray[np.bool_]) -> str:
    numbers = np.unique(graph.roles.axis[np.flatnonzero(labels)])
    return some(dict.fromkeys(repr(graph.recording.axes[number].parameter) for number in numbers.tolist()), 3)

'''Turn recorded ties and locks into removable channels and their groups.

Channels are connected components of labels; components that sit equally often in the same dimensions form a group.
'''
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..tracing._labels import Array, BlockField, Channels, Labels, every, first, flat_pairs, joined
from ..tracing._recorded import Operation
from ..tracing._trace import Recording

Lock = tuple[Labels, str]
NOT_READ = 'no weight reads it'


@dataclass
class Solution:
    '''The assignment of labels to channels, of channels to groups, and of channels to blocks of a group.

    Attributes
    ----------
    component: numpy.ndarray
        For each label, the smallest label that is tied to it.
    channel: numpy.ndarray
        For each label, the number of its channel, or -1 where it must stay.
    group: numpy.ndarray
        For each channel, the number of its group: channels of one group sit equally often in the same dimensions.
    block: numpy.ndarray
        For each channel, the number of its block; the blocks of one group must lose equally many channels.
    reasons: dict of int to str
        The reason why the labels of a component must stay, by its smallest label.
    '''

    component: Labels
    channel: Channels
    group: Array
    block: Array
    reasons: dict[int, str]

    @cached_property
    def locked(self) -> npt.NDArray[np.bool_]:
        '''For each label, whether it must stay.'''
        return self.channel < 0

    def reason(self, label: int) -> str:
        '''Return the reason why a label must stay.'''
        return self.reasons.get(int(self.component[label]), NOT_READ)


def solve(recording: Recording, locks: Sequence[Lock]) -> Solution:
    '''Find the removable channels, given further ``locks`` (labels, reason) beside those recorded.'''
    ties = [tie for operation in recording.operations for tie in operation.ties]
    component = joined(Labels(np.arange(recording.size)), ties)
    blocks: list[tuple[Labels, Labels]] = []
    joint = joint_fields(recording.operations)
    balances = unique_arrays(labels for operation in recording.operations for labels in operation.balances)
    while True:
        reasons = _lock_reasons(recording, locks, blocks, component)
        kept = np.zeros(recording.size, bool)
        kept[list(reasons)] = True
        kept[0] = True
        further = list(_rectangular_ties(joint, Labels(np.where(kept[component], 0, component))))
        if not further:
            solution = _channels(recording, component, kept, reasons, balances)
            tied = _unbalanced(balances, solution) if balances else []
            balances = [labels for labels in balances if not any(labels is other for other in tied)]
            further = [(labels, first(labels, 0)) for labels in tied]
        if not further:
            return solution
        blocks += further
        component = joined(component, further)


def _channels(recording: Recording, component: Labels, kept: npt.NDArray[np.bool_], reasons: dict[int, str],
              balances: Sequence[Labels]) -> Solution:
    '''Number the components that can be removed, and group them.'''
    read = np.zeros(recording.size, bool)
    for operation in recording.operations:
        for labels in operation.contracted:
            read[component[labels]] = True
    firsts = np.array([axis.start for axis in recording.axes], int)
    whole = component[1:] == np.repeat(component[firsts], [axis.size for axis in recording.axes])
    together = np.logical_and.reduceat(whole, firsts - 1) if len(firsts) else whole
    for position in np.flatnonzero(together).tolist():
        axis = recording.axes[position]
        root = int(component[axis.start])
        if not kept[root]:  # the last channel of a dimension never goes
            kept[root] = True
            reasons[root] = f'all channels along dimension {axis.dim} of {axis.parameter} are coupled'
    roots = np.flatnonzero(read & ~kept & (component == np.arange(recording.size)))
    number = np.full(recording.size, -1, np.int64)
    number[roots] = np.arange(len(roots))
    channel = Channels(number[component])
    return Solution(component, channel, *_group(recording, channel, len(roots), balances), reasons)


def _lock_reasons(recording: Recording, locks: Sequence[Lock], blocks: Sequence[tuple[Labels, Labels]],
                  component: Labels) -> dict[int, str]:
    '''Return the reason of the first lock of each component, in execution order.'''
    reasons: dict[int, str] = {}
    real = np.arange(recording.size) != 0

    def hit(labels: Labels, reason: str) -> None:
        for root in np.unique(component[labels]).tolist():
            reasons.setdefault(root, reason)

    for labels, reason in locks:
        hit(labels, reason)
    for operation in recording.operations:
        for labels, reason in operation.locks:
            hit(labels, reason if operation.name == 'output' else f'{reason} ({operation})')
        for left, right in operation.ties:
            if not (every(real[left]) and every(real[right])):
                hit(_beside_zero(left, right), f'it meets positions that must stay ({operation})')
    for left, right in blocks:
        hit(_beside_zero(left, right), 'it forms a block with positions that must stay')
    return reasons


def _beside_zero(left: Labels, right: Labels) -> Labels:
    '''Return the labels that are tied to label 0.'''
    edges = flat_pairs([(left, right)])
    return edges.max(0)[edges.min(0) == 0]


def joint_fields(operations: Iterable[Operation]) -> list[Labels]:
    '''Return the label arrays that vary along several dimensions, each once.'''
    found = {id(field): field for operation in operations for field in operation.fields()
             if len(field.dims) > 1 and not isinstance(field, BlockField)}
    return unique_arrays(field.labels for field in found.values())


def unique_arrays(arrays: Iterable[Labels]) -> list[Labels]:
    '''Return the arrays without repetitions of equal ones.'''
    return list({(labels.shape, labels.tobytes()): labels for labels in arrays}.values())


def _rectangular_ties(joint: Iterable[Labels], component: Labels) -> Iterable[tuple[Labels, Labels]]:
    '''Yield the ties that make every removal cut whole slices where labels vary along several dimensions of a tensor.

    Labels are tied along all of these dimensions but the last. Components that one tensor ties wait for the next round
    before another tensor may tie them, which often is not necessary then.
    '''
    tied = np.zeros(len(component), bool)
    for labels in joint:
        classes = Labels(component[labels])
        dims = [dim for dim in range(classes.ndim) if (classes != first(classes, dim)).any()]
        if len(dims) < 2 or tied[classes].any():
            continue
        tied[classes] = True
        tied[0] = False
        for dim in dims[:-1]:
            yield labels, first(labels, dim)
            labels = first(labels, dim)


def _unbalanced(balances: Iterable[Labels], solution: Solution) -> list[Labels]:
    '''Return the arrays whose rows do not stay equal when each block of every group loses equally many channels.

    Equal positions of their rows must be tied instead. As with :func:`_rectangular_ties`, channels that one array ties
    wait for the next round.
    '''
    uneven = np.zeros(len(solution.group) + 1, bool)  # by channel, none last: its group has blocks that differ in size
    pairs, sizes = np.unique(np.stack([solution.group, solution.block]), axis=1, return_counts=True)
    for group in np.unique(pairs[0]):
        held = sizes[pairs[0] == group]
        uneven[:-1][solution.group == group] = len(held) > 1 and (held[0] == 1 or (held != held[0]).any())
    found: list[Labels] = []
    tied, numbers = np.zeros(len(uneven), bool), np.append(solution.group, -1)
    for labels in balances:
        channel = solution.channel[labels]
        groups = np.sort(numbers[channel], 1)
        if (uneven[channel].any() or (groups != groups[:1]).any()) and not tied[channel].any():
            tied[channel] = True
            tied[-1] = False
            found.append(labels)
    return found


def _group(recording: Recording, channel: Channels, count: int, balances: Sequence[Labels]) -> tuple[Array, Array]:
    '''Number the groups and the blocks of all channels.

    Channels with equal counts on every labelled axis and in every array of ``balances`` form a group; channels of a
    group with equal counts also in every row of these arrays form a block.
    '''
    rng = np.random.default_rng(0)
    hashes = rng.integers(1, 2 ** 63, size=len(recording.axes), dtype=np.uint64)
    on_axis = np.repeat(hashes, [axis.size for axis in recording.axes])
    signature, by_row = np.zeros((2, count + 1), np.uint64)  # one more for what must stay
    labels = np.flatnonzero(channel >= 0)
    np.add.at(signature, channel[labels], on_axis[labels - 1])
    for rows in balances:
        np.add.at(signature, channel[rows], rng.integers(1, 2 ** 63, dtype=np.uint64))
        np.add.at(by_row, channel[rows], rng.integers(1, 2 ** 63, size=(len(rows), 1), dtype=np.uint64))
    group, block = (np.unique(found[:-1], return_inverse=True)[1].astype(np.int64) for found in (signature, by_row))
    return group, block

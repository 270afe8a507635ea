'''What may be asked to go: positions in groups, equally many of each of their blocks.'''
from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from .errors import PruneError
from .graph import ChannelGraph
from .groups import ChannelGroup
from .tables import some


def checked_positions(group: ChannelGroup, positions: Iterable[int]) -> tuple[int, ...]:
    '''Sorted positions, each a whole number within the group and given once.'''
    if isinstance(positions, str) or not isinstance(positions, Iterable) or getattr(positions, 'ndim', 1) == 0:
        raise PruneError(f'positions of group {group.name!r} are a list, not {positions!r}.')
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


def check_balance(graph: ChannelGraph, group: ChannelGroup, positions: Sequence[int]) -> None:
    '''Refuse to remove different numbers of channels from the blocks of a group.'''
    if group.blocks is None:
        return
    counts = np.bincount(group.blocks[list(positions)], minlength=group.step).tolist()
    if len(set(counts)) > 1:
        most, least = counts.index(max(counts)), counts.index(min(counts))
        spare = np.setdiff1d(np.flatnonzero(group.blocks == least), positions)
        raise PruneError(f'the {group.step} blocks of group {group.name!r} must lose equally many channels, for '
                         f'{some(graph.balanced_by(group), 3)}: block {most} would lose {counts[most]}, block {least} '
                         f'{counts[least]}. Choose all of them in one call; the block of each position is in '
                         f'group.blocks. Block {least} could also lose {some(map(str, spare.tolist()))}.')

'''The samples that matter most to each channel, kept while batches go by, in memory that does not grow with them.'''
from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from .errors import PruneError
from .states import State

MOST_CLASSES = 100
Layout = tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class Best:
    '''What is kept of the samples so far; merging makes a new one. The C channels of all groups lie side by side.

    Attributes
    ----------
    layout: tuple of (str, int)
        The groups and their sizes.
    present: tuple of str
        The groups that relevance arrived at.
    grids: dict of str to tuple of int
        By group, the spatial size of the tensor that positions are in.
    classes: tuple of int
        The classes seen, in the order they came, at most ``MOST_CLASSES``.
    dropped: int
        How many samples of further classes there were.
    values, samples, positions: torch.Tensor
        Shape (C, k): the largest scores of single samples, descending; the samples' numbers, -1 where there are fewer;
        where relevance is largest, as a position in the flattened grid, -1 where that cannot be told.
    shares, share_samples, share_classes: torch.Tensor
        Shape (C,): the largest share that a channel has in a sample's absolute relevance at its group; the sample, and
        its class (-1: none).
    class_sums, class_counts: torch.Tensor
        Shape (classes, C) and (classes,): the sum of scores over samples, and their number.
    '''

    layout: Layout
    present: tuple[str, ...]
    grids: Mapping[str, tuple[int, ...]]
    classes: tuple[int, ...]
    dropped: int
    values: torch.Tensor
    samples: torch.Tensor
    positions: torch.Tensor
    shares: torch.Tensor
    share_samples: torch.Tensor
    share_classes: torch.Tensor
    class_sums: torch.Tensor
    class_counts: torch.Tensor

    @classmethod
    def of(cls, layout: Layout, scores: Mapping[str, torch.Tensor], numbers: torch.Tensor, classes: torch.Tensor | None,
           count: int, spots: Spots) -> Best:
        '''Of one batch.

        Parameters
        ----------
        layout: tuple of (str, int)
            The groups and their sizes.
        scores: mapping of str to torch.Tensor
            Shape (samples, channels) by group.
        numbers: torch.Tensor
            int64: what the samples are called.
        classes: torch.Tensor, optional
            int64: their classes, -1 for none.
        count: int
            How many samples to keep for each channel.
        spots: Spots
            Says where relevance is largest.
        '''
        like = next(iter(scores.values()))
        rows = torch.cat([scores[name] if name in scores else like.new_zeros(len(like), size)
                          for name, size in layout], 1)
        owner = torch.repeat_interleave(torch.tensor([size for _, size in layout])).to(rows.device)
        numbers = numbers.to(rows.device)
        classes = torch.full_like(numbers, -1) if classes is None else classes.to(numbers)
        values, order = rows.T.sort(dim=1, descending=True, stable=True)
        values, order = values[:, :count], order[:, :count]
        mass = rows.abs()
        totals = rows.new_zeros(len(rows), len(layout)).index_add_(1, owner, mass)[:, owner]
        shares, at = (mass / totals.clamp(min=torch.finfo(rows.dtype).tiny)).max(0)
        found = classes.unique().tolist()
        found = [number for number in found if number >= 0]
        wanted = torch.tensor(found, dtype=torch.int64, device=rows.device)
        members = (classes == wanted.unsqueeze(1)).to(rows)
        filled = spots.all(layout, scores, order)
        short = (0, count - values.shape[1])
        pad = torch.nn.functional.pad
        return cls(layout, tuple(name for name, _ in layout if name in scores), spots.grids, tuple(found), 0,
                   pad(values, short, value=-math.inf), pad(numbers[order], short, value=-1),
                   pad(filled, short, value=-1), shares, numbers[at], classes[at], members @ rows,
                   members.sum(1)).capped()

    def numbered_from(self, first: int) -> Best:
        '''The same, if that many samples went by before.'''
        return replace(self, samples=torch.where(self.samples < 0, self.samples, self.samples + first),
                       share_samples=self.share_samples + first)

    def merged(self, other: Best) -> Best:
        '''With another, of later samples; of equals, the earlier come first.'''
        device, count = other.values.device, self.values.shape[1]
        mine = self.to(device)
        for name, grid in other.grids.items():
            if self.grids.get(name, grid) != grid:
                raise PruneError(f'the tensor of group {name!r} has spatial size {grid}, but had {self.grids[name]} '
                                 'before: exemplars= needs inputs of one size.')
        values, order = torch.cat([mine.values, other.values], 1).sort(dim=1, descending=True, stable=True)
        order = order[:, :count]
        more = other.shares > mine.shares
        classes = (*self.classes, *(number for number in other.classes if number not in self.classes))
        sums = other.class_sums.new_zeros(len(classes), len(values))
        counts = sums.new_zeros(len(classes))
        for part in (mine, other):
            rows = torch.tensor([classes.index(number) for number in part.classes], dtype=torch.int64, device=device)
            sums.index_add_(0, rows, part.class_sums)
            counts.index_add_(0, rows, part.class_counts)
        present = tuple(name for name, _ in self.layout if name in {*self.present, *other.present})
        return Best(self.layout, present, {**self.grids, **other.grids}, classes, self.dropped + other.dropped,
                    values[:, :count], torch.cat([mine.samples, other.samples], 1).gather(1, order),
                    torch.cat([mine.positions, other.positions], 1).gather(1, order),
                    torch.where(more, other.shares, mine.shares),
                    torch.where(more, other.share_samples, mine.share_samples),
                    torch.where(more, other.share_classes, mine.share_classes), sums, counts).capped()

    def capped(self) -> Best:
        '''Without the classes that came after the first hundred.'''
        if len(self.classes) <= MOST_CLASSES:
            return self
        return replace(self, classes=self.classes[:MOST_CLASSES], class_sums=self.class_sums[:MOST_CLASSES],
                       class_counts=self.class_counts[:MOST_CLASSES],
                       dropped=self.dropped + int(self.class_counts[MOST_CLASSES:].sum()))

    def to(self, device: torch.device | str) -> Best:
        '''The same on a device.'''
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, torch.Tensor]:
        '''All tensors by name.'''
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def to_json(self) -> str:
        '''All that is no tensor.'''
        return json.dumps({'layout': self.layout, 'present': self.present, 'grids': dict(self.grids),
                           'classes': self.classes, 'dropped': self.dropped})

    @classmethod
    def load(cls, text: str, tensors: Mapping[str, torch.Tensor], source: str) -> Best:
        '''The inverse of :meth:`to_json` and :meth:`tensors`.

        Raises
        ------
        PruneError
            If they are damaged.
        '''
        try:
            data = json.loads(text)
            found = cls(tuple((str(name), int(size)) for name, size in data['layout']), tuple(data['present']),
                        {name: tuple(grid) for name, grid in data['grids'].items()}, tuple(data['classes']),
                        int(data['dropped']), **tensors)
            channels = sum(size for _, size in found.layout)
            if any(channels not in tensor.shape for name, tensor in found.tensors().items() if name != 'class_counts'):
                raise ValueError('sizes differ')
            return found
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PruneError(f'{source!r} holds damaged exemplars ({error!r}).') from error


class Spots:
    '''Where in the tensors of a batch the relevance of a channel is largest.

    A group with several states is looked at in one of them, see :func:`looked_at`.

    Parameters
    ----------
    absolute: bool
        Whether relevance of either sign counts.
    '''

    def __init__(self, absolute: bool):
        self.absolute = absolute
        self.grids: dict[str, tuple[int, ...]] = {}
        self._read: dict[str, tuple[State, torch.Tensor]] = {}
        self._rows = torch.zeros(0, dtype=torch.int64)

    def see(self, states: Sequence[State], relevance: Mapping[Any, torch.Tensor], share: torch.Tensor) -> None:
        '''Add the relevance for one of the targets of each sample, which has a ``share`` in the scores.'''
        by_group: dict[str, list[State]] = {}
        for state in states:
            if state.place in relevance:
                by_group.setdefault(state.group, []).append(state)
        for name, found in by_group.items():
            state = looked_at(found, lambda state: relevance[state.place].shape, len(share))
            values = relevance[state.place]
            grid = grid_of(state, values.shape, len(share))
            if grid is None:
                continue
            self.grids[name] = grid
            if name in self._read:
                weight = share.to(values).view(-1, *[1] * (values.dim() - 1))
                values = self._read[name][1] + torch.where(weight > 0, values * weight, 0)
            self._read[name] = state, values

    def only(self, rows: torch.Tensor) -> Spots:
        '''Count these samples of the batch only.'''
        self._rows = rows
        return self

    def all(self, layout: Layout, scores: Mapping[str, torch.Tensor], order: torch.Tensor) -> torch.Tensor:
        '''Flat positions for the samples ``order``, shape (C, k), of the channels of all groups.'''
        rows = self._rows.to(order.device)[order]
        result, start = torch.full_like(order, -1), 0
        for name, size in layout:
            if name in self._read and name in scores:
                state, values = self._read[name]
                channels = _places(state).to(order.device)
                last = len(state.dims)
                values = values.movedim(state.dims, tuple(range(1, last + 1))).flatten(1, last)
                picked = values[rows[start:start + size], channels.clamp(min=0).unsqueeze(1)]
                picked = (picked.abs() if self.absolute else picked).reshape(*picked.shape[:2], -1)
                result[start:start + size] = torch.where(channels.unsqueeze(1) >= 0, picked.argmax(2), -1)
            start += size
        return result


def looked_at(states: Sequence[State], shape: Callable[[State], Sequence[int]], batch: int) -> State:
    '''The state that positions are in: the last of those with the finest grid that hold most of the channels.'''
    def key(state: State) -> tuple[int, int, int]:
        return (int((_places(state) >= 0).sum()), math.prod(grid_of(state, shape(state), batch) or ()), state.value)

    return states[0] if len(states) == 1 else max(states, key=key)


def grid_of(state: State, shape: Sequence[int], batch: int) -> tuple[int, ...] | None:
    '''The dimensions of a state that hold neither samples nor channels; None where samples are cut to pieces.'''
    if shape[0] != batch:
        return None
    return tuple(size for dim, size in enumerate(shape) if dim and dim not in state.dims)


def _places(state: State) -> torch.Tensor:
    '''For each channel, the first of the places in the state's (flattened) dimensions that hold it; -1 for none.'''
    found, first = np.unique(state.positions.numpy().reshape(-1), return_index=True)
    places = np.full(state.size + 1, -1)
    places[found] = first
    return torch.from_numpy(places[:state.size])

'''``Exemplars``: for each channel, the reference samples with the most relevance, and where in them it lies.

They are selected while batches go by (``Best``), in memory that does not grow with the number of samples.
'''
from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from ..errors import PruneError
from ..util._display import table
from ._sites import ActivationSite

MOST_CLASSES = 100
Layout = tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class Best:
    '''Scores and numbers of the samples kept so far, for the C channels of all groups side by side; immutable.

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
        The number of samples of further classes.
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
        '''Select from one batch.

        Parameters
        ----------
        layout: tuple of (str, int)
            The groups and their sizes.
        scores: mapping of str to torch.Tensor
            Shape (samples, channels) by group.
        numbers: torch.Tensor
            int64: the numbers of the samples.
        classes: torch.Tensor, optional
            int64: their classes, -1 for none.
        count: int
            The number of samples to keep for each channel.
        spots: Spots
            Says where relevance is largest.
        '''
        like = next(iter(scores.values()))
        rows = torch.cat([scores[name] if name in scores else like.new_zeros(len(like), size)
                          for name, size in layout], 1)
        owner = torch.repeat_interleave(torch.tensor([size for _, size in layout], device='cpu')).to(rows.device)
        numbers = numbers.to(rows.device)
        classes = torch.full_like(numbers, -1) if classes is None else classes.to(numbers)
        values, order = rows.T.sort(dim=1, descending=True, stable=True)
        values, order = values[:, :count], order[:, :count]
        absolute = rows.abs()
        totals = rows.new_zeros(len(rows), len(layout)).index_add_(1, owner, absolute)[:, owner]
        shares, at = (absolute / totals.clamp(min=torch.finfo(rows.dtype).tiny)).max(0)
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
        '''Renumber the samples of a batch that ``first`` samples came before.'''
        return replace(self, samples=torch.where(self.samples < 0, self.samples, self.samples + first),
                       share_samples=self.share_samples + first)

    def merged(self, other: Best) -> Best:
        '''Merge with what is kept of later samples; of equal scores, the earlier come first.'''
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
        '''Drop the classes that came after the first hundred.'''
        if len(self.classes) <= MOST_CLASSES:
            return self
        return replace(self, classes=self.classes[:MOST_CLASSES], class_sums=self.class_sums[:MOST_CLASSES],
                       class_counts=self.class_counts[:MOST_CLASSES],
                       dropped=self.dropped + int(self.class_counts[MOST_CLASSES:].sum()))

    def to(self, device: torch.device | str) -> Best:
        '''Move all tensors to a device.'''
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, torch.Tensor]:
        '''Return all tensors by name.'''
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def to_json(self) -> str:
        '''Return everything that is no tensor, as JSON.'''
        return json.dumps({'layout': self.layout, 'present': self.present, 'grids': dict(self.grids),
                           'classes': self.classes, 'dropped': self.dropped})

    @classmethod
    def load(cls, text: str, tensors: Mapping[str, torch.Tensor], source: str) -> Best:
        '''Read what :meth:`to_json` and :meth:`tensors` returned.

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
            raise PruneError(f'{source!r} holds damaged reference samples ({error!r}).') from error


class Spots:
    '''Find where in the tensors of a batch the relevance of a channel is largest.

    Of a group with several activation sites, one is used, see :func:`looked_at`.

    Parameters
    ----------
    absolute: bool
        Whether relevance of either sign counts.
    '''

    def __init__(self, absolute: bool):
        self.absolute = absolute
        self.grids: dict[str, tuple[int, ...]] = {}
        self._read: dict[str, tuple[ActivationSite, torch.Tensor]] = {}
        self._rows = torch.zeros(0, dtype=torch.int64, device='cpu')

    def see(self, sites: Sequence[ActivationSite], relevance: Mapping[Any, torch.Tensor], share: torch.Tensor) -> None:
        '''Add the relevance for one of the targets of each sample, which has a ``share`` of the scores.'''
        by_group: dict[str, list[ActivationSite]] = {}
        for site in sites:
            if site.place in relevance:
                by_group.setdefault(site.group, []).append(site)
        for name, found in by_group.items():
            site = looked_at(found, lambda site: relevance[site.place].shape, len(share))
            values = relevance[site.place]
            grid = grid_of(site, values.shape, len(share))
            if grid is None:
                continue
            self.grids[name] = grid
            if name in self._read:
                weight = share.to(values).view(-1, *[1] * (values.dim() - 1))
                values = self._read[name][1] + torch.where(weight > 0, values * weight, 0)
            self._read[name] = site, values

    def only(self, rows: torch.Tensor) -> Spots:
        '''Count these samples of the batch only.'''
        self._rows = rows
        return self

    def all(self, layout: Layout, scores: Mapping[str, torch.Tensor], order: torch.Tensor) -> torch.Tensor:
        '''Return flat positions for the samples ``order``, shape (C, k), of the channels of all groups.'''
        rows = self._rows.to(order.device)[order]
        result, start = torch.full_like(order, -1), 0
        for name, size in layout:
            if name in self._read and name in scores:
                site, values = self._read[name]
                channels = _places(site).to(order.device)
                last = len(site.dims)
                values = values.movedim(site.dims, tuple(range(1, last + 1))).flatten(1, last)
                picked = values[rows[start:start + size], channels.clamp(min=0).unsqueeze(1)]
                picked = (picked.abs() if self.absolute else picked).reshape(*picked.shape[:2], -1)
                result[start:start + size] = torch.where(channels.unsqueeze(1) >= 0, picked.argmax(2), -1)
            start += size
        return result


def looked_at(sites: Sequence[ActivationSite], shape: Callable[[ActivationSite], Sequence[int]],
              batch: int) -> ActivationSite:
    '''Return the site that positions are in: the last of those with the finest grid that hold most of the channels.'''
    def key(site: ActivationSite) -> tuple[int, int, int]:
        return (int((_places(site) >= 0).sum()), math.prod(grid_of(site, shape(site), batch) or ()), site.value)

    return sites[0] if len(sites) == 1 else max(sites, key=key)


def grid_of(site: ActivationSite, shape: Sequence[int], batch: int) -> tuple[int, ...] | None:
    '''Return the dimensions of a site that hold neither samples nor channels; None where samples are cut to pieces.'''
    if shape[0] != batch:
        return None
    return tuple(size for dim, size in enumerate(shape) if dim and dim not in site.dims)


def _places(site: ActivationSite) -> torch.Tensor:
    '''Return, for each channel, the first place in the site's flattened dimensions that holds it, or -1.'''
    found, first = np.unique(site.positions.numpy().reshape(-1), return_index=True)
    places = np.full(site.size + 1, -1)
    places[found] = first
    return torch.from_numpy(places[:site.size])


class Exemplars:
    '''For each channel of each group, the reference samples with the most relevance; print it for a table.

    ``pruner.collect(loader, exemplars=8)`` returns them as ``relevance.exemplars``; tensors are on the CPU. Of several
    processes, the samples of rank 0 come first, then those of rank 1.

    Parameters
    ----------
    best: Best
        The samples that a collector kept.

    Attributes
    ----------
    samples: dict of str to torch.Tensor
        By group, int64, shape (channels, k): the number of the sample in the loader's order, the most relevant first;
        -1 where there are fewer.
    values: dict of str to torch.Tensor
        float64, shape (channels, k): the relevance of the channel for that sample, aggregated as the scores are; 0
        where there is none.
    positions: dict of str to torch.Tensor
        int64, shape (channels, k, spatial dimensions): where relevance is largest in the tensor that carries the
        channels; -1 where that cannot be told. Of the tensors of a residual stream, it is the last with the finest
        grid.
    grids: dict of str to tuple of int
        The spatial size of that tensor; empty where it has none, e.g. behind a linear layer.
    classes: list of int
        The classes of the targets that were seen, sorted; empty where samples have none. At most 100.
    by_class: dict of str to torch.Tensor
        float64, shape (classes, channels): the mean relevance over the samples of a class.
    peak: dict of str to torch.Tensor
        float64, shape (channels,): the largest relevance for any sample.
    shares, share_samples, share_classes: dict of str to torch.Tensor
        Shape (channels,): the largest share of a channel in the absolute relevance of its group for a single sample,
        from 0 to 1, the number of that sample, and its class (-1 where it has none).

    References
    ----------
    Achtibat et al., "From attribution maps to human-understandable explanations through Concept Relevance Propagation"
    (arXiv 2206.03208), section on relevance maximization (RelMax).

    Examples
    --------
    >>> import torch
    >>> from zennit.composites import EpsilonPlus
    >>> import zennit_prune as zp
    >>> from zennit_prune.looking import receptive_field
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(),
    ...                             torch.nn.Linear(12, 2))
    >>> x, labels = torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 0, 1, 0, 1])
    >>> pruner = zp.Pruner(model, EpsilonPlus(), x, progress=False)
    >>> exemplars = pruner.collect((x, labels), exemplars=2, progress=False).exemplars
    >>> exemplars.samples['0'].shape, exemplars.grids['0'], exemplars.classes
    (torch.Size([3, 2]), (2, 2), [0, 1])
    >>> fields = receptive_field(model, x, '0')
    >>> exemplars.crops(x, '0', 1, fields).shape
    torch.Size([2, 1, 3, 3])
    '''

    def __init__(self, best: Best):
        self.best = best = best.to('cpu')
        sizes = dict(best.layout)
        starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist()))

        def cut(values: torch.Tensor, dim: int = 0) -> dict[str, torch.Tensor]:
            return {name: values.narrow(dim, starts[name], sizes[name]).clone() for name in best.present}

        ranks = sorted(range(len(best.classes)), key=lambda rank: best.classes[rank])
        means = (best.class_sums / best.class_counts.clamp(min=1).unsqueeze(1)).double()[ranks]
        self.classes = [best.classes[rank] for rank in ranks]
        self.samples = cut(best.samples)
        self.values = cut(best.values.double().masked_fill(best.samples < 0, 0.0))
        self.grids = {name: best.grids.get(name, ()) for name in best.present}
        self.positions = {name: _unravelled(flat, self.grids[name]) for name, flat in cut(best.positions).items()}
        self.by_class = cut(means, 1)
        self.peak = {name: values[:, 0].clone() for name, values in self.values.items()}
        self.shares = cut(best.shares.double())
        self.share_samples, self.share_classes = cut(best.share_samples), cut(best.share_classes)

    def crops(self, images: Any, group: str, channel: int, fields: torch.Tensor) -> torch.Tensor:
        '''Crop each of a channel's samples to the part that the position of largest relevance sees.

        Parameters
        ----------
        images: sequence
            The samples in the loader's order: a tensor of shape (N, C, H, W), or a dataset of (C, H, W) tensors, or of
            pairs that begin with one.
        group: str
            The name of a group.
        channel: int
            The position in the group.
        fields: torch.Tensor
            :func:`zennit_prune.looking.receptive_field` of the group, for images of the size that was collected from.

        Returns
        -------
        torch.Tensor
            Shape (samples, C, h, w), as large as the largest field; what lies outside of an image is zero.

        Raises
        ------
        PruneError
            For an unknown group or channel, or fields of another grid.
        '''
        if group not in self.samples:
            raise PruneError(f'there are no reference samples for {group!r}. Groups: {", ".join(self.samples)}.')
        grid, size = self.grids[group], len(self.samples[group])
        if not 0 <= channel < size:
            raise PruneError(f'channel {channel} is out of range: group {group!r} has {size} channels.')
        if tuple(fields.shape) != (*grid, 4):
            raise PruneError(f'fields have shape {tuple(fields.shape)}, but group {group!r} has grid {grid}: give '
                             f'those of receptive_field for this group, shape {(*grid, 4)}.')
        boxes = fields.reshape(-1, 4)
        height, width = int((boxes[:, 1] - boxes[:, 0]).max()), int((boxes[:, 3] - boxes[:, 2]).max())
        found = []
        for sample, position in zip(self.samples[group][channel].tolist(), self.positions[group][channel]):
            if sample >= 0 and (position >= 0).all():
                image = images[sample]
                image = image[0] if isinstance(image, (tuple, list)) else image
                top, bottom, left, right = fields[tuple(position.tolist())].tolist()
                crop = image.new_zeros(len(image), height, width)
                down = 0 if top > 0 else height - (bottom - top)  # cut off at the top: missing there
                along = 0 if left > 0 else width - (right - left)
                crop[:, down:down + bottom - top, along:along + right - left] = image[:, top:bottom, left:right]
                found.append(crop)
        if not found:
            raise PruneError(f'channel {channel} of group {group!r} has no sample with a known position.')
        return torch.stack(found)

    def __str__(self) -> str:
        rows = [(name, len(values), float(self.peak[name].max()), f'{float(self.shares[name].max()):.0%}',
                 'x'.join(map(str, self.grids[name])) or '-') for name, values in self.values.items()]
        return table(('group', 'channels', 'peak', 'largest share', 'grid'), rows)

    def __repr__(self) -> str:
        return (f'Exemplars({self.best.values.shape[1]} samples for each channel of {len(self.samples)} groups, '
                f'{len(self.classes)} classes)')


def _unravelled(flat: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    '''Return positions in a grid, shape (channels, k, dimensions of the grid).'''
    if not grid:
        return torch.zeros(*flat.shape, 0, dtype=torch.int64, device=flat.device)
    positions = torch.from_numpy(np.stack(np.unravel_index(flat.clamp(min=0).numpy(), grid), -1))
    return positions.masked_fill(flat.unsqueeze(-1) < 0, -1)

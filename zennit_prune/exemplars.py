'''``Exemplars``: the reference samples that matter most to each channel, and where in them.'''
from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .best import Best
from .errors import PruneError
from .tables import table


class Exemplars:
    '''For each channel of each group, the samples with the most relevance; print it for a table.

    Made by ``pruner.collect(loader, exemplars=8)``; tensors are on the CPU.

    Attributes
    ----------
    samples: dict of str to torch.Tensor
        By group, int64, shape (channels, k): the number of the sample in the loader's order, the most relevant first;
        -1 where there are fewer. Of several processes, the samples of rank 0 come first, then those of rank 1.
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
        the number of that sample, and its class (-1 where it has none).
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
        '''What a channel saw where it mattered most: a crop of each of its samples.

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
            :func:`zennit_prune.receptive_field` of the group, for images of the size that was collected from.

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
            raise PruneError(f'there are no exemplars for {group!r}. Groups: {", ".join(self.samples)}.')
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
    '''Positions in a grid, shape (channels, k, dimensions of the grid).'''
    if not grid:
        return torch.zeros(*flat.shape, 0, dtype=torch.int64)
    positions = torch.from_numpy(np.stack(np.unravel_index(flat.clamp(min=0).numpy(), grid), -1))
    return positions.masked_fill(flat.unsqueeze(-1) < 0, -1)

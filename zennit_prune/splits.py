'''Loaders that are read many times, and a share of them held out.'''
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset, TensorDataset

from .errors import PruneError

BATCH = 32


def many_times(loader: Iterable[Any]) -> Iterable[Any]:
    '''What can be read again and again: tensors are shuffled each time, an iterator is held in memory.'''
    tensors = (loader,) if isinstance(loader, torch.Tensor) else loader
    if isinstance(tensors, tuple) and tensors and all(isinstance(part, torch.Tensor) for part in tensors):
        if len({len(part) for part in tensors}) > 1:
            raise PruneError(f'there are {len(tensors[0])} inputs and {len(tensors[1])} labels.')
        return DataLoader(TensorDataset(*tensors), BATCH, shuffle=True)
    return list(loader) if isinstance(loader, Iterator) else loader


def held_out(loader: Any, share: float) -> tuple[Iterable[Any], Iterable[Any]]:
    '''What is left of a loader, and the share held out: samples of a ``DataLoader``, whole batches of a list.

    Raises
    ------
    PruneError
        If a share of it cannot be told from the rest in the next pass, or either would be empty.
    '''
    if not 0 < share < 1:
        raise PruneError(f'validation={share!r}: hold out a share between 0 and 1, or give a loader.')
    splits = isinstance(loader, DataLoader) and loader.batch_size is not None \
        and isinstance(loader.sampler, (RandomSampler, SequentialSampler))
    if not splits and not isinstance(loader, (list, tuple)):
        raise PruneError(f'validation={share!r} cannot hold out a share of this {type(loader).__name__}: give '
                         'validation= a loader of its own.')
    data = loader.dataset if splits else loader
    order = torch.randperm(len(data)).tolist()
    number = round(share * len(data))
    rest, held = sorted(order[number:]), sorted(order[:number])
    if not rest or not held:
        raise PruneError(f'validation={share!r} of {len(data)} {"samples" if splits else "batches"} leaves nothing to '
                         'train or to validate on: give more data, or a loader.')
    if not splits:
        return [data[index] for index in rest], [data[index] for index in held]
    options = {'num_workers': loader.num_workers, 'collate_fn': loader.collate_fn, 'pin_memory': loader.pin_memory}
    return (DataLoader(Subset(data, rest), loader.batch_size, isinstance(loader.sampler, RandomSampler), **options),
            DataLoader(Subset(data, held), loader.batch_size, **options))

'''Loaders that are read many times, and a share of them held out.

Batches from whatever yields them.
'''
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from tqdm.auto import tqdm

from ..errors import PruneError
from ._networks import map_tensors, tensors_in


def batches(loader: Iterable[Any], progress: str | None = None) -> Iterator[tuple[Any, Any]]:
    '''Pairs of inputs and target (None where there is none) from whatever yields batches.

    Samples that a ``DistributedSampler`` repeats to give every process as many are left out.

    Parameters
    ----------
    loader: iterable
        Yields (inputs, target) pairs, or inputs alone; a pair of tensors is cut into batches of 32.
    progress: str, optional
        What a progress bar on standard error says.
    '''
    left = _own_samples(loader)
    loader = as_loader(loader)
    try:
        total = len(loader)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a DataLoader of an IterableDataset
        total = None
    for batch in tqdm(loader, progress, total, disable=progress is None, leave=False):
        inputs, target = _pair(batch)
        if left is not None:
            size = batch_size(inputs)
            if size > left:
                inputs, target = only((inputs, target), size, slice(left))
            left -= min(size, left)
            if not batch_size(inputs):
                return
        yield inputs, target


def as_loader(loader: Iterable[Any]) -> Iterable[Any]:
    '''What yields batches as it is; a tensor, or a pair of tensors, as a list of batches of 32.'''
    if isinstance(loader, torch.Tensor):
        return list(loader.split(32))
    if isinstance(loader, tuple) and len(loader) == 2 and all(isinstance(part, torch.Tensor) for part in loader):
        if len(loader[0]) != len(loader[1]):
            raise PruneError(f'there are {len(loader[0])} inputs and {len(loader[1])} labels.')
        return list(zip(loader[0].split(32), loader[1].split(32)))
    if not isinstance(loader, Iterable) or isinstance(loader, (str, dict)):
        advice = ' Wrap it in a torch.utils.data.DataLoader.' if isinstance(loader, Dataset) else ''
        raise PruneError(f'a loader yields batches of (inputs, labels); a {type(loader).__name__} does not.{advice}')
    return loader


def _pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        return batch[0], None
    if isinstance(batch, (torch.Tensor, dict)):
        return batch, None
    raise PruneError('a batch is (inputs, labels), inputs alone, or a dict of inputs; a '
                     f'{type(batch).__name__} is not.')


def _own_samples(loader: Any) -> int | None:
    '''How many samples a ``DistributedSampler`` gives this process before it repeats some; None for other samplers.'''
    for sampler in (getattr(loader, 'sampler', None), getattr(getattr(loader, 'batch_sampler', None), 'sampler', None)):
        if isinstance(sampler, DistributedSampler):
            size = len(sampler.dataset)  # type: ignore[arg-type]
            return min(sampler.num_samples, len(range(sampler.rank, size, sampler.num_replicas)))
    return None


def batch_size(inputs: Any) -> int:
    '''The number of samples in a batch: the length of its first tensor.'''
    return next((len(tensor) for tensor in tensors_in(inputs) if tensor.dim()), 1)


def only(batch: Any, size: int, samples: Any) -> Any:
    '''Some samples of a batch: every tensor as long as the batch is indexed.'''
    def index(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or len(tensor) != size:
            return tensor
        return tensor[samples.to(tensor.device) if isinstance(samples, torch.Tensor) else samples]

    return map_tensors(index, batch)


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
    order = torch.randperm(len(data), device='cpu').tolist()
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

'''``Batch``: samples with their target, whose values are checked once; and batches from whatever yields them.

The file also makes loaders that can be read many times, and holds out a share of their samples.
'''
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from tqdm.auto import tqdm

from ..errors import PruneError
from ._networks import map_tensors, tensors_in

BATCH = 32  # samples, where a tensor is cut into batches


class Pair(NamedTuple):
    '''The inputs of a network, and the target that belongs to them.'''

    inputs: Any
    target: Any = None


class Batch(Pair):
    '''Samples with their target; a batch is created where data enter the library and unpacks as ``inputs, target``.

    Values are checked at most once: slices, copies on other devices and copies without target keep the result.

    Parameters
    ----------
    inputs: torch.Tensor, tuple, list or dict
        The arguments of a network.
    target: object, optional
        Labels, or anything else that :func:`zennit_prune.relevance.initial_relevance` takes.
    '''

    _finite: torch.Tensor | None = None
    _rest_is_finite: bool = True
    _labels: Any = None

    @classmethod
    def of(cls, value: Any) -> Batch:
        '''Return the batch that a loader yielded: a pair of inputs and target, or inputs alone.

        Raises
        ------
        PruneError
            If it is something else.
        '''
        if isinstance(value, Batch):
            return value
        if isinstance(value, (tuple, list)) and len(value) in (1, 2):
            return cls(*value)
        if isinstance(value, (torch.Tensor, dict)):
            return cls(value)
        raise PruneError('a batch is (inputs, labels), inputs alone, or a dict of inputs; a '
                         f'{type(value).__name__} is not.')

    @property
    def size(self) -> int:
        '''The number of samples.'''
        return batch_size(self.inputs)

    @property
    def finite(self) -> torch.Tensor:
        '''The mask of the samples that hold finite values only, shape (size,), bool, on the CPU.'''
        if self._finite is None:
            size = self.size
            finite, self._rest_is_finite = torch.ones(size, dtype=torch.bool, device='cpu'), True
            for tensor in filter(_may_be_infinite, tensors_in(self.inputs)):
                if _goes_by_samples(tensor, size):
                    finite &= torch.isfinite(tensor).reshape(size, -1).all(1).cpu()
                else:
                    self._rest_is_finite &= bool(torch.isfinite(tensor).all())
            self._finite = finite
        return self._finite

    def check_finite(self) -> None:
        '''Refuse inputs that hold values that are not finite.

        Raises
        ------
        PruneError
            With the shape of the first such input.
        '''
        if not (self.finite.all() and self._rest_is_finite):
            tensor = next(tensor for tensor in tensors_in(self.inputs) if not torch.isfinite(tensor).all())
            raise PruneError(f'an input of shape {tuple(tensor.shape)} holds values that are not finite (NaN or '
                             'infinite): check the data.')

    def only(self, samples: torch.Tensor | slice) -> Batch:
        '''Select some of the samples, by a slice, by their numbers or by a mask of shape (size,).'''
        size = self.size
        inputs, target = only((self.inputs, _indexable(self.target, size)), size, samples)
        at = samples.to('cpu') if isinstance(samples, torch.Tensor) else samples
        return self._derived(inputs, target, None if self._finite is None else self._finite[at])

    def to(self, device: torch.device) -> Batch:
        '''Return the batch on a device; itself if it is there.'''
        if all(tensor.device == device for tensor in tensors_in(tuple(self))):
            return self
        inputs, target = map_tensors(lambda tensor: tensor.to(device), tuple(self))
        return self._derived(inputs, target, self._finite)

    @property
    def labels(self) -> Any:
        '''The target that the batch was created with, where another took its place; of all its samples.'''
        return self.target if self._labels is None else self._labels

    def with_target(self, target: Any) -> Batch:
        '''Return the inputs with another target, or with None.'''
        if target is self.target:
            return self
        batch = self._derived(self.inputs, target, self._finite)
        batch._labels = None if target is None else self.labels
        return batch

    def zeroed(self) -> Batch:
        '''Return the batch with zeros in place of the samples that are not finite, so that it can run.'''
        broken, size = ~self.finite, self.size

        def zero(tensor: torch.Tensor) -> torch.Tensor:
            if not _may_be_infinite(tensor) or not _goes_by_samples(tensor, size):
                return tensor
            return tensor.masked_fill(broken.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1)), 0)

        return self._derived(map_tensors(zero, self.inputs), self.target, torch.ones_like(broken))

    def joined(self, others: Sequence[Batch]) -> Batch:
        '''Concatenate the inputs of several batches, without targets; tensors without samples are those of this one.

        Shapes must agree but for the number of samples.
        '''
        size = self.size

        def join(*parts: Any) -> Any:
            by_samples = isinstance(parts[0], torch.Tensor) and parts[0].dim() and len(parts[0]) == size
            return torch.cat(parts) if by_samples else parts[0]

        inputs = tree_map(join, self.inputs, *(other.inputs for other in others))
        return self._derived(inputs, None, torch.cat([batch.finite for batch in (self, *others)]))

    def _derived(self, inputs: Any, target: Any, finite: torch.Tensor | None) -> Batch:
        batch = Batch(inputs, target)
        batch._finite, batch._rest_is_finite, batch._labels = finite, self._rest_is_finite, self._labels
        return batch


def _may_be_infinite(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _goes_by_samples(tensor: torch.Tensor, size: int) -> bool:
    return tensor.dim() > 0 and len(tensor) == size > 0


def _indexable(target: Any, size: int) -> Any:
    '''Return labels in a list or an array as a tensor, which can be indexed; any other target as it is.'''
    if isinstance(target, (list, tuple, np.ndarray)) and len(target) == size:
        try:
            return torch.as_tensor(target, device='cpu')
        except (TypeError, ValueError, RuntimeError):  # several tensors, say
            return target
    return target


def batches(loader: Iterable[Any], progress: str | None = None) -> Iterator[Batch]:
    '''Yield batches from whatever yields them.

    Samples that a ``DistributedSampler`` repeats to give every process as many are left out.

    Parameters
    ----------
    loader: iterable
        Yields (inputs, target) pairs, or inputs alone; a pair of tensors is cut into batches of 32.
    progress: str, optional
        The label of a progress bar on standard error; None shows none.

    Yields
    ------
    Batch
        Its target is None where there is none.
    '''
    left = _own_samples(loader)
    loader = as_loader(loader)
    try:
        total = len(loader)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a DataLoader of an IterableDataset
        total = None
    for value in tqdm(loader, progress, total, disable=progress is None, leave=False):
        batch = Batch.of(value)
        if left is not None:
            size = batch.size
            if size > left:
                batch = batch.only(slice(left))
            left -= min(size, left)
            if not batch.size:
                return
        yield batch


def as_loader(loader: Iterable[Any]) -> Iterable[Any]:
    '''Cut a tensor, or a pair of tensors, into a list of batches of 32; pass on what yields batches.'''
    if isinstance(loader, torch.Tensor):
        return list(loader.split(BATCH))
    if isinstance(loader, tuple) and len(loader) == 2 and all(isinstance(part, torch.Tensor) for part in loader):
        if len(loader[0]) != len(loader[1]):
            raise PruneError(f'there are {len(loader[0])} inputs and {len(loader[1])} labels.')
        return list(zip(loader[0].split(BATCH), loader[1].split(BATCH)))
    if not isinstance(loader, Iterable) or isinstance(loader, (str, dict)):
        advice = ' Wrap it in a torch.utils.data.DataLoader.' if isinstance(loader, Dataset) else ''
        raise PruneError(f'a loader yields batches of (inputs, labels); a {type(loader).__name__} does not.{advice}')
    return loader


def _own_samples(loader: Any) -> int | None:
    '''Return the number of samples that a ``DistributedSampler`` gives this process before it repeats any.

    None for other samplers.
    '''
    for sampler in (getattr(loader, 'sampler', None), getattr(getattr(loader, 'batch_sampler', None), 'sampler', None)):
        if isinstance(sampler, DistributedSampler):
            size = len(sampler.dataset)  # type: ignore[arg-type]
            return min(sampler.num_samples, len(range(sampler.rank, size, sampler.num_replicas)))
    return None


def batch_size(inputs: Any) -> int:
    '''Return the number of samples in a batch: the length of its first tensor.'''
    return next((len(tensor) for tensor in tensors_in(inputs) if tensor.dim()), 1)


def only(batch: Any, size: int, samples: Any) -> Any:
    '''Select some samples of a batch of ``size`` samples by indexing every tensor of that length.'''
    def index(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or len(tensor) != size:
            return tensor
        return tensor[samples.to(tensor.device) if isinstance(samples, torch.Tensor) else samples]

    return map_tensors(index, batch)


def many_times(loader: Iterable[Any]) -> Iterable[Any]:
    '''Make a loader that can be read many times: tensors are shuffled each time, an iterator is held in memory.'''
    tensors = (loader,) if isinstance(loader, torch.Tensor) else loader
    if isinstance(tensors, tuple) and tensors and all(isinstance(part, torch.Tensor) for part in tensors):
        if len({len(part) for part in tensors}) > 1:
            raise PruneError(f'there are {len(tensors[0])} inputs and {len(tensors[1])} labels.')
        return DataLoader(TensorDataset(*tensors), BATCH, shuffle=True)
    return list(loader) if isinstance(loader, Iterator) else loader


def held_out(loader: Any, share: float) -> tuple[Iterable[Any], Iterable[Any]]:
    '''Split off a share of a loader: samples of a ``DataLoader``, whole batches of a list.

    Parameters
    ----------
    loader: torch.utils.data.DataLoader, list or tuple
        The data.
    share: float
        The share to hold out, between 0 and 1.

    Returns
    -------
    tuple of iterable
        The rest, and the share held out.

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

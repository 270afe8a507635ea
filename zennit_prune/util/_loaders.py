'''``Batch``: samples with their target, whose values are checked once; and batches from whatever yields them.

The file also makes loaders that can be read many times, and holds out a share of their samples.
'''
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from tqdm.auto import tqdm

from ..errors import PruneError
from ._arguments import Forward, arguments_for, plain
from ._networks import map_tensors, tensors_in
from ._samples import COLOURS, IMAGE, batch_size, by_samples, map_samples, only, selected
from ._yielded import Found, as_target, parts_of

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
    inputs: torch.Tensor, tuple, dict or list
        The arguments of a network, as :func:`zennit_prune.util._arguments.arguments_for` returns them: a list is a
        single argument, with an item for each sample.
    target: object, optional
        Labels, or anything else that :func:`zennit_prune.relevance.initial_relevance` takes.
    '''

    _size: int | None = None
    _finite: torch.Tensor | None = None
    _rest_is_finite: bool = True
    _labels: Any = None

    @classmethod
    def of(cls, value: Any, network: nn.Module | None = None) -> Batch:
        '''Return the batch that a loader yielded, see :func:`zennit_prune.util._yielded.parts_of`.

        Parameters
        ----------
        value: object
            Inputs with or without their target.
        network: torch.nn.Module, optional
            The network that the inputs are for: its parameters decide how the inputs are given to it, see
            :func:`zennit_prune.util._arguments.arguments_for`.

        Raises
        ------
        PruneError
            If it is no batch, or one that the network cannot take.
        '''
        if isinstance(value, Batch):
            return value
        forward = Forward.of(network)
        found = parts_of(value, forward)
        labels = _number_of_labels(found, forward)
        batch = cls(arguments_for(network, found.inputs, labels), found.target)
        batch._size = batch_size(batch.inputs, labels)
        return batch

    @property
    def size(self) -> int:
        '''The number of samples.'''
        if self._size is None:
            self._size = batch_size(self.inputs)
        return self._size

    @property
    def finite(self) -> torch.Tensor:
        '''The mask of the samples that hold finite values only, shape (size,), bool, on the CPU.'''
        if self._finite is None:
            size = self.size
            finite = torch.ones(size, dtype=torch.bool, device='cpu')

            def mark_rows(tensor: torch.Tensor) -> None:
                if _may_be_infinite(tensor):
                    finite.logical_and_(torch.isfinite(tensor).reshape(size, -1).all(1).cpu())

            def mark_items(items: list[Any]) -> None:
                finite.logical_and_(torch.tensor([all(map(_are_finite, tensors_in(item))) for item in items],
                                                 dtype=torch.bool, device='cpu'))

            rest = tensors_in(map_samples(self.inputs, size, mark_rows, mark_items))  # the same for all samples
            self._rest_is_finite = all(map(_are_finite, rest))
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
            tensor = next(tensor for tensor in tensors_in(self.inputs) if not _are_finite(tensor))
            raise PruneError(f'an input of shape {tuple(tensor.shape)} holds values that are not finite (NaN or '
                             'infinite): check the data.')

    def only(self, samples: torch.Tensor | slice) -> Batch:
        '''Select some of the samples, by a slice, by their numbers or by a mask of shape (size,).'''
        size = self.size
        inputs, target = only(self.inputs, size, samples), _only_targets(self.target, size, samples)
        at = samples.to('cpu') if isinstance(samples, torch.Tensor) else samples
        chosen = torch.ones(size, dtype=torch.bool, device='cpu') if self._finite is None else self._finite
        return self._derived(inputs, target, None if self._finite is None else chosen[at], len(chosen[at]))

    def to(self, device: torch.device) -> Batch:
        '''Return the batch on a device; itself if it is there.'''
        if all(tensor.device == device for tensor in tensors_in(tuple(self))):
            return self
        inputs, target = map_tensors(lambda tensor: tensor.to(device), tuple(self))
        return self._derived(inputs, target, self._finite, self._size)

    @property
    def labels(self) -> Any:
        '''The target that the batch was created with, where another took its place; of all its samples.'''
        return self.target if self._labels is None else self._labels

    def with_target(self, target: Any) -> Batch:
        '''Return the inputs with another target, or with None.'''
        if target is self.target:
            return self
        batch = self._derived(self.inputs, target, self._finite, self._size)
        batch._labels = None if target is None else self.labels
        return batch

    def zeroed(self) -> Batch:
        '''Return the batch with zeros in place of the samples that are not finite, so that it can run.'''
        broken = ~self.finite

        def zero(tensor: torch.Tensor) -> torch.Tensor:
            if not _may_be_infinite(tensor):
                return tensor
            return tensor.masked_fill(broken.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1)), 0)

        def zero_items(items: list[Any]) -> list[Any]:
            return [map_tensors(torch.zeros_like, item) if wrong else item
                    for item, wrong in zip(items, broken.tolist())]

        inputs = map_samples(self.inputs, self.size, zero, zero_items)
        return self._derived(inputs, self.target, torch.ones_like(broken), self._size)

    def joined(self, others: Sequence[Batch]) -> Batch:
        '''Concatenate the inputs of several batches, without targets; tensors without samples are those of this one.

        Shapes must agree but for the number of samples.
        '''
        inputs = map_samples(self.inputs, self.size, lambda *parts: torch.cat(parts),
                             lambda *parts: [item for items in parts for item in items],
                             *(other.inputs for other in others))
        finite = torch.cat([batch.finite for batch in (self, *others)])
        return self._derived(inputs, None, finite, len(finite))

    def _derived(self, inputs: Any, target: Any, finite: torch.Tensor | None, size: int | None) -> Batch:
        batch = Batch(inputs, target)
        batch._finite, batch._size, batch._rest_is_finite = finite, size, self._rest_is_finite
        batch._labels = self._labels
        return batch


def _only_targets(target: Any, size: int, samples: Any) -> Any:
    '''Select the targets of some samples: items of a list with one for each, or entries of the tensors in it.'''
    if isinstance(target, list) and len(target) == size and not all(by_samples(part, size) for part in target):
        return selected(target, samples)
    return only((target, None), size, samples)[0]


def _may_be_infinite(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _are_finite(tensor: torch.Tensor) -> bool:
    return not _may_be_infinite(tensor) or bool(torch.isfinite(tensor).all())


def _number_of_labels(found: Found, forward: Forward) -> int | None:
    '''Return the number of labels of a batch; without any, the length that the tensors in a list of inputs share.'''
    if isinstance(found.target, (list, torch.Tensor)):
        return len(found.target) if isinstance(found.target, list) or found.target.dim() else None
    parts = found.inputs if isinstance(found.inputs, list) else ()
    if not forward.any_number and len(parts) > len(forward.inputs):
        return None
    if all(isinstance(part, torch.Tensor) and part.dim() == IMAGE and len(part) in COLOURS for part in parts):
        return None
    lengths = {len(part) if isinstance(part, torch.Tensor) and part.dim() else -1 for part in parts}
    return lengths.pop() if len(lengths) == 1 and -1 not in lengths else None


def batches(loader: Iterable[Any], progress: str | None = None, network: nn.Module | None = None) -> Iterator[Batch]:
    '''Yield batches from whatever yields them.

    Samples that a ``DistributedSampler`` repeats to give every process as many are left out.

    Parameters
    ----------
    loader: iterable
        Yields batches of any form that :func:`zennit_prune.util._yielded.parts_of` takes; a pair of tensors or arrays
        is cut into batches of 32.
    progress: str, optional
        The label of a progress bar on standard error; None shows none.
    network: torch.nn.Module, optional
        The network that the inputs are for, see :meth:`Batch.of`.

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
        batch = Batch.of(value, network)
        if left is not None:
            size = batch.size
            if size > left:
                batch = batch.only(slice(left))
            left -= min(size, left)
            if not batch.size:
                return
        yield batch


def as_loader(loader: Iterable[Any]) -> Iterable[Any]:
    '''Cut a tensor or array, or a pair of them, into a list of batches of 32; pass on what yields batches.'''
    tensors = _whole(loader) if not isinstance(loader, tuple) or len(loader) == 2 else None
    if tensors is not None:
        cut = [tensor.split(BATCH) for tensor in tensors]
        return list(zip(*cut)) if len(cut) > 1 else list(cut[0])
    if not isinstance(loader, Iterable) or isinstance(loader, (str, Mapping)):
        advice = ' Wrap it in a torch.utils.data.DataLoader.' if isinstance(loader, Dataset) else \
            ' Put it into a list, if it is a batch.' if isinstance(loader, Mapping) else ''
        raise PruneError(f'a loader yields batches of (inputs, labels); a {type(loader).__name__} does not.{advice}')
    return loader


def _whole(loader: Any) -> tuple[torch.Tensor, ...] | None:
    '''Return the tensors of a whole data set: one, or a tuple of them (arrays, or labels in a list); else None.'''
    if isinstance(loader, (torch.Tensor, np.ndarray)):
        loader = (loader,)
    if not isinstance(loader, tuple) or not loader or not isinstance(loader[0], (torch.Tensor, np.ndarray)):
        return None
    tensors = [plain(loader[0]), *map(as_target, loader[1:])]
    if not all(isinstance(tensor, torch.Tensor) and tensor.dim() for tensor in tensors):
        return None
    if len({len(tensor) for tensor in tensors}) > 1:
        raise PruneError(f'there are {len(tensors[0])} inputs and {len(tensors[1])} labels.')
    return tuple(tensors)


def _own_samples(loader: Any) -> int | None:
    '''Return the number of samples that a ``DistributedSampler`` gives this process before it repeats any.

    None for other samplers.
    '''
    for sampler in (getattr(loader, 'sampler', None), getattr(getattr(loader, 'batch_sampler', None), 'sampler', None)):
        if isinstance(sampler, DistributedSampler):
            size = len(sampler.dataset)  # type: ignore[arg-type]
            return min(sampler.num_samples, len(range(sampler.rank, size, sampler.num_replicas)))
    return None


def many_times(loader: Iterable[Any]) -> Iterable[Any]:
    '''Make a loader that can be read many times: tensors are shuffled each time, an iterator is held in memory.'''
    tensors = _whole(loader)
    if tensors is not None:
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

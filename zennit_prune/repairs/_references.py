'''``References``: a loader that keeps inputs while they pass, so that it is read once for scores and repair.'''
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..errors import PruneError, warn
from ..relevance._initial import checked_classes, of_classes
from ..relevance._outputs import chosen_output
from ..util._arguments import call_network
from ..util._distributed import gathered, rank_and_world
from ..util._loaders import BATCH, Batch, as_loader, batches
from ..util._networks import ATOMIC, device_of, tensors_in
from ..util._samples import sample_list

KEPT = 1024  # samples
LEAST_CLASSES = 3  # outputs that tell classes apart; two may be anything


class References:
    '''A loader that keeps inputs while they pass: at most ``limit`` samples, a uniform random subset of more.

    Every pass begins anew. Memory does not grow with the number of samples. Samples whose inputs are not finite are
    passed on and not kept. Kept samples stay on the device that the loader has them on.

    Parameters
    ----------
    loader: iterable
        See :func:`zennit_prune.util._loaders.batches`.
    limit: int
        The number of samples to keep; 0 keeps none.
    classes: iterable of int, optional
        Keep samples with one of these labels only.
    seed: int
        The seed of the random subset.
    targets: bool
        Keep the targets as well.
    network: torch.nn.Module, optional
        The network that the inputs are for, see :meth:`zennit_prune.util._loaders.Batch.of`.

    Examples
    --------
    >>> import torch
    >>> references = References((torch.arange(80.0).view(40, 2), torch.arange(40) % 4), limit=5)
    >>> [inputs.shape for inputs, target in references]
    [torch.Size([32, 2]), torch.Size([8, 2])]
    >>> sum(batch.size for batch in references.chosen())
    5
    '''

    def __init__(self, loader: Iterable[Any], limit: int = KEPT, classes: Iterable[int] | None = None, seed: int = 0,
                 targets: bool = False, network: nn.Module | None = None):
        self.loader, self.classes, self.seed = as_loader(loader), checked_classes(classes), seed
        self.limit, self.targets, self.network = limit, targets, network
        self._chunks: list[tuple[torch.Tensor, Batch]] = []

    def __iter__(self) -> Iterator[Batch]:
        self._chunks = []
        generator = torch.Generator().manual_seed(self.seed)
        for batch in batches(self.loader, network=self.network):
            if self.limit and batch.size:
                keys = torch.rand(batch.size, generator=generator, dtype=torch.float64, device='cpu')
                keys = torch.where(self._eligible(batch), keys, -1)
                self._add(batch if self.targets else batch.with_target(None), keys)
            yield batch

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # generators have none, and raise TypeError as they should

    def _eligible(self, batch: Batch) -> torch.Tensor:
        '''Return which samples are of the wanted classes, and finite.'''
        wanted = of_classes(batch.target, self.classes)
        return batch.finite if wanted is None or len(wanted) != batch.size else batch.finite & wanted.cpu()

    def _add(self, batch: Batch, keys: torch.Tensor) -> None:
        '''Keep the samples with the ``limit`` largest keys so far, of those that are not negative.'''
        self._chunks.append((keys, batch))
        every = torch.cat([keys for keys, _ in self._chunks])
        least = every.topk(self.limit).values[-1].clamp(min=0) if len(every) > self.limit else every.new_zeros(())
        if (every < least).any():
            chosen = [(keys, batch, keys >= least) for keys, batch in self._chunks]
            self._chunks = [(keys, batch) if kept.all() else (keys[kept], batch.only(kept))
                            for keys, batch, kept in chosen if kept.any()]

    def forget(self) -> None:
        '''Drop what was kept, unless the loader is a generator, which cannot be read anew.'''
        if not isinstance(self.loader, Iterator):
            self._chunks = []

    def chosen(self) -> list[Batch]:
        '''Return the batches that the last pass of this process kept, in the loader's order; make a pass if needed.'''
        if not self._chunks:
            for _ in self:
                pass
        return [batch for _, batch in self._chunks]

    def inputs(self, device: torch.device) -> list[Batch]:
        '''Return batches of the inputs that the last pass kept, those of all processes under ``torch.distributed``.

        Parameters
        ----------
        device: torch.device
            Where this process computes, for talking to the others.

        Returns
        -------
        list of Batch
            Without targets.

        Raises
        ------
        PruneError
            If the loader is empty.
        '''
        chunks = [batch.with_target(None) for batch in self.chosen()]
        if rank_and_world()[1] > 1:
            parts = gathered([batch.to(torch.device('cpu')) for batch in chunks], device)
            chunks = [batch for part in parts for batch in part]
        if not chunks:
            raise PruneError('there is no reference to repair with: the loader is empty. Give inputs, or say '
                             "repair='none'.")
        return list(joined(chunks))


def joined(chunks: Iterable[Batch], size: int = BATCH) -> Iterator[Batch]:
    '''Concatenate small batches to batches of at least ``size`` samples, where shapes allow; targets are dropped.'''
    waiting: list[Batch] = []
    for chunk in chunks:
        if waiting and _shapes(waiting[0]) != _shapes(chunk):
            yield _concatenated(waiting)
            waiting = []
        waiting.append(chunk)
        if sum(batch.size for batch in waiting) >= size:
            yield _concatenated(waiting)
            waiting = []
    if waiting:
        yield _concatenated(waiting)


def _shapes(batch: Batch) -> list[Any]:
    '''Return what must be equal where batches are concatenated: shapes, and tensors without samples.'''
    if sample_list(batch.inputs) is not None:  # of any sizes
        return [type(batch.inputs)]
    return constants(batch.inputs) + [
        tensor.item() if not tensor.dim() else (tensor.shape[1:], tensor.dtype) if len(tensor) == batch.size
        else id(tensor) for tensor in tensors_in(batch.inputs)]


def constants(inputs: Any) -> list[Any]:
    '''Return what arguments hold beside tensors, flags say, for comparison.'''
    return [leaf if type(leaf) in ATOMIC else id(leaf) for leaf in tree_leaves(inputs)
            if not isinstance(leaf, torch.Tensor)]


def _concatenated(chunks: list[Batch]) -> Batch:
    return chunks[0].with_target(None) if len(chunks) == 1 else chunks[0].joined(chunks[1:])


def warn_of_missing_classes(network: nn.Module, references: Iterable[Batch]) -> None:
    '''Warn if a classifier in evaluation mode predicts few of its classes: a refit on these forgets the others.'''
    seen: set[int] = set()
    classes = 0
    device = device_of(network)
    with torch.no_grad():
        for batch in references:
            try:
                output = chosen_output(call_network(network, batch.to(device).inputs))
            except PruneError:  # several outputs, say
                return
            if output.dim() != 2 or output.shape[1] < LEAST_CLASSES:
                return
            classes = output.shape[1]
            seen |= set(output.argmax(1).tolist())
    if 2 * len(seen) < classes:
        warn(f'the references show {len(seen)} of the {classes} classes that the network tells apart: '
             'refitted on them, it forgets the others. Add references of all classes that matter, or repair '
             "with 'batchnorm' or 'none'.")

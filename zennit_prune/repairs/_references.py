'''``References``: inputs kept as they go by, so that a loader is read once for scores and for the repair.'''
from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..errors import PruneError, PruneWarning
from ..relevance._attribute import call_network, main_output
from ..relevance._initial import checked_classes, of_classes
from ..util._distributed import gathered, rank_and_world
from ..util._loaders import as_loader, batch_size, batches, only
from ..util._networks import copied, device_of, map_tensors, tensors_in

KEPT = 1024  # samples
BATCH = 32
LEAST = 3  # outputs that tell classes apart; two may be anything


class References:
    '''A loader that remembers inputs: all of up to ``limit`` samples, of more a uniform random choice.

    Every pass begins anew. Memory does not grow with the number of samples.

    Parameters
    ----------
    loader: iterable
        See :func:`zennit_prune.loaders.batches`.
    limit: int
        How many samples to keep; 0 keeps nothing.
    classes: iterable of int, optional
        Keep samples with one of these labels only.
    seed: int
        For the choice.
    '''

    def __init__(self, loader: Iterable[Any], limit: int = KEPT, classes: Iterable[int] | None = None, seed: int = 0):
        self.loader, self.classes, self.seed = as_loader(loader), checked_classes(classes), seed
        self.limit = limit
        self._chunks: list[tuple[torch.Tensor, Any]] = []

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        self._chunks = []
        generator = torch.Generator().manual_seed(self.seed)
        for inputs, target in batches(self.loader):
            if self.limit and batch_size(inputs):
                keys = torch.rand(batch_size(inputs), generator=generator, dtype=torch.float64, device='cpu')
                self._add(inputs, torch.where(self._counts(inputs, target), keys, -1))
            yield inputs, target

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # generators have none, and raise TypeError as they should

    def _counts(self, inputs: Any, target: Any) -> torch.Tensor:
        '''Which samples are of the wanted classes, and finite.'''
        size = batch_size(inputs)
        wanted = of_classes(target, self.classes)
        good = torch.ones(size, dtype=torch.bool, device='cpu')
        if wanted is not None and len(wanted) == size:
            good = wanted.cpu()
        for tensor in tensors_in(inputs):
            if tensor.is_floating_point() and tensor.dim() and len(tensor) == size:
                good = good & torch.isfinite(tensor).reshape(size, -1).all(1).cpu()
        return good

    def _add(self, inputs: Any, keys: torch.Tensor) -> None:
        '''Keep the samples with the ``limit`` largest keys so far, of those that are not negative.'''
        self._chunks.append((keys, inputs))
        every = torch.cat([keys for keys, _ in self._chunks])
        least = every.topk(self.limit).values[-1].clamp(min=0) if len(every) > self.limit else every.new_zeros(())
        if (every < least).any():
            chosen = [(keys, inputs, keys >= least) for keys, inputs in self._chunks]
            self._chunks = [(keys, inputs) if kept.all() else (keys[kept], only(inputs, len(keys), kept))
                            for keys, inputs, kept in chosen if kept.any()]

    def forget(self) -> None:
        '''What was kept; not that of a generator, which cannot be read anew.'''
        if not isinstance(self.loader, Iterator):
            self._chunks = []

    def chosen(self) -> list[Any]:
        '''What the last pass of this process kept, in the order of the loader; passes once if none was.'''
        if not self._chunks:
            for _ in self:
                pass
        return [inputs for _, inputs in self._chunks]

    def inputs(self, device: torch.device) -> list[tuple[Any, None]]:
        '''Batches of what the last pass kept, those of all processes under ``torch.distributed``.

        Raises
        ------
        PruneError
            If the loader is empty.
        '''
        chunks = self.chosen()
        if rank_and_world()[1] > 1:
            parts = gathered(map_tensors(lambda tensor: tensor.cpu(), chunks), device)
            chunks = [inputs for part in parts for inputs in part]
        if not chunks:
            raise PruneError('there is no reference to repair with: the loader is empty. Give inputs, or say '
                             "repair='none'.")
        return [(inputs, None) for inputs in joined(chunks)]


def joined(chunks: Iterable[Any], size: int = BATCH) -> Iterator[Any]:
    '''Chunks of samples in batches of at least ``size``, where their shapes allow.'''
    waiting: list[Any] = []
    for chunk in chunks:
        if waiting and _shapes(waiting[0]) != _shapes(chunk):
            yield _cat(waiting)
            waiting = []
        waiting.append(chunk)
        if sum(map(batch_size, waiting)) >= size:
            yield _cat(waiting)
            waiting = []
    if waiting:
        yield _cat(waiting)


def _shapes(inputs: Any) -> list[Any]:
    '''What has to agree if inputs are to be joined; what does not go by samples has to be the same.'''
    size = batch_size(inputs)
    return [tensor.item() if not tensor.dim() else (tensor.shape[1:], tensor.dtype) if len(tensor) == size
            else id(tensor) for tensor in tensors_in(inputs)]


def _cat(chunks: list[Any]) -> Any:
    if len(chunks) == 1:
        return chunks[0]
    return tree_map(lambda *parts: torch.cat(parts) if isinstance(parts[0], torch.Tensor) and parts[0].dim()
                    else parts[0], *chunks)


def warn_of_missing_classes(model: nn.Module, inputs: Iterable[tuple[Any, Any]], stacklevel: int) -> None:
    '''Warn if a classifier predicts few of its classes on the references: a refit on them forgets the others.'''
    network, seen, classes = copied(model).eval(), set(), 0
    device = device_of(network)
    with torch.no_grad():
        for batch, _ in inputs:
            output = main_output(call_network(network, map_tensors(lambda tensor: tensor.to(device), batch)))
            if output.dim() != 2 or output.shape[1] < LEAST:
                return
            classes = output.shape[1]
            seen |= set(output.argmax(1).tolist())
    if 2 * len(seen) < classes:
        warnings.warn(f'the references show {len(seen)} of the {classes} classes that the network tells apart: '
                      'refitted on them, it forgets the others. Add references of all classes that matter, or repair '
                      "with 'batchnorm' or 'none'.", PruneWarning, stacklevel=stacklevel)

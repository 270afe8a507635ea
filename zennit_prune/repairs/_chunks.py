'''The inputs of a repair: a bounded subset of what is given, in chunks that run at once, and in folds.'''
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from math import ceil, copysign
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..errors import PruneError
from ..util._loaders import Batch
from ..util._networks import map_tensors, tensors_in
from ..util._samples import map_samples
from ._references import KEPT, References, joined
from ._regression import FOLDS

CHUNK = 50  # inputs that run at once
LEAST_INPUTS = 16  # inputs, however large they are
HALVES = {torch.float16, torch.bfloat16}  # too coarse for least squares
SHIFT = 16  # pictures are moved by one of so many parts of their size


class Chunk(NamedTuple):
    '''Inputs that run at once, the fold of each, and whether they are variants of other inputs.'''

    inputs: Any
    folds: torch.Tensor
    varied: bool = False


class Inputs:
    '''The inputs that a network is repaired with: at most 1,024, a uniform subset of more; duplicates are dropped.

    Parameters
    ----------
    data: torch.Tensor, mapping or iterable
        Inputs, or a loader; labels are ignored.
    device: torch.device
        The device that chunks are copied to when they run.
    network: torch.nn.Module, optional
        The network that the inputs are for.
    leave_out: callable, optional
        From a batch to whether it is left out.

    Attributes
    ----------
    order: torch.Tensor
        The indices of the inputs, shuffled: loaders come in any order.
    left_out: int
        The number of inputs left out.

    Raises
    ------
    PruneError
        If there is none, or one is not finite.
    '''

    def __init__(self, data: Any, device: torch.device, network: nn.Module | None = None,
                 leave_out: Callable[[Batch], bool] = lambda batch: False):
        whole = isinstance(data, (Mapping, torch.Tensor, np.ndarray))
        references = References([data] if whole else data, KEPT, network=network)
        for batch in references:
            batch.check_finite()
        self.device = device
        chosen = [batch for batch in references.chosen() if not leave_out(batch)]
        self.left_out = sum(batch.size for batch in references.chosen()) - sum(batch.size for batch in chosen)
        self._batches = list(joined(chosen))
        self._starts = [0]
        for batch in self._batches:
            self._starts.append(self._starts[-1] + batch.size)
        if not self._starts[-1]:
            raise PruneError('there is no input to repair with: the data are empty' + (
                ', but for those of other examples than the first one of the trace.' if self.left_out else '.'))
        first: dict[tuple[int, ...], int] = {}
        for number, key in enumerate(self._keys()):
            first.setdefault(key, number)
        distinct = torch.tensor(list(first.values()), device='cpu')
        generator = torch.Generator().manual_seed(0)
        self.order = distinct[torch.randperm(len(distinct), generator=generator, device='cpu')]
        self._folds = torch.zeros(self._starts[-1], dtype=torch.int64, device='cpu')
        self._folds[self.order] = torch.arange(len(self.order), device='cpu') % FOLDS

    def _keys(self) -> Iterator[tuple[int, ...]]:
        '''Yield a key for each input; equal inputs have equal keys, and must not be in different folds.'''
        for batch, (start, end) in zip(self._batches, pairwise(self._starts)):
            rows = _contents(batch.inputs, end - start)
            for number in range(end - start):
                yield tuple(hash(bytes(row[number])) for row in rows)

    def __len__(self) -> int:
        return len(self.order)

    def limit(self, count: int) -> None:
        '''Keep a random subset of ``count`` inputs.'''
        self.order = self.order[:max(count, LEAST_INPUTS)]

    def chunks(self, chosen: torch.Tensor, varied: bool = False) -> list[Chunk]:
        '''Cut the chosen inputs into chunks; where ``varied``, every picture comes three times, in one fold.'''
        return list(self._chunks(chosen.sort().values, varied))

    def _chunks(self, chosen: torch.Tensor, varied: bool) -> Iterator[Chunk]:
        for batch, (start, end) in zip(self._batches, pairwise(self._starts)):
            inside = (start <= chosen) & (chosen < end)
            for where, folds in _parts(chosen[inside] - start, self._folds[chosen[inside]]):
                part = batch.only(where).to(self.device).inputs
                part = map_tensors(lambda tensor: wide(tensor.detach()), part)
                yield Chunk(part, folds)
                if varied and all(tensor.dim() == 4 for tensor in tensors_in(part)):
                    for variant in (_mirrored, _moved):
                        yield Chunk(map_tensors(variant, part), folds, True)


def _contents(inputs: Any, size: int) -> list[Any]:
    '''Return, for every part of the inputs that holds samples, the bytes of each of them.'''
    found: list[Any] = []
    map_samples(inputs, size, lambda tensor: found.append(_rows(tensor)),
                lambda items: found.append([b''.join(map(_content, tensors_in(item))) for item in items]))
    return found


def _rows(tensor: torch.Tensor) -> Any:
    '''Return the bytes of every sample in a tensor, as the rows of an array.'''
    return tensor.detach().cpu().reshape(len(tensor), -1).contiguous().view(torch.uint8).numpy()


def _content(tensor: torch.Tensor) -> bytes:
    '''Return the shape and the values of a tensor that belongs to a single sample.'''
    return str(tuple(tensor.shape)).encode() + bytes(_rows(tensor.reshape(1, -1)))


def _mirrored(pictures: torch.Tensor) -> torch.Tensor:
    '''Mirror pictures and move them down and to the right, to other positions in the strides of layers.'''
    return _shifted(pictures.flip(-1), 1, 1)


def _moved(pictures: torch.Tensor) -> torch.Tensor:
    '''Move pictures up, and to the right by half as much.'''
    return _shifted(pictures, -1, 0.5)


def _shifted(pictures: torch.Tensor, down: float, right: float) -> torch.Tensor:
    '''Move pictures by shares of ``1 / SHIFT`` of their size, at least a pixel; the edge is repeated.'''
    for dim, way in ((2, down), (3, right)):
        size = pictures.shape[dim]
        pixels = copysign(ceil(abs(way) * size / SHIFT), way)
        source = (torch.arange(size, device=pictures.device) - int(pixels)).clamp(0, size - 1)
        pictures = pictures.index_select(dim, source)
    return pictures


def _parts(*aligned: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    '''Cut tensors into equal parts of at most ``CHUNK``, as BatchNorm cannot be estimated from one leftover input.'''
    size = len(aligned[0])
    pieces = -(-size // CHUNK)
    for first, end in pairwise(size * piece // pieces for piece in range(pieces + 1)) if size else ():
        yield tuple(each[first:end] for each in aligned)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    '''Convert half precision to float32.'''
    return tensor.float() if tensor.dtype in HALVES else tensor

'''Samples within nested arguments: their number, a choice of them, and a function applied to each part that holds them.

A batch holds its samples along the first dimension of tensors, or as the items of a list: of dicts, one for each image,
or of images of different sizes. Arguments as :func:`zennit_prune.util._arguments.arguments_for` returns them are a
tensor, a tuple of positional arguments, a dict of keyword arguments, or a list of samples, which is the only argument.
'''
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

IMAGE = 3  # dimensions of a single image
COLOURS = (1, 3, 4)  # channels of a single image


def batch_size(inputs: Any, labels: int | None = None) -> int:
    '''Return the number of samples in a batch: the length of a list of samples, or of the first tensor.

    Parameters
    ----------
    inputs: torch.Tensor, tuple, dict or list
        The arguments of a network.
    labels: int, optional
        The number of labels, which tells a list of images from a list of tensors that hold several samples each.
    '''
    samples = sample_list(inputs)
    return len(samples) if samples is not None else next(_sizes(inputs, labels), 1)


def sample_list(inputs: Any) -> list[Any] | None:
    '''Return the samples where they are the items of a list that is the network's only argument, else None.'''
    if isinstance(inputs, tuple) and len(inputs) == 1:
        inputs = inputs[0]
    return inputs if isinstance(inputs, list) else None


def _sizes(value: Any, labels: int | None) -> Iterator[int]:
    '''Yield the number of samples that each part holds.'''
    if isinstance(value, torch.Tensor):
        if value.dim():
            yield len(value)
    elif isinstance(value, list) and _are_samples(value, labels):
        yield len(value)
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _sizes(part, labels)


def _are_samples(parts: list[Any], labels: int | None) -> bool:
    '''Return whether the items of a list among other arguments are samples, where the number of these is not known.'''
    if not parts or not all(isinstance(part, (dict, torch.Tensor)) for part in parts):
        return False
    if any(isinstance(part, dict) for part in parts):
        return True
    lengths = {len(part) if part.dim() else -1 for part in parts}
    return len(lengths) > 1 or (len(parts) == labels and labels not in lengths)


def by_samples(value: Any, size: int) -> bool:
    '''Return whether a tensor has one entry along its first dimension for each sample, or a list one item for each.'''
    if isinstance(value, torch.Tensor):
        return value.dim() > 0 and len(value) == size > 0
    if not isinstance(value, list) or len(value) != size or not size:
        return False
    tensors = [part for part in value if isinstance(part, torch.Tensor)]
    if len(tensors) < size:
        return bool(tensors) or any(isinstance(part, (dict, list, tuple)) for part in value)
    return not all(by_samples(part, size) for part in tensors) or (
        1 < size in COLOURS and all(part.dim() == IMAGE for part in tensors))


def map_samples(inputs: Any, size: int, of_tensor: Callable[[torch.Tensor], Any],
                of_list: Callable[..., Any], *others: Any) -> Any:
    '''Apply a function to every tensor that holds one entry for each sample, and another to every such list.

    Parameters
    ----------
    inputs: torch.Tensor, tuple, dict or list
        The arguments of a network.
    size: int
        The number of samples.
    of_tensor, of_list: callable
        Called with each such part, and with the parts of ``others`` at its place.
    *others: object
        Arguments of the same structure, of other samples.

    Returns
    -------
    object
        The arguments with what the functions returned; tensors without samples are as they were.
    '''
    if isinstance(inputs, list):
        return of_list(inputs, *others)
    if sample_list(inputs) is not None:
        return (of_list(inputs[0], *(other[0] for other in others)),)

    def mapped(part: Any, *parts: Any) -> Any:
        if not by_samples(part, size):
            return part
        return (of_list if isinstance(part, list) else of_tensor)(part, *parts)

    return tree_map(mapped, inputs, *others, is_leaf=lambda part: isinstance(part, list) and by_samples(part, size))


def only(inputs: Any, size: int, samples: Any) -> Any:
    '''Select some samples of the arguments of a network, by a slice, by their numbers or by a mask of shape (size,).'''
    def of_tensor(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[samples.to(tensor.device) if isinstance(samples, torch.Tensor) else samples]

    return map_samples(inputs, size, of_tensor, lambda parts: selected(parts, samples))


def selected(parts: Sequence[Any], samples: Any) -> list[Any]:
    '''Select items of a list, by a slice, by their numbers or by a mask.'''
    if not isinstance(samples, torch.Tensor):
        return list(parts[samples])
    numbers = samples.nonzero().flatten() if samples.dtype == torch.bool else samples
    return [parts[number] for number in numbers.tolist()]

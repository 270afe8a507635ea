'''Check the example that a network is traced with, and turn it into the arguments of a run.'''
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..errors import PruneError
from ..util._networks import map_tensors, tensors_in
from ._calls import Site

TRACED_BATCH = 2


@dataclass
class Example:
    '''The arguments that a network is traced with, and the settings of the trace.

    Attributes
    ----------
    args: tuple
        The positional arguments, as the user gave them.
    kwargs: dict
        The keyword arguments.
    given_batch: int
        The number of samples in the arguments.
    dtype: torch.dtype or None
        The type of the network's parameters.
    device: str
        ``'meta'`` for a run without data, ``'real'`` for one with values.
    resize: bool
        Whether the network is run on ``TRACED_BATCH`` samples, however many were given: a batch of one would hide
        mix-ups of batch and channels.
    layernorm: str
        Whether channels that LayerNorm runs over are locked, as in :func:`zennit_prune.trace`.
    whole: frozenset of Site
        The products of stacks of matrices that lose whole matrices instead of rows and columns.
    '''

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given_batch: int
    dtype: torch.dtype | None
    device: str = 'meta'
    resize: bool = True
    layernorm: str = 'lock'
    whole: frozenset[Site] = frozenset()

    def fitted(self, model: nn.Module) -> Example:
        '''Fit the example to a network that was moved or converted since, e.g. by ``model.half()``.'''
        like = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), None)
        if like is None:
            return self

        def fit(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(like.device, like.dtype if tensor.dtype == self.dtype else tensor.dtype)

        return replace(self, args=map_tensors(fit, self.args), kwargs=map_tensors(fit, self.kwargs))

    @property
    def batch(self) -> int:
        '''The number of samples that the network is traced with.'''
        return TRACED_BATCH if self.resize else self.given_batch

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return map_tensors(self._prepared, self.args), map_tensors(self._prepared, self.kwargs)

    def _prepared(self, tensor: torch.Tensor) -> torch.Tensor:
        resize = self.resize and tensor.dim() > 0 and tensor.shape[0] == self.given_batch
        if self.device != 'meta':
            tensor = tensor.detach().clone()
            return tensor[torch.arange(TRACED_BATCH, device=tensor.device) % self.given_batch] if resize else tensor
        shape = list(tensor.shape)
        if resize:
            shape[0] = TRACED_BATCH
        return torch.empty(shape, dtype=tensor.dtype, device='meta')


def _holds_packed(value: Any) -> bool:
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return True
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return any(map(_holds_packed, parts))


def prepare_example(model: nn.Module, example: Any) -> Example:
    '''Check an example: a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises
    ------
    PruneError
        If the example holds no tensor, no sample or a packed sequence, or is on another device than the network.
    '''
    if isinstance(example, Example):
        return replace(example)
    if _holds_packed(example):
        raise PruneError('the example holds a PackedSequence, whose sizes are values, so no other network could be '
                         'held against it: prune a module that takes padded tensors.')
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    args = example if isinstance(example, tuple) else () if isinstance(example, Mapping) else (example,)
    tensors = tensors_in((args, kwargs))
    if not tensors:
        kinds = ', '.join(dict.fromkeys(type(value).__name__ for value in (*args, *kwargs.values())))
        raise PruneError(f'the example holds no tensor that was found, only {kinds or "nothing"}: tensors are looked '
                         'for in tuples, lists and dicts. Give a tensor, a tuple of arguments or a dict of keyword '
                         'arguments, as the network is called with; where it takes other objects, wrap it in a module '
                         'that makes them of tensors.')
    if any(tensor.dim() and not tensor.shape[0] for tensor in tensors):
        raise PruneError('the example holds no sample: its batch has size 0.')
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    for tensor in tensors:
        if devices and tensor.device not in devices and tensor.device.type != 'meta':
            raise PruneError(f'the example is on {tensor.device} and the network on '
                             f'{", ".join(sorted(map(str, devices)))}: move one of them, e.g. '
                             'example.to(next(model.parameters()).device).')
    dtype = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)
    return Example(args, kwargs, tensors[0].shape[0] if tensors[0].dim() else 1, dtype)

'''A call of a linear layer as a regression: features, outputs, and the response to other weights.'''
from __future__ import annotations

from collections.abc import Sequence
from itertools import product, repeat
from typing import Any

import torch
from torch.nn import functional as F


class LayerCall:
    '''One call of ``F.linear`` or ``F.conv1d``, ``F.conv2d``, ``F.conv3d``.

    Parameters
    ----------
    function: str
        Its name.
    args, kwargs, result:
        What it was given and what it returned.
    batch: int
        The number of inputs.

    Attributes
    ----------
    weight, bias: torch.Tensor
        Those that it was given; the bias may be None.
    groups: int
        The groups of a convolution.
    shape: torch.Size
        That of what it returned.
    '''

    def __init__(self, function: str, args: Sequence[Any], kwargs: dict[str, Any], result: torch.Tensor, batch: int):
        self.function, self.shape, self.batch = function, result.shape, batch
        names = ('input', 'weight', 'bias', 'stride', 'padding', 'dilation', 'groups')
        given = {**dict(zip(names, args)), **kwargs}
        self.input, self.weight, self.bias = given['input'], given['weight'], given.get('bias')
        self.options = {name: given[name] for name in names[3:] if name in given}
        self.groups = int(self.options.get('groups', 1))
        self._version = self.input._version

    @property
    def intact(self) -> bool:
        '''Whether nothing wrote into the input since.'''
        return self.input._version == self._version

    @property
    def channel_dim(self) -> int:
        '''Where the output channels are.'''
        return len(self.shape) - 1 if self.function == 'linear' else 1

    def response(self, weight: torch.Tensor) -> torch.Tensor:
        '''The output for another weight, without bias.'''
        return getattr(F, self.function)(self.input, weight, None, **self.options)

    def features(self, channels: slice, thinned: Sequence[slice] = ()) -> torch.Tensor:
        '''What is multiplied with the weights of some input channels of each group, shape (inputs, groups, features,
        positions); ``thinned`` says which positions, by direction of space.
        '''
        if self.function == 'linear':
            return self._by_input(self.input[..., channels])
        x = self.input.unflatten(1, (self.groups, -1))[:, :, channels]
        rank = x.dim() - 3
        stride, dilation = (self._numbers(name, rank) for name in ('stride', 'dilation'))
        kernel, sizes = self.weight.shape[2:], self.shape[2:]
        x = F.pad(x.flatten(1, 2), self._padding(kernel, dilation)).unflatten(1, x.shape[1:3])
        chosen = [range(size)[where] for size, where in zip(sizes, thinned or repeat(slice(None)))]
        shifted = [x[(..., *(slice(offset * apart + at.start * step, offset * apart + at[-1] * step + 1, at.step * step)
                             for offset, apart, at, step in zip(offsets, dilation, chosen, stride)))]
                   for offsets in product(*map(range, kernel))]
        return torch.stack(shifted, 3).flatten(4).flatten(2, 3)

    def outputs(self, tensor: torch.Tensor, groups: int, thinned: Sequence[slice] = ()) -> torch.Tensor:
        '''A tensor shaped as the output, as (inputs, groups, outputs, positions).'''
        if self.function == 'linear':
            return self._by_input(tensor)
        return tensor[(slice(None), slice(None), *thinned)].flatten(2).unflatten(1, (groups, -1))

    def _by_input(self, tensor: torch.Tensor) -> torch.Tensor:
        '''(..., features) as (inputs, 1, features, positions); inputs may come second, or several times in a row.'''
        if tensor.dim() > 2 and tensor.shape[0] % self.batch and tensor.shape[1] == self.batch:
            tensor = tensor.transpose(0, 1)
        return tensor.reshape(len(tensor), -1, tensor.shape[-1]).mT.unsqueeze(1)

    def _numbers(self, name: str, rank: int, default: int = 1) -> tuple[int, ...]:
        value = self.options.get(name, default)
        value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        return value * rank if len(value) == 1 else value

    def _padding(self, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
        padding = self.options.get('padding', 0)
        if padding == 'same':
            whole = [apart * (size - 1) for apart, size in zip(dilation, kernel)]
            sides = [(total // 2, total - total // 2) for total in whole]
        elif padding == 'valid':
            sides = [(0, 0)] * len(kernel)
        else:
            sides = [(size, size) for size in self._numbers('padding', len(kernel), 0)]
        return [size for pair in reversed(sides) for size in pair]

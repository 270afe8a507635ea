'''Merge a BatchNorm into the linear layer before or behind it, for as long as relevance is attributed.'''
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from zennit.canonizers import Canonizer
from zennit.types import BatchNorm, ConvolutionTranspose, Linear

from .recorded import Operation

PLAIN_FORWARDS = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d,
                                           nn.ConvTranspose2d, nn.ConvTranspose3d)}
LINEAR = {'convolution', 'addmm', 'mm'}


class Pair(NamedTuple):
    '''A linear layer and the BatchNorm that alone reads it, or, where ``before``, that it alone reads; by name.'''

    linear: str
    batch_norm: str
    before: bool = False


def pairs(operations: Sequence[Operation], calls: Mapping[str, int]) -> list[Pair]:
    '''All pairs in a trace; ``calls`` says how often each module was called. A BatchNorm behind comes first.'''
    readers = Counter(value for operation in operations for value in operation.reads)
    writer = {value: operation for operation in operations for value in operation.writes[:1]}
    found: list[Pair] = []
    for before in (False, True):
        taken = {name for pair in found for name in (pair.linear, pair.batch_norm)}
        for operation in operations:
            for value in operation.reads:
                source = writer.get(value)
                if source is None or readers[value] != 1:
                    continue
                linear, batch_norm = (operation, source) if before else (source, operation)
                if linear.name not in LINEAR or 'batch_norm' not in batch_norm.name:
                    continue
                names = linear.site.module, batch_norm.site.module
                if all(calls.get(name) == 1 for name in names) and (not before or names[1] not in taken):
                    found.append(Pair(*names, before))
    return found


def computes_plainly(linear: Any) -> bool:
    '''Whether a layer of torch's own uses its weight parameter as it is.'''
    return linear._parameters.get('weight') is not None and type(linear).forward in PLAIN_FORWARDS


def mergeable(linear: Any, batch_norm: Any, before: bool) -> bool:
    '''Whether merging is exact, and not done yet.'''
    if not isinstance(linear, Linear) or not isinstance(batch_norm, BatchNorm) or batch_norm.running_mean is None:
        return False
    transposed = isinstance(linear, ConvolutionTranspose)
    exact = not (transposed and linear.groups > 1)
    if before:  # the shift of a BatchNorm does not reach the border that a convolution pads with zeros
        padding = getattr(linear, 'padding', 'valid')
        exact = not transposed and (padding == 'valid' or set(padding) == {0})
    return exact and computes_plainly(linear) and not _is_identity(batch_norm)


def _is_identity(batch_norm: Any) -> bool:
    '''Whether another canonizer has merged this BatchNorm already.'''
    ones, zeros = (batch_norm.running_var, batch_norm.weight), (batch_norm.running_mean, batch_norm.bias)
    return all(value is not None and bool((value == number).all())
               for values, number in ((ones, 1), (zeros, 0)) for value in values)


class MergedBatchNorm(Canonizer):
    '''Fold a BatchNorm into a linear layer and make it the identity, until it is removed.'''

    def apply(self, root_module: nn.Module) -> list[Canonizer]:
        raise NotImplementedError('made by GraphCanonizer')

    def register(self, linear: Any, batch_norm: Any, before: bool = False) -> None:
        self._saved = [(module, dict(module._parameters), dict(module._buffers)) for module in (linear, batch_norm)]
        self._eps = batch_norm, batch_norm.eps
        mean, variance = batch_norm.running_mean, batch_norm.running_var
        with torch.no_grad():
            scale = (variance + batch_norm.eps).rsqrt()
            if batch_norm.weight is not None:
                scale = scale * batch_norm.weight
            shift = (0 if batch_norm.bias is None else batch_norm.bias) - mean * scale
            merge = _merged_before if before else _merged_behind
            _replace(linear, merge(linear, scale, shift))
            _replace(batch_norm, {'weight': torch.ones_like(mean), 'bias': torch.zeros_like(mean),
                                  'running_mean': torch.zeros_like(mean), 'running_var': torch.ones_like(variance)})
        batch_norm.eps = 0.0

    def remove(self) -> None:
        for module, parameters, buffers in self._saved:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        batch_norm, eps = self._eps
        batch_norm.eps = eps


def _merged_behind(linear: Any, scale: torch.Tensor, shift: torch.Tensor) -> dict[str, torch.Tensor]:
    shape = [1] * linear.weight.dim()
    shape[1 if isinstance(linear, ConvolutionTranspose) else 0] = -1
    bias = 0 if linear.bias is None else linear.bias
    return {'weight': linear.weight * scale.reshape(shape), 'bias': bias * scale + shift}


def _merged_before(linear: Any, scale: torch.Tensor, shift: torch.Tensor) -> dict[str, torch.Tensor]:
    outputs, inputs, *kernel = linear.weight.shape
    groups = getattr(linear, 'groups', 1)
    weight = linear.weight.reshape(groups, outputs // groups, inputs, *kernel)
    factors, shifts = (values.reshape(groups, 1, inputs, *[1] * len(kernel)) for values in (scale, shift))
    bias = (weight * shifts).flatten(2).sum(2).flatten() + (0 if linear.bias is None else linear.bias)
    return {'weight': (weight * factors).reshape(linear.weight.shape), 'bias': bias}


def _replace(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    '''Swap tensors by name, parameters for new parameters, so that the old objects stay as they are.'''
    for name, value in values.items():
        if name in module._buffers:
            module._buffers[name] = value
        else:
            module._parameters[name] = nn.Parameter(value, requires_grad=False)

'''The targets of a repair: for each layer, the value that its output becomes before anything nonlinear reads it.

This is the output of its BatchNorm, or, where that is added to something else, the sum: a branch then compensates for
the error of the shortcut, too. A call of a linear layer is presented as a regression, with features, outputs, and the
response to other weights.
'''
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product, repeat
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from zennit.types import BatchNorm

from ..tracing._calls import Site
from ..tracing._labels import Field
from ..tracing._recorded import FunctionCall
from ..tracing._trace import Run

LAYERS = {'linear', 'conv1d', 'conv2d', 'conv3d'}


class LayerCall:
    '''One call of ``F.linear`` or ``F.conv1d``, ``F.conv2d``, ``F.conv3d``.

    Parameters
    ----------
    function: str
        Its name.
    args, kwargs, result:
        The arguments and the returned tensor.
    batch: int
        The number of inputs.

    Attributes
    ----------
    weight, bias: torch.Tensor
        The weight and the bias among the arguments; the bias may be None.
    groups: int
        The groups of a convolution.
    shape: torch.Size
        The shape of the returned tensor.
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
        '''Whether the input was not written into since the call.'''
        return self.input._version == self._version

    @property
    def channel_dim(self) -> int:
        '''The dimension of the output channels.'''
        return len(self.shape) - 1 if self.function == 'linear' else 1

    def response(self, weight: torch.Tensor) -> torch.Tensor:
        '''Return the output for another weight, without bias.'''
        return getattr(F, self.function)(self.input, weight, None, **self.options)

    def features(self, channels: slice, thinned: Sequence[slice] = ()) -> torch.Tensor:
        '''Return the values that the weights of some input channels of each group are multiplied with.

        Their shape is (inputs, groups, features, positions); ``thinned`` selects positions, by direction of space.
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
        '''Reshape a tensor of the output's shape to (inputs, groups, outputs, positions).'''
        if self.function == 'linear':
            return self._by_input(tensor)
        return tensor[(slice(None), slice(None), *thinned)].flatten(2).unflatten(1, (groups, -1))

    def _by_input(self, tensor: torch.Tensor) -> torch.Tensor:
        '''Reshape (..., features) to (inputs, 1, features, positions); inputs may come second, or be repeated.'''
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


@dataclass
class Repairable:
    '''A layer whose output, after the BatchNorm of this name if there is one, is part of a target.'''

    site: Site
    batch_norm: str | None = None


@dataclass
class Target:
    '''A value, named by the call that computes it, with its label fields and the layers that it is linear in.'''

    site: Site
    fields: list[Field]
    layers: list[Repairable] = field(default_factory=list)


def find_targets(run: Run, model: nn.Module) -> list[Target]:
    '''Return the targets in the order of the forward pass; layers whose parameters are used twice have none.'''
    modules = dict(model.named_modules())
    reads = Counter(value for operation in run.operations for value in operation.reads)
    readers: defaultdict[int, list[FunctionCall]] = defaultdict(list)
    for call in run.functions:
        for argument in call.arguments:
            if argument.active and call.results and argument.value not in call.results:
                readers[argument.value].append(call)

    def outside(value: int, call: FunctionCall) -> int:
        '''Return how often a value is read by other calls.'''
        return reads[value] - sum(operation.reads.count(value) for operation in call.operations)

    def alone(call: FunctionCall) -> bool:
        return not any(outside(argument.value, call) for argument in call.arguments if not argument.active)

    found: dict[Site, Target] = {}
    for call in run.functions:
        if not _is_layer(call) or not alone(call):
            continue
        layer, last = Repairable(call.site), call
        while outside(last.results[0], last) == 1 and len(readers[last.results[0]]) == 1:
            reader = readers[last.results[0]][0]
            if last is call and _normalizes(reader, call, modules) and alone(reader):
                layer.batch_norm, last = reader.site.module, reader
                continue
            if _adds(reader) and not _overwrites(reader, call.arguments[0].value):
                last = reader
            break
        fields = next(iter(last.operations[-1].outputs), [])
        found.setdefault(last.site, Target(last.site, fields)).layers.append(layer)
    order = {call.site: number for number, call in enumerate(run.functions)}
    return sorted(found.values(), key=lambda target: order[target.site])


def _is_layer(call: FunctionCall) -> bool:
    if call.site.function not in LAYERS or call.active != [0] or len(call.arguments) < 2:
        return False
    return call.site.function == 'linear' or len(call.arguments[0].shape) == len(call.arguments[1].shape)


def _normalizes(call: FunctionCall, layer: FunctionCall, modules: dict[str, nn.Module]) -> bool:
    '''Return whether a call is a BatchNorm with statistics, over the channels that the layer produces.'''
    return (call.site.function == 'batch_norm' and call.active == [0] and _has_statistics(modules.get(call.site.module))
            and (layer.site.function != 'linear' or len(call.arguments[0].shape) == 2))


def _has_statistics(module: nn.Module | None) -> bool:
    return isinstance(module, BatchNorm) and module.running_mean is not None  # type: ignore[union-attr]


def _adds(call: FunctionCall) -> bool:
    operations = [operation for operation in call.operations if any(operation.active)]
    shapes = {argument.shape for argument in call.arguments}
    return (len(call.active) == 2 and len(shapes) == 1 and len(operations) == 1 and operations[0].name == 'add'
            and not operations[0].scalars)


def _overwrites(call: FunctionCall, value: int) -> bool:
    return call.in_place is not None and call.arguments[call.in_place].value == value

'''Find out why relevance is not finite: which parameter, buffer or layer the first NaN or infinity comes from.

Nothing here runs unless a result was not finite already.
'''
from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..errors import PruneError
from ..tracing._calls import CallCounter
from ..util._arguments import call_network
from ..util._isolation import exact_pass, isolated
from ..util._loaders import Batch
from ..util._networks import copied, device_of, map_tensors, modules_by_name, tensors_in

DIVIDING = ('div', 'reciprocal', 'rsqrt', 'log', 'sqrt', 'pow')  # functions that are infinite or NaN at zero
FILLING = {'full', 'full_like', 'new_full', 'fill', 'masked_fill', 'where', 'scatter', 'index_fill', 'setitem'}


def without_nan(output: torch.Tensor) -> torch.Tensor:
    '''Return which samples of an output hold neither NaN nor infinity; minus infinity is usual for excluded classes.'''
    wrong = output.detach().isnan() | output.detach().isposinf()
    return ~(wrong.flatten(1).any(1) if output.dim() > 1 else wrong.reshape(-1))


def why_not_finite(model: nn.Module, inputs: Any) -> str:
    '''Return in words why a network does not compute finite numbers, or an empty text where its outputs are finite.

    Parameters
    ----------
    model: torch.nn.Module
        The network; it is left as it is.
    inputs: torch.Tensor, tuple or dict
        Finite inputs.
    '''
    return broken_tensor(model) or overflow(model, inputs)


def broken_tensor(model: nn.Module) -> str:
    '''Return in words which parameter or buffer is the first that holds NaN, infinity or a negative variance.

    Buffers may hold infinities, as masks of attention do, unless they are statistics of a norm.
    '''
    for prefix, module in modules_by_name(model):
        named = [*module._parameters.items(), *module._buffers.items()]
        for key, tensor in named:
            if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            name = f'{prefix}.{key}' if prefix else key
            may_be_infinite = key in module._buffers and not key.startswith('running_')
            wrong = tensor.isnan() if may_be_infinite else ~tensor.isfinite()
            if wrong.any():
                return f'{name!r} holds {_counted(tensor, wrong)}: restore it, e.g. from an earlier checkpoint'
            if key == 'running_var' and (tensor + getattr(module, 'eps', 0.0) < 0).any():
                return (f'{name!r} holds {_counted(tensor, tensor < 0)}: a variance is never negative, and its square '
                        'root is NaN. Restore it, or estimate it anew in training mode')
    return ''


def _counted(tensor: torch.Tensor, wrong: torch.Tensor) -> str:
    index = wrong.nonzero()[0].tolist()
    value = tensor[tuple(index)].item()
    many = int(wrong.sum())
    others = f' and {many - 1:,} more such value{"s" if many > 2 else ""}' if many > 1 else ''
    return f'{value:.4g}{f" at {index}" if index else ""}{others}'


def overflow(model: nn.Module, inputs: Any) -> str:
    '''Return in words which layer is the first whose output is not finite though its inputs are.'''
    network = copied(model).eval()
    device = device_of(network)
    inputs = inputs.inputs if isinstance(inputs, Batch) else inputs
    inputs = map_tensors(lambda tensor: tensor.detach().to(device, copy=True), inputs)
    finder = _Finder(network)
    with torch.no_grad(), exact_pass(), isolated(network), finder, suppress(PruneError):  # it may branch on values
        call_network(network, inputs)
    return finder.buffer or finder.found or finder.infinite


class _Finder(CallCounter):
    '''While a network runs, note the first call whose result is not finite though its arguments are.

    Attributes
    ----------
    found: str
        The first call that returned NaN or infinity, in words.
    infinite: str
        The first call that returned minus infinity, which is usual before a softmax.
    buffer: str
        The first infinite buffer that makes NaN or infinity of finite numbers, in words.
    '''

    def __init__(self, network: nn.Module):
        super().__init__(network)
        self.found = self.infinite = self.buffer = ''
        self._buffers = {id(tensor): name for name, tensor in network.named_buffers()}
        self._largest: list[list[float]] = []

    def intercept(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        if self.found:
            return func(*args, **kwargs)
        largest = _magnitudes((args, kwargs))  # before the call, which may write into them
        function, module = self.function.strip('_'), self.site.module
        result = func(*args, **kwargs)
        self._note_buffer((args, kwargs), result)
        if function not in FILLING:
            of_torch = module and self.kind in vars(nn)
            self._note(repr(module) if of_torch else _named(function, module), largest, result)
        return result

    def entered(self, frame: Any, inputs: Any) -> None:
        self._largest.append(_magnitudes(inputs))

    def left(self, frame: Any, output: Any) -> None:
        self._note(repr(frame.module) if frame.module else 'the network itself', self._largest.pop(), output)

    def _note_buffer(self, arguments: Any, result: Any) -> None:
        '''Note an infinite buffer among the arguments of a call that returned NaN or infinity.'''
        for tensor in tensors_in(arguments):
            name = self._buffers.get(id(tensor))
            if name and tensor.is_floating_point() and not tensor.isfinite().all() and not self.buffer and any(
                    not without_nan(other).all() for other in tensors_in(result) if other.is_floating_point()):
                self.buffer = f'{name!r} holds {_counted(tensor, ~tensor.isfinite())}, which the network computes with'

    def _note(self, where: str, largest: list[float], result: Any) -> None:
        if self.found:
            return
        if not all(map(math.isfinite, largest)):
            return
        for tensor in tensors_in(result):
            if tensor.is_floating_point() and not tensor.isfinite().all():
                only_below = not (tensor.isnan() | tensor.isposinf()).any()
                if not (only_below and self.infinite):
                    text = _described(where, largest, tensor)
                    self.found, self.infinite = ('', text) if only_below else (text, self.infinite)
                return


def _magnitudes(values: Any) -> list[float]:
    '''Return the largest absolute value of every floating-point tensor.'''
    return [float(tensor.abs().max()) for tensor in tensors_in(values)
            if tensor.is_floating_point() and tensor.numel()]


def _named(function: str, module: str) -> str:
    return f'{function} in {module!r}' if module else f'{function} in the network itself'


def _described(where: str, largest: list[float], result: torch.Tensor) -> str:
    kind = str(result.dtype).removeprefix('torch.')
    came = f'numbers of up to {largest[0]:.3g} come in' if largest else 'no numbers come in'
    divides = any(name in where for name in DIVIDING)
    if (result.isinf().any() and not divides) or math.prod(largest) > torch.finfo(result.dtype).max:
        wider = 'float64 with .double()' if result.dtype in (torch.float32, torch.float64) else 'float32 with .float()'
        return (f'overflow in {where}: {came}, and what comes out is not finite in {kind}. Scale the weights, or '
                f'convert the network and its inputs to {wider}')
    return f'NaN in {where}: {came}, and what comes out is not finite, e.g. after a division by zero'

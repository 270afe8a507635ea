'''Run the call of a torch function through modules, so that a composite's rules apply to it.

Zennit chooses a rule by the type of a module. The modules made here have a type (``nn.ReLU``, ``zennit.layer.Sum``) and
compute whatever function they are given; ``functions.py`` says which call becomes what.
'''
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from typing import Any, ClassVar

import torch
from torch import nn
from zennit.layer import Sum
from zennit.types import Linear

from .networks import map_tensors, tensors_in

Function = Callable[..., torch.Tensor]
Exchange = Callable[[dict[int, torch.Tensor]], torch.Tensor]


class Functional(nn.Module):
    '''A module of some type, without parameters, that computes the function it is given.'''

    track_running_stats = False  # BatchNorm looks for it when parameters are exchanged
    function: Function

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = self.function(input)
        return output.view_as(output)  # rules expect a node of one output, and layer_norm's has three

    def extra_repr(self) -> str:
        return ''


class FunctionalLayer(Functional):
    '''The same with a weight and a bias, which rules modify.'''

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.function(input, self.weight, self.bias)


@lru_cache(None)
def functional(kind: Any) -> type[Any]:
    '''The class of modules that a composite takes for a ``kind``.'''
    layer = issubclass(kind, Linear.__subclass__)

    def initialize(self: nn.Module) -> None:
        nn.Module.__init__(self)
        if layer:
            self.register_parameter('weight', None)
            self.register_parameter('bias', None)

    bases = (FunctionalLayer if layer else Functional, kind)
    return type(f'Functional{kind.__name__}', bases, {'__init__': initialize, '__module__': __name__})


@dataclass(frozen=True)
class Equivalent:
    '''How a call of a function becomes calls of modules.

    Attributes
    ----------
    kinds: tuple of type
        The class of each module.
    signals: tuple of int
        To which of the tensors that the function is given relevance flows; the others are held constant.
    in_place: int or None
        The tensor that the function writes into.
    takes: bool
        Whether rules take relevance by design, as for a bias or for the constant term of a softmax.
    '''

    kinds: tuple[type[nn.Module], ...]
    signals: tuple[int, ...]
    in_place: int | None = None
    takes: ClassVar[bool] = False

    def modules(self) -> list[Any]:
        '''New modules, one of each kind.'''
        return [functional(kind)() for kind in self.kinds]  # type: ignore[arg-type]

    def __call__(self, modules: Sequence[Any], func: Function, args: Any, kwargs: Any) -> torch.Tensor:
        '''Do with the modules what the function does.'''
        def exchange(tensors: dict[int, torch.Tensor]) -> torch.Tensor:
            position = count()

            def exchanged(tensor: torch.Tensor) -> torch.Tensor:
                number = next(position)
                tensor = tensors[number] if number in tensors else tensor.detach()
                return tensor.clone() if number == self.in_place else tensor

            new_args, new_kwargs = map_tensors(exchanged, (args, kwargs))
            return func(*new_args, **new_kwargs)

        tensors = tensors_in((args, kwargs))
        result = self.run(modules, tensors, exchange)
        return result if self.in_place is None else tensors[self.in_place].copy_(result)

    def run(self, modules: Sequence[Any], tensors: list[torch.Tensor], call: Exchange) -> torch.Tensor:
        '''Each module computes the function of one signal; those that are no constants share relevance equally.

        Parameters
        ----------
        modules: sequence of torch.nn.Module
            Those of :meth:`modules`.
        tensors: list of torch.Tensor
            What the function was given.
        call: callable
            Calls the function with other tensors at some positions, and constants elsewhere.
        '''
        signals = list(zip(modules, self.signals))
        results = []
        for module, signal in [pair for pair in signals if tensors[pair[1]].requires_grad] or signals[:1]:
            module.function = lambda x, signal=signal: call({signal: x})
            results.append(module(tensors[signal]))
        return results[0] if len(results) == 1 else torch.stack(results).mean(0)


class Broadcast(Equivalent):
    '''Signals are given the shape of the result before, so that a rule can pass relevance on as it is.'''

    def run(self, modules: Sequence[Any], tensors: list[torch.Tensor], call: Exchange) -> torch.Tensor:
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
        return super().run(modules, [tensor.expand(shape) for tensor in tensors], call)


class Softmax(Equivalent):
    '''Of scores that may be masked with minus infinity, which times a relevance of zero would not be a number.'''

    takes = True

    def run(self, modules: Sequence[Any], tensors: list[torch.Tensor], call: Exchange) -> torch.Tensor:
        finite = [tensor.clamp(min=torch.finfo(tensor.dtype).min) for tensor in tensors]
        return super().run(modules, finite, call)


class Addition(Equivalent):
    '''The operands are stacked and summed, as in Zennit's own canonizers.'''

    def run(self, modules: Sequence[Any], tensors: list[torch.Tensor], call: Exchange) -> torch.Tensor:
        modules[0].function = partial(torch.sum, dim=-1)
        return modules[0](torch.stack(torch.broadcast_tensors(*tensors)).movedim(0, -1))  # in memory, the first: faster


class Shift(Addition):
    '''An addition of a constant that takes its share.'''

    takes = True


class Difference(Addition):
    '''An addition of what each operand contributes, with its sign and factor.'''

    def run(self, modules: Sequence[Any], tensors: list[torch.Tensor], call: Exchange) -> torch.Tensor:
        operands = dict(zip(self.signals, torch.broadcast_tensors(*(tensors[signal] for signal in self.signals))))
        nothing = {signal: torch.zeros_like(operand) for signal, operand in operands.items()}
        contributions = [Carried.apply(operand, call({**nothing, signal: operand}))
                         for signal, operand in operands.items()]
        return super().run(modules, contributions, call)


class Carried(torch.autograd.Function):
    '''The values of one tensor with the relevance of another.'''

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, relevance: torch.Tensor) -> Any:
        return relevance, None


@dataclass(frozen=True)
class Layer(Equivalent):
    '''A linear layer; ``weights`` says which tensors are its weight and its bias.'''

    takes = True
    weights: tuple[int, ...] = ()

    def run(self, modules: Sequence[Any], tensors: list[torch.Tensor], call: Exchange) -> torch.Tensor:
        module, (signal,) = modules[0], self.signals
        for name, position in zip(('weight', 'bias'), self.weights):
            setattr(module, name, nn.Parameter(tensors[position].detach(), requires_grad=False))

        def compute(x: torch.Tensor, *weights: torch.Tensor | None) -> torch.Tensor:
            given = {position: weight for position, weight in zip(self.weights, weights) if weight is not None}
            return call({signal: x, **given})

        module.function = compute
        return module(tensors[signal])


class Attention(Equivalent):
    '''``scaled_dot_product_attention`` in evaluation mode, in its parts: product, softmax, product.'''

    takes = True

    def __call__(self, modules: Sequence[Any], func: Function, args: Any, kwargs: Any) -> torch.Tensor:
        return self._attend(modules, *args, **kwargs)

    def _attend(self, modules: Sequence[Any], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
                scale: float | None = None, enable_gqa: bool = False) -> torch.Tensor:
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        if is_causal:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        mask = 0 if attn_mask is None else attn_mask.detach()
        scale = query.shape[-1] ** -0.5 if scale is None else scale

        product = Equivalent((Sum, Sum), (0, 1))
        scores = product(modules[:2], lambda q, k: q @ k.transpose(-2, -1) * scale, (query, key), {})
        modules[2].function = lambda x: (x + mask).softmax(-1)
        return product(modules[3:], torch.matmul, (modules[2](scores), value), {})


class Gated(Equivalent):
    '''``glu``: one half of a tensor is the gate of the other.'''

    def __call__(self, modules: Sequence[Any], func: Function, args: Any, kwargs: Any) -> torch.Tensor:
        return self._gate(modules[0], *args, **kwargs)

    def _gate(self, module: Any, input: torch.Tensor, dim: int = -1) -> torch.Tensor:
        signal, gate = input.chunk(2, dim)
        module.function = gate.detach().sigmoid().mul
        return module(signal)

'''The modules that a call of a torch function becomes, so that a composite's rules for modules apply to it.

A composite chooses its rules by the types of modules. Where Zennit has no type for an operation, it becomes one of the
type whose usual rule does what the literature asks for:

=============================  ================  ====================================================================
call                           becomes           what the usual rule of that type does
=============================  ================  ====================================================================
``x + y``, ``x - y``, addcmul  ``Sum``           splits relevance by what each operand adds
means, average pools, sums     ``AvgPool``       splits relevance by what each element adds
activations                    ``Activation``    passes relevance on
``F.linear``, ``F.conv2d``     ``Linear``        as for a layer with the weight that was given
multiplication by a constant   ``BatchNorm``     passes relevance on
gates (squeeze-excitation)     ``BatchNorm``     passes relevance to the signal; the gate is held constant
division by a tensor           ``BatchNorm``     passes relevance to the numerator; the denominator is held constant
layer, group, RMS norm         ``BatchNorm``     passes relevance on (the identity rule of arXiv 2402.05602)
``x - x.mean()``               ``BatchNorm``     passes relevance on; the mean is held constant
product of two signals         ``BatchNorm``     passes half to each (the uniform rule of arXiv 2402.05602)
matmul of two signals          ``Sum``           half to each, split by what each element adds (arXiv 2402.05602)
softmax of an attention        ``Sum``           x_i (R_i - s_i sum_j R_j) for softmax s of x (arXiv 2402.05602)
masks and biases before it     ``Sum``           absorb a share by what they add, as the biases of layers do
=============================  ================  ====================================================================

Anything else passes relevance on by its gradient alone: that conserves it for views, concatenations, paddings and max
pools; where it does not, the preflight says so. What needs no gradient when the network runs (detached, computed under
``torch.no_grad``) is a constant.

The modules of this file have one of these types and compute the function that they are given.
'''
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import count
from math import prod
from typing import Any, ClassVar

import torch
from torch import nn
from zennit.layer import Sum
from zennit.types import Linear

from ..tracing._recorded import FunctionCall, Operation
from ..tracing._rules import OPERATIONS, UNKNOWN
from ..util._networks import map_tensors, tensors_in

Function = Callable[..., torch.Tensor]
Exchange = Callable[[dict[int, torch.Tensor]], torch.Tensor]
LAYERS = {'linear': nn.Linear, 'conv1d': nn.Conv1d, 'conv2d': nn.Conv2d, 'conv3d': nn.Conv3d,
          'conv_transpose1d': nn.ConvTranspose1d, 'conv_transpose2d': nn.ConvTranspose2d,
          'conv_transpose3d': nn.ConvTranspose3d}
PRODUCTS = {'matmul', 'rmatmul', 'mm', 'bmm', 'mv', 'einsum', 'baddbmm', 'addmm', 'tensordot', 'inner'}
AVERAGES = {'mean', 'sum', *(f'{adaptive}avg_pool{rank}d' for adaptive in ('', 'adaptive_') for rank in (1, 2, 3))}
NORMS = {'layer_norm', 'group_norm', 'instance_norm', 'rms_norm', 'local_response_norm', 'normalize', 'batch_norm',
         'log_softmax'}
ACTIVATIONS = {'relu': nn.ReLU, 'relu6': nn.ReLU6, 'hardtanh': nn.Hardtanh, 'elu': nn.ELU, 'selu': nn.SELU,
               'celu': nn.CELU, 'leaky_relu': nn.LeakyReLU, 'prelu': nn.PReLU, 'rrelu': nn.RReLU, 'silu': nn.SiLU,
               'gelu': nn.GELU, 'hardswish': nn.Hardswish, 'softplus': nn.Softplus, 'softsign': nn.Softsign,
               'log_sigmoid': nn.LogSigmoid, 'sigmoid': nn.Sigmoid, 'tanh': nn.Tanh, 'hardsigmoid': nn.Hardsigmoid}
ELEMENTWISE = nn.Tanh  # stands for any other function of one element
AVERAGE, SCALING = nn.AdaptiveAvgPool2d, nn.BatchNorm1d
GATES = ('reciprocal', 'rtruediv', 'rsqrt', 'sigmoid', 'hardsigmoid', 'hardtanh', 'relu6', 'clamp', 'softmax', 'tanh')
STATISTICS = {'mean', 'amax', 'max', 'var_mean', 'std_mean'}
ARITHMETIC = {'add', 'sub', 'rsub', 'mul', 'div', 'neg'}
PASSING = {'clone', '_to_copy', 'detach', 'alias', 'copy', 'where', 'masked_fill', 'native_dropout', 'lift_fresh'}
VIEWS = PASSING | set('view expand unsqueeze squeeze permute transpose t select slice as_strided'.split())


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
    '''A module of some linear type, with a weight and a bias that rules modify, that computes a given function.'''

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.function(input, self.weight, self.bias)


@lru_cache(None)
def functional(kind: Any) -> type[Any]:
    '''Make the class of modules that a composite treats as a ``kind``.'''
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
    '''The calls of modules that a call of a function becomes.

    Attributes
    ----------
    kinds: tuple of type
        The class of each module.
    signals: tuple of int
        The positions of the tensors that relevance flows to; the other arguments are held constant.
    in_place: int or None
        The tensor that the function writes into.
    absorbs: bool
        Whether rules absorb relevance by design, as for a bias or for the constant term of a softmax.
    '''

    kinds: tuple[type[nn.Module], ...]
    signals: tuple[int, ...]
    in_place: int | None = None
    absorbs: ClassVar[bool] = False

    def modules(self) -> list[Any]:
        '''Return new modules, one of each kind.'''
        return [functional(kind)() for kind in self.kinds]  # type: ignore[arg-type]

    def __call__(self, modules: Sequence[Any], func: Function, args: Any, kwargs: Any) -> torch.Tensor:
        '''Compute the function with the modules.'''
        def exchange(tensors: dict[int, torch.Tensor]) -> torch.Tensor:
            position = count()

            def exchanged(tensor: torch.Tensor) -> torch.Tensor:
                number = next(position)
                tensor = tensors[number] if number in tensors else tensor.detach()
                return tensor.clone() if number == self.in_place else tensor

            new_args, new_kwargs = map_tensors(exchanged, (args, kwargs))
            return func(*new_args, **new_kwargs)

        tensors = tensors_in((args, kwargs))
        if not any(tensors[signal].requires_grad for signal in self.signals):
            return self.without_signal(modules, func, args, kwargs)
        result = self.run(modules, tensors, exchange)
        return result if self.in_place is None else tensors[self.in_place].copy_(result)

    def without_signal(self, modules: Sequence[Any], func: Function, args: Any, kwargs: Any) -> torch.Tensor:
        '''Compute the function where all signals are constants, e.g. detached, though another argument is none.'''
        return func(*args, **kwargs)

    def run(self, modules: Sequence[Any], tensors: list[torch.Tensor], call: Exchange) -> torch.Tensor:
        '''Let each module compute the function of one signal; those that are no constants share relevance equally.

        Parameters
        ----------
        modules: sequence of torch.nn.Module
            Those of :meth:`modules`.
        tensors: list of torch.Tensor
            The arguments of the function.
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
    '''A function whose signals are expanded to the shape of the result, so that relevance passes on as it is.'''

    def run(self, modules: Sequence[Any], tensors: list[torch.Tensor], call: Exchange) -> torch.Tensor:
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
        return super().run(modules, [tensor.expand(shape) for tensor in tensors], call)

    def without_signal(self, modules: Sequence[Any], func: Function, args: Any, kwargs: Any) -> torch.Tensor:
        '''Pass relevance on to the argument that is no constant, as where a signal is multiplied by a number.'''
        live = next(number for number, tensor in enumerate(tensors_in((args, kwargs))) if tensor.requires_grad)
        return replace(self, kinds=self.kinds[:1], signals=(live,))(modules[:1], func, args, kwargs)


class Softmax(Equivalent):
    '''A softmax of scores, whose masks of minus infinity are made finite, as infinity times zero is not a number.'''

    absorbs = True

    def run(self, modules: Sequence[Any], tensors: list[torch.Tensor], call: Exchange) -> torch.Tensor:
        finite = [tensor.clamp(min=torch.finfo(tensor.dtype).min) for tensor in tensors]
        return super().run(modules, finite, call)


@dataclass(frozen=True)
class Addition(Equivalent):
    '''An addition, whose operands are stacked and summed, as in Zennit's own canonizers.

    Attributes
    ----------
    splits: bool
        Whether an operand that needs no gradient gets its share, as a mask before a softmax does; otherwise it is a
        constant, to which relevance does not flow.
    '''

    splits: bool = False

    def run(self, modules: Sequence[Any], tensors: list[torch.Tensor], call: Exchange) -> torch.Tensor:
        live = [tensors[signal] for signal in self.signals if tensors[signal].requires_grad]
        if len(live) < len(self.signals) and not self.splits:
            result = call({})
            return Carried.apply(live[0].expand_as(result), result)
        return self.add(modules, tensors, call)

    def add(self, modules: Sequence[Any], tensors: list[torch.Tensor], call: Exchange) -> torch.Tensor:
        '''Add operands, each of which gets its share.'''
        modules[0].function = partial(torch.sum, dim=-1)
        return modules[0](torch.stack(torch.broadcast_tensors(*tensors)).movedim(0, -1))  # in memory, the first: faster


class Shift(Addition):
    '''An addition of a constant that absorbs its share of relevance.'''

    absorbs = True


class Difference(Addition):
    '''An addition of operands with signs and factors, which are applied before.'''

    def add(self, modules: Sequence[Any], tensors: list[torch.Tensor], call: Exchange) -> torch.Tensor:
        operands = dict(zip(self.signals, torch.broadcast_tensors(*(tensors[signal] for signal in self.signals))))
        nothing = {signal: torch.zeros_like(operand) for signal, operand in operands.items()}
        contributions = [Carried.apply(operand, call({**nothing, signal: operand}))
                         for signal, operand in operands.items()]
        return super().add(modules, contributions, call)


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

    absorbs = True
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

    absorbs = True

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


def equivalents(calls: Sequence[FunctionCall], outputs: Sequence[int]) -> list[tuple[FunctionCall, Equivalent]]:
    '''Return the calls that rules apply to, each with its equivalent; the network returns the values ``outputs``.'''
    origins = Origins(calls)
    last = {id(origins.of(value)) for value in outputs}
    shifts = {id(earlier) for call in calls if call.site.function == 'softmax' and call.active and id(call) not in last
              for earlier in origins.path(call.arguments[call.active[0]].value)}
    found = ((call, _equivalent(call, origins, id(call) in last, id(call) in shifts)) for call in calls if call.active)
    return [(call, equivalent) for call, equivalent in found if equivalent is not None]


class Origins:
    '''Find the call that produced a value, views and factors aside.'''

    def __init__(self, calls: Sequence[FunctionCall]):
        self._made: dict[int, FunctionCall] = {}
        for call in calls:
            for value in call.results:
                self._made.setdefault(value, call)

    def of(self, value: int) -> FunctionCall | None:
        return next(reversed(list(self.path(value))), None)

    def path(self, value: int) -> Iterator[FunctionCall]:
        '''Yield the views and factors from a value back to the call that produced it, and that call.'''
        call = self._made.get(value)
        while call is not None:
            yield call
            operations = [operation for operation in call.operations if any(operation.active)]
            read = {value for operation in operations for value, active in zip(operation.reads, operation.active)
                    if active}.difference(value for operation in operations for value in operation.writes)
            earlier = self._made.get(read.pop()) if len(read) == 1 else None
            if earlier is None or earlier is call or any(
                    operation.name not in VIEWS | ARITHMETIC for operation in operations):
                break
            call = earlier


def _equivalent(call: FunctionCall, origins: Origins, last: bool, shifts: bool) -> Equivalent | None:
    '''Return the equivalent of a call that may be the network's ``last`` or one that ``shifts`` a softmax.'''
    name, active, in_place = call.site.function.strip('_'), call.active, call.in_place
    first = tuple(active[:1])
    if name in LAYERS:
        return Layer((LAYERS[name],), first, in_place, (1, 2)[:len(call.arguments) - 1]) if first == (0,) else None
    if name in PRODUCTS:
        return _product(call, int(name in ('addmm', 'baddbmm')))
    if name == 'scaled_dot_product_attention':
        return Attention((Sum,) * 5, (0, 1, 2))
    if name == 'softmax' and not last:
        return Softmax((Sum,), first)
    if name == 'glu':
        return Gated((SCALING,), first)
    if name in NORMS or name == 'softmax':
        return Equivalent((SCALING,), first, in_place)
    if name in AVERAGES:
        return Equivalent((AVERAGE,), first)
    if name in ACTIVATIONS:
        return Equivalent((ACTIVATIONS[name],), first, in_place)
    operations = [operation for operation in call.operations if any(operation.active)]
    if len(operations) == 1 and operations[0].name in ARITHMETIC:
        return _arithmetic(call, operations[0], origins, shifts)
    if name in ('addcmul', 'addcdiv') and len(active) == 2 and active[0] == 0:
        return Difference((Sum,), tuple(active), in_place)
    if len(active) == 1 and operations and all(map(_changes_elements, operations)):
        shape = torch.broadcast_shapes(*(argument.shape for argument in call.arguments))
        if operations[-1].shapes == [shape]:  # ``max`` of two tensors is a function of elements, of one it is none
            return Broadcast((ELEMENTWISE,), first, in_place)
    return None


def _product(call: FunctionCall, summands: int) -> Equivalent | None:
    '''Return the equivalent of a product of tensors; the ``summands`` in front of the factors are biases.'''
    factors = range(summands, len(call.arguments))
    signals = tuple(call.active)
    constants = [position for position in factors if position not in signals]
    if signals[0] not in factors:
        return None
    if len(factors) == 1:
        return Equivalent((AVERAGE,), signals)
    if len(signals) == 1:
        return Layer((nn.Linear,), signals, None, (constants[0], *range(summands)))
    return Equivalent((Sum,) * len(signals), signals)


def _arithmetic(call: FunctionCall, operation: Operation, origins: Origins, shifts: bool) -> Equivalent | None:
    name, active, in_place = operation.name, tuple(call.active), call.in_place
    if name == 'sub' and len(active) == 2 and _is_statistic(call, origins):
        return Broadcast((SCALING,), active[:1], in_place)
    if len(active) == 2 and name in ('add', 'sub', 'rsub'):
        plain = name == 'add' and not operation.scalars
        return (Addition if plain else Difference)((Sum,), active, in_place, shifts)
    if name == 'add' or (name == 'sub' and operation.active[0]):
        if shifts and len(call.arguments) == 2:  # a mask or position bias absorbs its share; else scores of 0 would not
            return Shift((Sum,), active, in_place)
        return None  # a constant was added
    if len(active) == 2:
        active = active[:1] if name == 'div' else _signals(call, origins)
    return Broadcast((SCALING,) * len(active), active, in_place)


def _is_statistic(call: FunctionCall, origins: Origins) -> bool:
    '''Return whether the subtrahend is one number for many elements of the minuend, as the mean in a norm.'''
    maker = origins.of(call.arguments[1].value)
    return (maker is not None and maker.site.function in STATISTICS
            and maker.arguments[0].value == call.arguments[0].value)


def _signals(call: FunctionCall, origins: Origins) -> tuple[int, ...]:
    '''Return the factors of a product that are no gates: the larger one, or the one that is surely none, or both.'''
    sizes = [prod(argument.shape) for argument in call.arguments]
    if sizes[0] != sizes[1]:
        return (0 if sizes[0] > sizes[1] else 1,)
    makers = [origins.of(argument.value) for argument in call.arguments]
    names = [maker.site.function.strip('_') if maker else '' for maker in makers]
    sureness = [GATES.index(name) if name in GATES else len(GATES) for name in names]
    if sureness[0] == sureness[1]:
        return (0, 1)
    return (0 if sureness[0] > sureness[1] else 1,)


def _changes_elements(operation: Operation) -> bool:
    '''Return whether an operation computes each element from one of its input, and does not just pass it on.'''
    packet = getattr(torch.ops.aten, operation.name, None)
    overload = getattr(packet, packet.overloads()[0]) if packet is not None else None
    known = OPERATIONS.get(operation.name, UNKNOWN).pointwise  # older releases lack some tags
    return overload is not None and (known or torch.Tag.pointwise in overload.tags) and operation.name not in PASSING

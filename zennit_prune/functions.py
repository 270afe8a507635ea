'''Which modules a call of a torch function becomes, so that rules for modules make it sound.

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
``x - x.mean()``               ``BatchNorm``     the same; the mean is held constant
product of two signals         ``BatchNorm``     passes half to each (the uniform rule of arXiv 2402.05602)
matmul of two signals          ``Sum``           half to each, split by what each element adds (arXiv 2402.05602)
softmax of an attention        ``Sum``           x_i (R_i - s_i sum_j R_j) for softmax s of x (arXiv 2402.05602)
masks and biases before it     ``Sum``           take a share by what they add, as the biases of layers do
=============================  ================  ====================================================================

Anything else passes relevance on by its gradient alone: that conserves it for views, concatenations, paddings and max
pools; where it does not, the preflight says so.
'''
from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import nn
from zennit.layer import Sum

from .equivalents import Addition, Attention, Broadcast, Difference, Equivalent, Gated, Layer, Shift, Softmax
from .recorded import FunctionCall, Operation
from .rules import OPERATIONS, UNKNOWN

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


def equivalents(calls: Sequence[FunctionCall], outputs: Sequence[int]) -> list[tuple[FunctionCall, Equivalent]]:
    '''The calls that rules have to be applied to, each with what it becomes; ``outputs`` are the network's values.'''
    origins = Origins(calls)
    last = {id(origins.of(value)) for value in outputs}
    shifts = {id(earlier) for call in calls if call.site.function == 'softmax' and call.active and id(call) not in last
              for earlier in origins.path(call.arguments[call.active[0]].value)}
    found = ((call, _equivalent(call, origins, id(call) in last, id(call) in shifts)) for call in calls if call.active)
    return [(call, equivalent) for call, equivalent in found if equivalent is not None]


class Origins:
    '''Which call made a value, views and factors aside.'''

    def __init__(self, calls: Sequence[FunctionCall]):
        self._made: dict[int, FunctionCall] = {}
        for call in calls:
            for value in call.results:
                self._made.setdefault(value, call)

    def of(self, value: int) -> FunctionCall | None:
        return next(reversed(list(self.path(value))), None)

    def path(self, value: int) -> Iterator[FunctionCall]:
        '''The views and factors between a value and the call that made it, from the value on, and that call.'''
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
    '''What a call becomes; is it the ``last`` in the network, does it add a constant that ``shifts`` a softmax?'''
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
    '''A product of tensors; the ``summands`` in front of the factors are biases.'''
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
        return (Addition if plain else Difference)((Sum,), active, in_place)
    if name == 'add' or (name == 'sub' and operation.active[0]):
        if shifts and len(call.arguments) == 2:  # a mask or position bias takes its share, or scores of zero would not
            return Shift((Sum,), active, in_place)
        return None  # a constant was added
    if len(active) == 2:
        active = active[:1] if name == 'div' else _signals(call, origins)
    return Broadcast((SCALING,) * len(active), active, in_place)


def _is_statistic(call: FunctionCall, origins: Origins) -> bool:
    '''Whether what is subtracted is one number for many elements of what it is subtracted from, as in a norm.'''
    maker = origins.of(call.arguments[1].value)
    return (maker is not None and maker.site.function in STATISTICS
            and maker.arguments[0].value == call.arguments[0].value)


def _signals(call: FunctionCall, origins: Origins) -> tuple[int, ...]:
    '''The factors of a product that are no gates: the larger one, or the one that is surely none, or both.'''
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
    '''Whether an operation computes each element from one of its input, and does not just pass it on.'''
    packet = getattr(torch.ops.aten, operation.name, None)
    overload = getattr(packet, packet.overloads()[0]) if packet is not None else None
    known = OPERATIONS.get(operation.name, UNKNOWN).pointwise  # older releases lack some tags
    return overload is not None and (known or torch.Tag.pointwise in overload.tags) and operation.name not in PASSING

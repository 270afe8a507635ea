'''What is written with functions gets the relevance of what is written with modules.'''

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from small import apart, composite, images, labels, seeded
from torch import nn
from torch.nn import functional as F
from zennit.composites import LayerMapComposite, layer_map_base
from zennit.core import Composite
from zennit.layer import Sum
from zennit.rules import Epsilon
from zennit.types import Linear

import zennit_prune as zp

Function = Callable[[nn.Module, torch.Tensor], torch.Tensor]
RULES = ['epsilon', 'epsilon_plus', 'epsilon_alpha2_beta1', 'epsilon_gamma_box']
CHANNELS = 6


class Around(nn.Module):
    '''A network around a layer, which is called as a module or, in a ``function``, not at all.'''

    def __init__(self, layer: nn.Module, function: Function | None = None):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.layer, self.function = layer, function
        self.next = nn.LazyConv2d(5, 1)
        self.fc = nn.LazyLinear(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.layer(x) if self.function is None else self.function(self.layer, x)
        x = x if x.dim() == 4 else x[:, :, None, None]
        return self.fc(F.relu(self.next(x)).flatten(1))


def twins(
    layer: Callable[[], nn.Module], function: Function, other: Function | None = None, size: int = 8
) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    '''One network in two ways, and inputs.'''
    x = images(3, size)
    networks = []
    for way in (other, function):
        model = Around(layer(), way)
        model(x)
        networks.append(seeded(model).double())
    return *networks, x.double()


def rules(name: str, model: nn.Module, x: torch.Tensor) -> Composite:
    canonizers = [zp.GraphCanonizer(model, x)]
    if name == 'epsilon':
        return LayerMapComposite([*layer_map_base(), (Linear, Epsilon())], canonizers)
    return composite(name, canonizers)


def attributed(model: nn.Module, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    '''The output, and the relevance of the inputs, with Zennit alone.'''
    x = x.clone().requires_grad_()
    with rules(name, model, x).context(model) as modified:
        output = modified(x)
        start = F.one_hot(labels(len(x)), output.shape[1]).to(output)
        return output.detach(), torch.autograd.grad(output, x, start)[0]


def channels(model: nn.Module, name: str, x: torch.Tensor) -> zp.Relevance:
    pruner = zp.Pruner(model, None if name == 'epsilon' else composite(name), x)
    return pruner.collect([(x, labels(len(x)))], progress=False)


def assert_twins(
    modular: nn.Module, functional: nn.Module, x: torch.Tensor, name: str, tolerance: float = 1e-6
) -> None:
    '''Equal outputs, equal relevance of inputs and of channels; the output is that without rules.'''
    with torch.no_grad():
        plain = functional(x)
    (expected_output, expected), (output, found) = (attributed(model, name, x) for model in (modular, functional))
    assert apart(output, plain) <= 1e-12 and apart(output, expected_output) <= 1e-12
    assert apart(found, expected) <= tolerance
    left, right = (channels(model, name, x) for model in (functional, modular))
    assert left and set(left) <= set(right)
    for group in left:
        assert apart(left[group], right[group]) <= tolerance, group


def _relu_in_place(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x.relu_()
    return x


ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], Function]] = {
    'F.relu': (nn.ReLU, lambda layer, x: F.relu(x)),
    'F.relu(inplace)': (nn.ReLU, lambda layer, x: F.relu(x, inplace=True)),
    'inplace module': (nn.ReLU, lambda layer, x: nn.ReLU(inplace=True)(x)),
    'relu_': (nn.ReLU, _relu_in_place),
    'F.relu_': (nn.ReLU, lambda layer, x: F.relu_(x)),
    'torch.relu': (nn.ReLU, lambda layer, x: torch.relu(x)),
    'Tensor.relu': (nn.ReLU, lambda layer, x: x.relu()),
    'clamp': (nn.ReLU, lambda layer, x: x.clamp(min=0)),
    'torch.clamp': (nn.ReLU, lambda layer, x: torch.clamp(x, 0)),
    'maximum with zero': (nn.ReLU, lambda layer, x: torch.maximum(x, torch.zeros_like(x))),
    'clamp_min': (nn.ReLU, lambda layer, x: torch.clamp_min(x, 0)),
    'relu6': (nn.ReLU6, lambda layer, x: F.relu6(x)),
    'hardtanh': (nn.Hardtanh, lambda layer, x: F.hardtanh(x)),
    'silu': (nn.SiLU, lambda layer, x: F.silu(x)),
    'silu(inplace)': (nn.SiLU, lambda layer, x: F.silu(x, inplace=True)),
    'gelu': (nn.GELU, lambda layer, x: F.gelu(x)),
    'gelu(tanh)': (lambda: nn.GELU('tanh'), lambda layer, x: F.gelu(x, approximate='tanh')),
    'hardswish': (nn.Hardswish, lambda layer, x: F.hardswish(x)),
    'leaky_relu': (lambda: nn.LeakyReLU(0.3), lambda layer, x: F.leaky_relu(x, 0.3)),
    'elu': (nn.ELU, lambda layer, x: F.elu(x)),
    'elu(inplace)': (nn.ELU, lambda layer, x: F.elu(x, inplace=True)),
    'selu': (nn.SELU, lambda layer, x: torch.selu(x)),
    'celu': (nn.CELU, lambda layer, x: F.celu(x)),
    'mish': (nn.Mish, lambda layer, x: F.mish(x)),
    'softplus': (nn.Softplus, lambda layer, x: F.softplus(x)),
    'softsign': (nn.Softsign, lambda layer, x: F.softsign(x)),
    'tanh': (nn.Tanh, lambda layer, x: torch.tanh(x)),
    'F.tanh': (nn.Tanh, lambda layer, x: F.tanh(x)),
    'tanh_': (nn.Tanh, lambda layer, x: x.tanh_()),
    'sigmoid': (nn.Sigmoid, lambda layer, x: torch.sigmoid(x)),
    'Tensor.sigmoid': (nn.Sigmoid, lambda layer, x: x.sigmoid()),
    'hardsigmoid': (nn.Hardsigmoid, lambda layer, x: F.hardsigmoid(x)),
    'logsigmoid': (nn.LogSigmoid, lambda layer, x: F.logsigmoid(x)),
    'tanhshrink': (nn.Tanhshrink, lambda layer, x: F.tanhshrink(x)),
    'softshrink': (nn.Softshrink, lambda layer, x: F.softshrink(x)),
    'hardshrink': (nn.Hardshrink, lambda layer, x: F.hardshrink(x)),
    'threshold': (lambda: nn.Threshold(0.1, 0.0), lambda layer, x: F.threshold(x, 0.1, 0.0)),
    'rrelu': (nn.RReLU, lambda layer, x: F.rrelu(x)),
    'prelu': (lambda: nn.PReLU(CHANNELS), lambda layer, x: F.prelu(x, layer.weight)),
    'prelu of one slope': (nn.PReLU, lambda layer, x: F.prelu(x, layer.weight)),
    'swish by hand': (nn.SiLU, lambda layer, x: x * torch.sigmoid(x)),
    'swish by hand, reversed': (nn.SiLU, lambda layer, x: torch.sigmoid(x) * x),
    'hardswish by hand': (nn.Hardswish, lambda layer, x: x * F.relu6(x + 3) / 6),
    'hardswish of a gate': (nn.Hardswish, lambda layer, x: x * (F.relu6(x + 3) / 6)),
    'mish by hand': (nn.Mish, lambda layer, x: x * torch.tanh(F.softplus(x))),
    'gelu by hand': (nn.GELU, lambda layer, x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
    'Mish as a function of a module': (nn.Mish, lambda layer, x: nn.Mish()(x)),
}


@pytest.mark.parametrize('name', RULES)
@pytest.mark.parametrize('way', ACTIVATIONS)
def test_activations(way: str, name: str) -> None:
    assert_twins(*twins(*ACTIVATIONS[way]), name)


POOLS: dict[str, tuple[Callable[[], nn.Module], Function]] = {
    'avg_pool2d': (lambda: nn.AvgPool2d(2), lambda layer, x: F.avg_pool2d(x, 2)),
    'avg_pool2d, keywords': (
        lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        lambda layer, x: F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False),
    ),
    'adaptive_avg_pool2d': (lambda: nn.AdaptiveAvgPool2d(3), lambda layer, x: F.adaptive_avg_pool2d(x, 3)),
    'mean': (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), lambda layer, x: x.mean((2, 3))),
    'torch.mean': (
        lambda: nn.AdaptiveAvgPool2d(1),
        lambda layer, x: torch.mean(x, dim=(2, 3), keepdim=True),
    ),
    'mean twice': (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), lambda layer, x: x.mean(3).mean(2)),
    'mean of a flat map': (
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        lambda layer, x: x.flatten(2).mean(-1),
    ),
    'sum': (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), lambda layer, x: x.sum((2, 3)) / 64),
    'max_pool2d': (lambda: nn.MaxPool2d(2), lambda layer, x: F.max_pool2d(x, 2)),
    'adaptive_max_pool2d': (lambda: nn.AdaptiveMaxPool2d(2), lambda layer, x: F.adaptive_max_pool2d(x, 2)),
    'amax': (lambda: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()), lambda layer, x: x.amax((2, 3))),
    'max': (
        lambda: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()),
        lambda layer, x: x.flatten(2).max(-1).values,
    ),
    'dropout': (nn.Dropout, lambda layer, x: F.dropout(x, 0.5, training=False)),
    'dropout2d': (nn.Dropout2d, lambda layer, x: F.dropout2d(x, 0.5, training=False)),
    'reshaped': (nn.Identity, lambda layer, x: x.flatten(2).transpose(1, 2).transpose(1, 2).reshape(x.shape)),
    'padded': (lambda: nn.ZeroPad2d(1), lambda layer, x: F.pad(x, (1, 1, 1, 1))),
    'upsampled': (
        lambda: nn.Upsample(scale_factor=2),
        lambda layer, x: x.repeat_interleave(2, 2).repeat_interleave(2, 3),
    ),
}


@pytest.mark.parametrize('name', RULES)
@pytest.mark.parametrize('way', POOLS)
def test_pools_and_moves(way: str, name: str) -> None:
    other_stabilizers = way in ('mean twice', 'sum')
    assert_twins(*twins(*POOLS[way]), name, 1e-4 if other_stabilizers else 1e-6)


def _linear(function: Function) -> tuple[Callable[[], nn.Module], Function, Function]:
    '''A linear layer over the channels of each pixel.'''
    return (
        lambda: nn.Linear(CHANNELS, 7),
        lambda layer, x: function(layer, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        lambda layer, x: layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    )


def _plain(function: Function) -> tuple[Callable[[], nn.Module], Function, Function]:
    '''The same without a bias.'''
    return (lambda: nn.Linear(CHANNELS, 7, bias=False), *_linear(function)[1:])


LAYERS: dict[str, tuple[Any, ...]] = {
    'conv2d': (
        lambda: nn.Conv2d(CHANNELS, 7, 3, padding=1),
        lambda layer, x: F.conv2d(x, layer.weight, layer.bias, padding=1),
    ),
    'torch.conv2d': (
        lambda: nn.Conv2d(CHANNELS, 7, 3, bias=False),
        lambda layer, x: torch.conv2d(x, layer.weight),
    ),
    'conv2d, keywords': (
        lambda: nn.Conv2d(CHANNELS, 8, 3, groups=2, stride=2),
        lambda layer, x: F.conv2d(input=x, weight=layer.weight, bias=layer.bias, stride=2, groups=2),
    ),
    'conv_transpose2d': (
        lambda: nn.ConvTranspose2d(CHANNELS, 7, 3, 2),
        lambda layer, x: F.conv_transpose2d(x, layer.weight, layer.bias, 2),
    ),
    'linear': _linear(lambda layer, x: F.linear(x, layer.weight, layer.bias)),
    'linear without bias': _plain(lambda layer, x: F.linear(x, layer.weight)),
    'linear, keywords': _linear(lambda layer, x: F.linear(bias=layer.bias, weight=layer.weight, input=x)),
    '@': _plain(lambda layer, x: x @ layer.weight.T),
    'matmul': _plain(lambda layer, x: torch.matmul(x, layer.weight.t())),
    'Tensor.matmul': _plain(lambda layer, x: x.matmul(layer.weight.t())),
    'matmul from the left': _plain(lambda layer, x: (layer.weight @ x.transpose(2, 3)).transpose(2, 3)),
    'einsum': _plain(lambda layer, x: torch.einsum('bhwc,oc->bhwo', x, layer.weight)),
    'einsum, weight first': _plain(lambda layer, x: torch.einsum('oc,bhwc->bhwo', layer.weight, x)),
    'tensordot': _plain(lambda layer, x: torch.tensordot(x, layer.weight, ([3], [1]))),
    'inner': _plain(lambda layer, x: torch.inner(x, layer.weight)),
    'mm': _plain(lambda layer, x: torch.mm(x.flatten(0, 2), layer.weight.t()).view(*x.shape[:3], -1)),
    'bmm': _plain(
        lambda layer, x: torch.bmm(x.flatten(1, 2), layer.weight.t().expand(len(x), -1, -1)).view(*x.shape[:3], -1)
    ),
    'addmm': _linear(
        lambda layer, x: torch.addmm(layer.bias, x.flatten(0, 2), layer.weight.t()).view(*x.shape[:3], -1)
    ),
    'baddbmm': _linear(
        lambda layer, x: torch.baddbmm(
            layer.bias.view(1, 1, -1), x.flatten(1, 2), layer.weight.t().expand(len(x), -1, -1)
        ).view(*x.shape[:3], -1)
    ),
}


@pytest.mark.parametrize('name', RULES)
@pytest.mark.parametrize('way', LAYERS)
def test_layers_with_parameters_that_were_given(way: str, name: str) -> None:
    assert_twins(*twins(*LAYERS[way]), name)


def test_a_first_layer_that_is_a_function_gets_the_rule_of_first_layers() -> None:
    class First(nn.Module):
        def __init__(self, functional: bool):
            super().__init__()
            self.conv, self.last, self.functional = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), functional
            self.fc = nn.Linear(80, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.conv2d(x, self.conv.weight, self.conv.bias) if self.functional else self.conv(x)
            return self.fc(F.relu(self.last(F.relu(x))).flatten(1))

    modular, functional = (seeded(First(functional)).double() for functional in (False, True))
    assert_twins(modular, functional, images(3, dtype=torch.float64), 'epsilon_gamma_box')


NORMS: dict[str, tuple[Any, ...]] = {
    'batch_norm': (
        lambda: nn.BatchNorm2d(CHANNELS),
        lambda layer, x: F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias),
        lambda layer, x: F.leaky_relu(layer(F.leaky_relu(x, 1.0)), 1.0),
    ),
    'group_norm': (
        lambda: nn.GroupNorm(2, CHANNELS),
        lambda layer, x: F.group_norm(x, 2, layer.weight, layer.bias),
    ),
    'instance_norm': (
        lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
        lambda layer, x: F.instance_norm(x, weight=layer.weight, bias=layer.bias),
    ),
    'layer_norm': (
        lambda: nn.LayerNorm((CHANNELS, 8, 8)),
        lambda layer, x: F.layer_norm(x, (CHANNELS, 8, 8), layer.weight, layer.bias),
    ),
    'local_response_norm': (lambda: nn.LocalResponseNorm(3), lambda layer, x: F.local_response_norm(x, 3)),
    'rms_norm': (
        lambda: nn.RMSNorm((CHANNELS, 8, 8)),
        lambda layer, x: F.rms_norm(x, (CHANNELS, 8, 8), layer.weight, torch.finfo(x.dtype).eps),
    ),
    'layer norm of the channels by hand': (
        lambda: nn.LayerNorm(CHANNELS),
        lambda layer, x: _by_hand(layer, x),
        lambda layer, x: layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    ),
    'normalize': (lambda: Normalize(), lambda layer, x: x / x.norm(dim=1, keepdim=True)),
    'normalize with a root': (
        lambda: Normalize(),
        lambda layer, x: x / torch.sqrt((x * x).sum(1, keepdim=True)),
    ),
    'normalize with rsqrt': (
        lambda: Normalize(),
        lambda layer, x: x * torch.rsqrt(x.pow(2).sum(1, keepdim=True)),
    ),
}


class Normalize(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=1)


def _by_hand(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    '''What ConvNeXt calls LayerNorm2d.'''
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt(variance + layer.eps)
    return layer.weight[:, None, None] * x + layer.bias[:, None, None]


@pytest.mark.parametrize('name', RULES)
@pytest.mark.parametrize('way', NORMS)
def test_norms(way: str, name: str) -> None:
    assert_twins(*twins(*NORMS[way]), name)


class Held(nn.BatchNorm2d):
    '''Multiplies by something that is held constant, and passes relevance on as a BatchNorm does.'''

    factor: Any

    def __call__(self, x: torch.Tensor, factor: Any) -> torch.Tensor:
        self.factor = factor.detach() if isinstance(factor, torch.Tensor) else factor
        return super().__call__(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Joined(nn.Module):
    '''Two branches, joined by modules or functions; ``gate`` is small where one pixel stands for all.'''

    def __init__(self, join: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor], pooled: bool = False):
        super().__init__()
        self.stem, self.left, self.right = (nn.Conv2d(channels, 6, 3, padding=1) for channels in (3, 6, 6))
        self.last, self.fc = nn.Conv2d(6, 5, 3), nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.zeros(6, 1, 1))
        self.held, self.also_held, self.sum = Held(6), Held(6), Sum()
        self.act, self.sigmoid, self.hardsigmoid = nn.ReLU(), nn.Sigmoid(), nn.Hardsigmoid()
        self.join, self.pooled = join, pooled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        left, right = self.left(x), self.right(x)
        right = F.relu(right).mean((2, 3), keepdim=True) if self.pooled else right
        return self.fc(F.relu(self.last(self.join(self, left, right))).mean((2, 3)))


def _iadd(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a += b
    return a


def _isub(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a -= b
    return a


def _imul(a: torch.Tensor, b: Any) -> torch.Tensor:
    a *= b
    return a


def _idiv(a: torch.Tensor, b: Any) -> torch.Tensor:
    a /= b
    return a


Join = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
WITH_MODULES: dict[str, Join] = {
    'sum': lambda m, a, b: m.sum(torch.stack([a, b], -1)),
    'broadcast': lambda m, a, b: m.sum(torch.stack([a, b.expand_as(a)], -1)),
    'alpha': lambda m, a, b: m.sum(torch.stack([a, m.held(b, 3)], -1)),
    'difference': lambda m, a, b: m.sum(torch.stack([a, m.held(b, -1)], -1)),
    'difference, alpha': lambda m, a, b: m.sum(torch.stack([a, m.held(b, -3)], -1)),
    'reversed difference': lambda m, a, b: m.sum(torch.stack([m.held(a, -1), b], -1)),
    'scaled': lambda m, a, b: m.held(a, 3),
    'negated': lambda m, a, b: m.held(a, -1),
    'divided': lambda m, a, b: m.held(a, 1 / 3),
    'layer scale': lambda m, a, b: m.held(a, m.scale),
    'layer scale of a sum': lambda m, a, b: m.sum(torch.stack([a, m.held(b, m.scale)], -1)),
    'gate': lambda m, a, b: m.held(a, torch.sigmoid(b)),
    'hard gate': lambda m, a, b: m.held(a, F.hardsigmoid(b)),
    'mask': lambda m, a, b: m.held(a, b > 0),
    'soft gate': lambda m, a, b: m.held(a, b.softmax(1)),
    'ratio': lambda m, a, b: m.held(a, 1 / (b.abs() + 2)),
    'open gate': lambda m, a, b: m.held(a, b),
    'concatenation': lambda m, a, b: torch.cat([a, b], 1)[:, 3:9],
    'larger': lambda m, a, b: torch.maximum(a, b),
}
WITH_FUNCTIONS: dict[str, tuple[str, Join]] = {
    '+': ('sum', lambda m, a, b: a + b),
    '+, reversed': ('sum', lambda m, a, b: b.__radd__(a)),
    '+=': ('sum', lambda m, a, b: _iadd(a, b)),
    'torch.add': ('sum', lambda m, a, b: torch.add(a, b)),
    'torch.add, keywords': ('sum', lambda m, a, b: torch.add(other=b, input=a)),
    'add_': ('sum', lambda m, a, b: a.add_(b)),
    'stack and sum': ('sum', lambda m, a, b: torch.stack([a, b]).sum(0)),
    '+ of a double negation': ('sum', lambda m, a, b: a - (-b)),
    '+ broadcast': ('broadcast', lambda m, a, b: a + b),
    '+ broadcast, reversed': ('broadcast', lambda m, a, b: b + a),
    '+= broadcast': ('broadcast', lambda m, a, b: _iadd(a, b)),
    'alpha': ('alpha', lambda m, a, b: torch.add(a, b, alpha=3)),
    'alpha, add_': ('alpha', lambda m, a, b: a.add_(b, alpha=3)),
    '+ of a product': ('alpha', lambda m, a, b: a + 3 * b),
    '-': ('difference', lambda m, a, b: a - b),
    '-=': ('difference', lambda m, a, b: _isub(a, b)),
    'torch.sub': ('difference', lambda m, a, b: torch.sub(a, b)),
    'torch.subtract': ('difference', lambda m, a, b: torch.subtract(a, b)),
    'torch.sub, keywords': ('difference', lambda m, a, b: torch.sub(other=b, input=a)),
    'sub_': ('difference', lambda m, a, b: a.sub_(b)),
    '- with alpha': ('difference, alpha', lambda m, a, b: torch.sub(a, b, alpha=3)),
    'rsub': ('reversed difference', lambda m, a, b: torch.rsub(a, b)),
    '-, reversed': ('reversed difference', lambda m, a, b: a.__rsub__(b)),
    '*': ('scaled', lambda m, a, b: a * 3),
    '*, from the left': ('scaled', lambda m, a, b: 3 * a),
    '*=': ('scaled', lambda m, a, b: _imul(a, 3)),
    'mul_': ('scaled', lambda m, a, b: a.mul_(3)),
    'torch.mul': ('scaled', lambda m, a, b: torch.mul(a, 3)),
    'times a tensor': ('scaled', lambda m, a, b: a * torch.tensor(3.0, dtype=a.dtype)),
    'a tensor times': ('scaled', lambda m, a, b: torch.tensor(3.0, dtype=a.dtype) * a),
    'unary minus': ('negated', lambda m, a, b: -a),
    'torch.neg': ('negated', lambda m, a, b: torch.neg(a)),
    'zero minus': ('negated', lambda m, a, b: 0 - a),
    '/': ('divided', lambda m, a, b: a / 3),
    '/=': ('divided', lambda m, a, b: _idiv(a, 3)),
    'div_': ('divided', lambda m, a, b: a.div_(3)),
    'torch.div': ('divided', lambda m, a, b: torch.div(a, 3)),
    'torch.true_divide': ('divided', lambda m, a, b: torch.true_divide(a, 3)),
    'layer scale': ('layer scale', lambda m, a, b: a * m.scale),
    'layer scale from the left': ('layer scale', lambda m, a, b: m.scale * a),
    'layer scale, mul_': ('layer scale', lambda m, a, b: a.mul_(m.scale)),
    'layer scale, added': ('layer scale of a sum', lambda m, a, b: a + m.scale * b),
    'addcmul': ('layer scale of a sum', lambda m, a, b: torch.addcmul(a, m.scale, b)),
    'stochastic depth': ('sum', lambda m, a, b: a + torchvision.ops.stochastic_depth(b, 0.5, 'row', training=False)),
    'gate': ('gate', lambda m, a, b: a * torch.sigmoid(b)),
    'gate first': ('gate', lambda m, a, b: torch.sigmoid(b) * a),
    'gate in place': ('gate', lambda m, a, b: _imul(a, b.sigmoid())),
    'gate of a module': ('gate', lambda m, a, b: a * m.sigmoid(b)),
    'gate expanded': ('gate', lambda m, a, b: a * torch.sigmoid(b).expand_as(a)),
    'gate of F.sigmoid': ('gate', lambda m, a, b: a * F.sigmoid(b)),
    'gate by hand': ('gate', lambda m, a, b: a / (1 + torch.exp(-b))),
    'glu': ('gate', lambda m, a, b: F.glu(torch.cat([a, b.expand_as(a)], 1), 1)),
    'hard gate': ('hard gate', lambda m, a, b: a * F.hardsigmoid(b)),
    'hard gate of a module': ('hard gate', lambda m, a, b: m.hardsigmoid(b) * a),
    'hard gate by hand': ('hard gate', lambda m, a, b: a * (F.relu6(b + 3) / 6)),
    'hard gate by hand, applied in two steps': ('hard gate', lambda m, a, b: a * F.relu6(b + 3) / 6),
    'hard gate of clamp': ('hard gate', lambda m, a, b: (b / 6 + 0.5).clamp(0, 1) * a),
    'soft gate': ('soft gate', lambda m, a, b: a * b.softmax(1)),
    'mask': ('mask', lambda m, a, b: a * (b > 0)),
    'mask of numbers': ('mask', lambda m, a, b: (b > 0).to(a.dtype) * a),
    'no gradient': ('open gate', lambda m, a, b: a * b.detach()),
    'no gradient, first': ('open gate', lambda m, a, b: b.detach() * a),
    'ratio': ('ratio', lambda m, a, b: a / (b.abs() + 2)),
    'ratio of reciprocal': ('ratio', lambda m, a, b: a * (b.abs() + 2).reciprocal()),
    'torch.maximum': ('larger', lambda m, a, b: torch.where(a > b, a, b)),
    'cat': ('concatenation', lambda m, a, b: torch.concat((a, b), dim=1).narrow(1, 3, 6)),
}


def joined(way: str, pooled: bool) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    kind, function = WITH_FUNCTIONS[way]
    modular, functional = (seeded(Joined(join, pooled)).double() for join in (WITH_MODULES[kind], function))
    for model in (modular, functional):
        model.scale.data.add_(0.5)
    return modular, functional, images(3, dtype=torch.float64)


@pytest.mark.parametrize('name', RULES)
@pytest.mark.parametrize('way', [way for way, (kind, _) in WITH_FUNCTIONS.items() if kind != 'broadcast'])
def test_arithmetic_of_equal_shapes(way: str, name: str) -> None:
    assert_twins(*joined(way, False), name)


@pytest.mark.parametrize('name', RULES)
@pytest.mark.parametrize(
    'way', [way for way, (kind, _) in WITH_FUNCTIONS.items() if 'gate' in kind or kind == 'broadcast']
)
def test_arithmetic_with_one_value_for_all_pixels(way: str, name: str) -> None:
    assert_twins(*joined(way, True), name)

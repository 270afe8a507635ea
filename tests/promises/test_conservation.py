'''No relevance is made or lost by whatever networks are made of, and nothing is left behind.'''

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from relevance.test_canonize import conserving
from small import Injected, apart, contents, images, labels, same, seeded
from torch import nn
from torch.nn import functional as F
from zennit.core import Composite

import zennit_prune as zp
from zennit_prune.relevance._initial import Origin
from zennit_prune.relevance._preflight import preflight

Step = Callable[[Any, torch.Tensor], torch.Tensor]  # of the network, which may have been copied
SMOOTH = [F.gelu, F.silu, F.leaky_relu, F.elu, torch.tanh, F.mish, F.softplus]


class Generated(nn.Module):
    '''A random network of functions and modules, each of which passes on all relevance that it gets.'''

    def __init__(self, seed: int):
        super().__init__()
        self.random, self.layers, self.weights = random.Random(seed), nn.ModuleList(), nn.ParameterList()
        self.description: list[str] = []
        self.steps: list[Step] = []
        stem = self.layer(nn.Conv2d(3, 6, 3, padding=1))
        self.steps = [lambda net, x: net.layers[stem](x), *(self.step() for _ in range(self.random.randint(3, 6)))]
        self.fc = nn.Linear(6, 4)

    def layer(self, module: nn.Module) -> int:
        self.layers.append(module)
        return len(self.layers) - 1

    def weight(self, *shape: int) -> int:
        self.weights.append(nn.Parameter(torch.zeros(shape)))
        return len(self.weights) - 1

    def step(self) -> Step:
        makers = [getattr(self, name) for name in sorted(dir(type(self))) if name.startswith('make_')]
        maker = self.random.choice(makers)
        self.description.append(maker.__name__[5:])
        return maker()

    def make_convolution(self) -> Step:
        conv, act = self.layer(nn.Conv2d(6, 6, 3, padding=1)), self.random.choice(SMOOTH)
        return lambda net, x: act(net.layers[conv](x))

    def make_batch_norm(self) -> Step:
        conv, norm, act = self.layer(nn.Conv2d(6, 6, 1)), self.layer(nn.BatchNorm2d(6)), self.random.choice(SMOOTH)
        return (
            (lambda net, x: act(net.layers[norm](net.layers[conv](x))))
            if self.random.random() < 0.5
            else (lambda net, x: act(net.layers[conv](net.layers[norm](x))))
        )

    def make_functional_convolution(self) -> Step:
        weight, groups = self.weight(6, 3, 3, 3), 2
        return lambda net, x: F.silu(F.conv2d(x, net.weights[weight], padding=1, groups=groups))

    def make_matmul(self) -> Step:
        weight = self.weight(6, 6)
        return lambda net, x: F.gelu((x.permute(0, 2, 3, 1) @ net.weights[weight]).permute(0, 3, 1, 2))

    def make_einsum(self) -> Step:
        weight = self.weight(6, 6)
        return lambda net, x: torch.einsum('oc,bchw->bohw', net.weights[weight], x)

    def make_residual(self) -> Step:
        inner, scale = self.step(), self.random.choice([1, 0.5, 2])
        kind = self.random.choice(['add', 'in place', 'subtract', 'alpha', 'reversed'])
        return {
            'add': lambda net, x: x + scale * inner(net, x),
            'in place': lambda net, x: inner(net, x).add_(x),
            'subtract': lambda net, x: x - inner(net, x) * scale,
            'alpha': lambda net, x: torch.add(inner(net, x), x, alpha=scale),
            'reversed': lambda net, x: torch.rsub(inner(net, x), 3 * x),
        }[kind]

    def make_excitation(self) -> Step:
        down, up = self.layer(nn.Conv2d(6, 2, 1)), self.layer(nn.Conv2d(2, 6, 1))
        gate = self.random.choice([torch.sigmoid, F.hardsigmoid, lambda s: F.relu6(s + 3) / 6])
        pooled = self.random.choice([lambda x: x.mean((2, 3), keepdim=True), lambda x: F.adaptive_avg_pool2d(x, 1)])
        return lambda net, x: x * gate(net.layers[up](F.relu(net.layers[down](pooled(x)))))

    def make_gate(self) -> Step:
        conv = self.layer(nn.Conv2d(6, 6, 1))
        return lambda net, x: torch.sigmoid(net.layers[conv](x)) * x

    def make_product(self) -> Step:
        inner = self.step()
        return lambda net, x: x * inner(net, x)

    def make_mixing(self) -> Step:
        conv = self.layer(nn.Conv2d(6, 64, 1))

        def mix(net: Any, x: torch.Tensor) -> torch.Tensor:
            tokens = x.flatten(2).mT
            return (net.layers[conv](x).flatten(2).mT @ tokens).mT.reshape(x.shape) / 8

        return mix

    def make_concatenation(self) -> Step:
        left, conv = self.step(), self.layer(nn.Conv2d(12, 6, 1))
        return lambda net, x: net.layers[conv](torch.cat([left(net, x), x], 1))

    def make_layer_norm(self) -> Step:
        norm, by_hand = self.layer(nn.LayerNorm(6)), self.random.random() < 0.5

        def apply(net: Any, x: torch.Tensor) -> torch.Tensor:
            x = x.permute(0, 2, 3, 1)
            if by_hand:
                x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt()
            return (x if by_hand else net.layers[norm](x)).permute(0, 3, 1, 2)

        return apply

    def make_group_norm(self) -> Step:
        norm = self.layer(nn.GroupNorm(3, 6))
        return lambda net, x: net.layers[norm](x)

    def make_layer_scale(self) -> Step:
        weight = self.weight(1, 6, 1, 1)
        return lambda net, x: x * net.weights[weight]

    def make_stochastic_depth(self) -> Step:
        depth = self.layer(torchvision.ops.StochasticDepth(0.5, 'row'))
        inner = self.step()
        return lambda net, x: x + net.layers[depth](F.dropout(inner(net, x), 0.3, net.training))

    def make_pool(self) -> Step:
        return self.random.choice(
            [
                lambda net, x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
                lambda net, x: F.max_pool2d(x, 3, 1, 1),
                lambda net, x: F.pad(x, (1, 0, 1, 0))[..., 1:, 1:],
                lambda net, x: x.flip(2).roll(1, 3),
            ]
        )

    def make_chunks(self) -> Step:
        def swap(net: Any, x: torch.Tensor) -> torch.Tensor:
            left, right = x.chunk(2, 1)
            return torch.cat([right, left - right], 1)

        return swap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            x = step(self, x)
        return self.fc(x.mean((2, 3)))


def generated(seed: int) -> tuple[Any, torch.Tensor]:
    return seeded(Generated(seed)).double(), images(3, dtype=torch.float64, seed=seed)


@pytest.mark.parametrize('seed', range(40))
def test_generated_networks_conserve_relevance(seed: int) -> None:
    model, x = generated(seed)
    with torch.no_grad():
        expected = model(x)
    before = contents(model)
    with conserving(zp.GraphCanonizer(model, x)).context(model) as modified:
        leaf = x.clone().requires_grad_()
        output = modified(leaf)
        (relevance,) = torch.autograd.grad(output, leaf, F.one_hot(labels(3), 4).double())
    assert apart(output, expected) <= 1e-10
    mass = max(1.0, float(relevance.abs().sum((1, 2, 3)).max()))
    assert (relevance.sum((1, 2, 3)) - 1).abs().max() <= 1e-6 * mass, model.description
    assert same(before, contents(model))
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize('seed', range(0, 40, 5))
def test_preflight_finds_generated_networks_sound(seed: int) -> None:
    model, x = generated(seed)
    found = preflight(model, conserving(), zp.trace(model, x)._recording, x, Origin(labels(3)))
    assert not any('unsound' in problem for problem in found.problems), (model.description, found.problems)
    for stage in found.stages:
        expected = 1 - stage.absorbed + stage.conservation_error
        assert stage.sum == pytest.approx(expected, abs=1e-9 * max(stage.l1_norm, 1))
        assert abs(stage.conservation_error) <= 1e-6 * max(stage.l1_norm, 1)


class Raising(nn.Module):
    '''Raises deep inside, where functions were diverted and a BatchNorm merged.'''

    armed = False

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.conv(x)), inplace=True)
        x = (x + x * torch.sigmoid(x)).flatten(2).mT
        x = x + self.attention(x, x, x)[0]
        if self.armed:
            raise Injected
        return self.fc(x.mean(1))


@pytest.mark.parametrize('training', [False, True])
def test_everything_is_restored_when_the_network_raises(training: bool) -> None:
    model, x = seeded(Raising()).double(), images(3, dtype=torch.float64)
    canonizer = zp.GraphCanonizer(model, x)
    model.attention.train(training)
    before, mode = contents(model), torch.overrides._get_current_function_mode_stack()
    hooks = [len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks)]
    for rules in (conserving(canonizer), Composite(canonizers=[canonizer])):
        for _ in range(2):
            model.armed = True
            with pytest.raises(Injected), rules.context(model) as modified:
                modified(x)
            del model.armed
            assert same(before, contents(model))
            assert torch.overrides._get_current_function_mode_stack() == mode
            assert hooks == [
                len(nn.modules.module._global_forward_hooks),
                len(nn.modules.module._global_forward_pre_hooks),
            ]
    with conserving(canonizer).context(model) as modified:
        modified(x)


def test_a_context_that_never_runs_leaves_nothing() -> None:
    model, x = seeded(Raising()), images(3)
    before = contents(model)
    with conserving(zp.GraphCanonizer(model, x)).context(model):
        assert not same(before, contents(model))
    assert same(before, contents(model))

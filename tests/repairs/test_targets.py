'''BatchNorm in front of a layer, layers that compute their weights, parameters and modules that are used again.'''

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from relevance.test_functions import RULES, attributed, channels, rules
from small import apart, composite, contents, images, labels, same, seeded, snapshot
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from zennit.composites import GuidedBackprop, LayerMapComposite, NameMapComposite, layer_map_base
from zennit.core import Composite
from zennit.layer import Sum
from zennit.rules import Epsilon, Gamma, Norm, ZPlus
from zennit.types import BatchNorm, Linear

import zennit_prune as zp


class PreActivation(nn.Module):
    '''A stem whose output is read by an activation, a BatchNorm, and a layer.'''

    def __init__(self, layer: nn.Module, batch_norm: nn.Module | None = None, between: nn.Module | None = None):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
        self.bn = batch_norm or nn.BatchNorm2d(6)
        self.between, self.layer = between or nn.Identity(), layer
        self.fc = nn.LazyLinear(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.between(self.bn(self.act(self.stem(x))))
        x = self.layer(x.mean((2, 3)) if isinstance(self.layer, nn.Linear) else x)
        return self.fc(F.relu(x).flatten(1))


class PlainLinear(nn.Module):
    '''A BatchNorm between two linear layers.'''

    def __init__(self, last: nn.Module):
        super().__init__()
        self.first, self.bn, self.layer, self.fc = nn.Linear(192, 6), nn.BatchNorm1d(6), last, nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.layer(self.bn(F.relu(self.first(x.flatten(1)))))))


def folded(model: nn.Module) -> nn.Module:
    '''The same with the BatchNorm folded, by hand, into the layer behind.'''
    model = copy.deepcopy(model)
    norm, layer = model.bn, model.layer
    scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    shift = (0 if norm.bias is None else norm.bias) - norm.running_mean * scale
    weight, groups = layer.weight.detach(), getattr(layer, 'groups', 1)
    outputs = weight.shape[0] // groups
    new, bias = weight.clone(), torch.zeros(len(weight), dtype=weight.dtype)
    for out in range(len(weight)):
        for position in range(weight.shape[1]):
            channel = out // outputs * weight.shape[1] + position
            new[out, position] *= scale[channel]
            bias[out] += shift[channel] * weight[out, position].sum()
    layer.weight = nn.Parameter(new.detach())
    layer.bias = nn.Parameter((bias if layer.bias is None else bias + layer.bias).detach())
    model.bn = nn.Identity()
    return model


MERGED: dict[str, Callable[[], nn.Module]] = {
    '1 by 1': lambda: PreActivation(nn.Conv2d(6, 5, 1)),
    '3 by 3': lambda: PreActivation(nn.Conv2d(6, 5, 3)),
    'no bias': lambda: PreActivation(nn.Conv2d(6, 5, 3, stride=2, bias=False)),
    'grouped': lambda: PreActivation(nn.Conv2d(6, 4, 3, groups=2)),
    'grouped, dilated': lambda: PreActivation(nn.Conv2d(6, 9, 3, groups=3, dilation=2, bias=False)),
    'depthwise': lambda: PreActivation(nn.Conv2d(6, 12, 3, groups=6)),
    'not affine': lambda: PreActivation(nn.Conv2d(6, 5, 1), nn.BatchNorm2d(6, affine=False)),
    'linear': lambda: PlainLinear(nn.Linear(6, 5)),
    'linear without bias': lambda: PlainLinear(nn.Linear(6, 5, bias=False)),
    'valid padding': lambda: PreActivation(nn.Conv2d(6, 5, 3, padding='valid')),
}


def built(build: Callable[[], nn.Module]) -> tuple[nn.Module, torch.Tensor]:
    model, x = build(), images(3)
    model(x)
    return seeded(model).double(), x.double()


@pytest.mark.parametrize('name', RULES)
@pytest.mark.parametrize('way', MERGED)
def test_batchnorm_before_a_layer_is_merged(way: str, name: str) -> None:
    model, x = built(MERGED[way])
    reference = folded(model)
    assert apart(reference(x), model(x)) <= 1e-12
    before = contents(model)
    (output, found), (_, expected) = (attributed(network, name, x) for network in (model, reference))
    assert apart(output, reference(x)) <= 1e-12 and apart(found, expected) <= 1e-6
    assert same(before, contents(model))
    left, right = (channels(network, name, x) for network in (model, reference))
    for group in left:
        assert apart(left[group], right[group]) <= 1e-6


NOT_MERGED: dict[str, Callable[[], nn.Module]] = {
    'padding': lambda: PreActivation(nn.Conv2d(6, 5, 3, padding=1)),
    'padding of one side': lambda: PreActivation(nn.Conv2d(6, 5, 3, padding=(0, 1))),
    'same padding': lambda: PreActivation(nn.Conv2d(6, 5, 3, padding='same')),
    'reflected padding': lambda: PreActivation(nn.Conv2d(6, 5, 3, padding=1, padding_mode='reflect')),
    'transposed': lambda: PreActivation(nn.ConvTranspose2d(6, 5, 3)),
    'activation between': lambda: PreActivation(nn.Conv2d(6, 5, 3), between=nn.ReLU()),
    'pool between': lambda: PreActivation(nn.Linear(6, 5)),
}


@pytest.mark.parametrize('way', NOT_MERGED)
def test_batchnorm_before_other_layers_is_left_alone(way: str) -> None:
    model, x = built(NOT_MERGED[way])
    with torch.no_grad():
        expected = model(x)
        with Composite(canonizers=[zp.GraphCanonizer(model, x)]).context(model) as modified:
            assert apart(modified(x), expected) <= 1e-12
            assert modified.bn.eps > 0


class Dense(nn.Module):
    '''A BatchNorm in front of a layer on a concatenation, one that feeds a layer twice, and one with two readers.'''

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.bn1, self.grow1 = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)
        self.bn2, self.grow2 = nn.BatchNorm2d(7), nn.Conv2d(7, 3, 1)
        self.bn3, self.fc, self.other = nn.BatchNorm2d(10), nn.Linear(10, 4), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.grow1(F.relu(self.bn1(x)))], 1)
        x = torch.cat([x, self.grow2(self.bn2(x))], 1)
        x = self.bn3(x).mean((2, 3))
        return self.fc(x) + self.other(x)


def test_dense_networks_are_merged_where_it_is_exact() -> None:
    model, x = built(Dense)
    with torch.no_grad():
        expected = model(x)
        before = snapshot(model)
        with Composite(canonizers=[zp.GraphCanonizer(model, x)]).context(model) as modified:
            assert apart(modified(x), expected) <= 1e-12
            assert [bn.eps == 0 for bn in (modified.bn1, modified.bn2, modified.bn3)] == [False, True, False]
        assert same(before, snapshot(model))


def test_a_layer_between_two_batchnorms_takes_both() -> None:
    model, x = built(
        lambda: nn.Sequential(
            nn.Conv2d(3, 5, 3),
            nn.ReLU(),
            nn.BatchNorm2d(5),
            nn.Conv2d(5, 6, 1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(216, 4),
        )
    )
    with torch.no_grad():
        expected = model(x)
        before = snapshot(model)
        with Composite(canonizers=[zp.GraphCanonizer(model, x)]).context(model) as modified:
            assert modified[2].eps == modified[4].eps == 0
            assert apart(modified(x), expected) <= 1e-12
        assert same(before, snapshot(model))


# --- layers that compute their weights


class Standardized(nn.Conv2d):
    '''A convolution whose weight is standardized when it runs.'''

    def used(self) -> torch.Tensor:
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return centred / centred.std((1, 2, 3), keepdim=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.used(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class ThroughBatchNorm(nn.Conv2d):
    '''The same, as timm writes it.'''

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class LowRank(nn.Linear):
    '''A linear layer with a low-rank addition to its weight, in a forward of its own.'''

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.zeros(2, inputs)), nn.Parameter(torch.zeros(outputs, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight + self.up @ self.down, self.bias)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight.tanh()


def parametrized(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, 'weight', Doubled())
    return layer


def old(norm: Callable[[nn.Module], nn.Module], layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return norm(layer)


COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    'own forward': lambda conv: Standardized(6, 5, 3, bias=conv.bias is not None),
    'through batch_norm': lambda conv: ThroughBatchNorm(6, 5, 3),
    'parametrization': parametrized,
    'weight_norm': nn.utils.parametrizations.weight_norm,
    'spectral_norm': nn.utils.parametrizations.spectral_norm,
    'old weight_norm': lambda conv: old(nn.utils.weight_norm, conv),
    'old spectral_norm': lambda conv: nn.utils.spectral_norm(conv),
    'pruned by torch': lambda conv: prune.l1_unstructured(conv, 'weight', 0.3),
}


class Computing(nn.Module):
    def __init__(self, layer: nn.Module, twice: bool = False):
        super().__init__()
        self.stem, self.layer, self.fc, self.twice = nn.Conv2d(3, 6, 3), layer, nn.LazyLinear(4), twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.layer(F.relu(self.stem(x))))
        if self.twice:
            x = F.relu(self.layer(F.pad(x, (0, 0, 0, 0, 0, 1))))
        return self.fc(x.flatten(1))


def baked(model: nn.Module, x: torch.Tensor) -> nn.Module:
    '''The same with a plain layer that holds the weight which was used.'''
    used: list[torch.Tensor] = []
    plain = F.conv2d

    def spy(x: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        used.append(weight.detach().clone())
        return plain(x, weight, *args, **kwargs)

    layer = model.layer
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, 'conv2d', spy)
        model(x)
    weight = next(weight for weight in used if weight.shape[:2] == (5, 6))
    conv = nn.Conv2d(6, 5, 3, bias=layer.bias is not None).double()
    conv.weight.data.copy_(weight)
    if layer.bias is not None:
        conv.bias.data.copy_(layer.bias.detach())
    reference = Computing(nn.Identity(), model.twice)
    reference.stem, reference.layer, reference.fc = model.stem, conv, model.fc
    return copy.deepcopy(reference).eval()


@pytest.mark.parametrize('twice', [False, True])
@pytest.mark.parametrize('name', RULES)
@pytest.mark.parametrize('way', COMPUTED)
def test_rules_apply_to_the_weight_that_is_used(way: str, name: str, twice: bool) -> None:
    model = Computing(COMPUTED[way](nn.Conv2d(6, 5, 3)), twice)
    x = images(3)
    model(x)
    model, x = seeded(model).double(), x.double()
    reference = baked(model, x)
    with torch.no_grad():
        assert apart(model(x), reference(x)) <= 1e-10
    rule = None if name == 'epsilon' else composite(name)
    assert apart(*(zp.heatmap(network, rule, x, labels(3)) for network in (model, reference))) <= 1e-6
    if not twice:
        before = contents(model)
        (output, found), (_, expected) = (attributed(network, name, x) for network in (model, reference))
        assert apart(output, reference(x)) <= 1e-10 and apart(found, expected) <= 1e-6
        assert same(before, contents(model))


def test_low_rank_additions_are_part_of_the_weight() -> None:
    model, x = built(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), LowRank(6, 5), nn.ReLU(), nn.Linear(5, 4))
    )
    reference = copy.deepcopy(model)
    layer = nn.Linear(6, 5).double()
    layer.weight.data, layer.bias.data = model[3].weight + model[3].up @ model[3].down, model[3].bias.data
    reference[3] = layer
    for name in RULES[:3]:
        (output, found), (expected_output, expected) = (attributed(net, name, x) for net in (model, reference))
        assert apart(output, expected_output) <= 1e-12 and apart(found, expected) <= 1e-6


def test_a_first_layer_that_computes_its_weight_gets_the_rule_of_first_layers() -> None:
    model, x = built(
        lambda: nn.Sequential(
            Standardized(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4)
        )
    )
    reference = copy.deepcopy(model)
    reference[0] = nn.Conv2d(3, 6, 3).double()
    reference[0].weight.data, reference[0].bias.data = model[0].used().detach(), model[0].bias.data
    (_, found), (_, expected) = (attributed(network, 'epsilon_gamma_box', x) for network in (model, reference))
    assert apart(found, expected) <= 1e-6


def test_rules_by_name_apply_to_the_weight_that_is_used() -> None:
    model, x = built(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), Standardized(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4)
        )
    )
    reference = copy.deepcopy(model)
    reference[2] = nn.Conv2d(6, 5, 3).double()
    reference[2].weight.data, reference[2].bias.data = model[2].used().detach(), model[2].bias.data
    found, expected = (
        zp.heatmap(network, NameMapComposite([(['0'], Epsilon()), (['2'], Gamma(0.3)), (['5'], ZPlus())]), x, labels(3))
        for network in (model, reference)
    )
    assert apart(found, expected) <= 1e-6


# --- used again


class Again(nn.Module):
    '''One layer used on three tensors, as a module or by its parameters.'''

    def __init__(self, functional: bool):
        super().__init__()
        self.stem, self.shared, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)
        self.functional = functional

    def layer(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.shared.weight, self.shared.bias, padding=1) if self.functional else self.shared(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = self.layer(x) + F.relu(self.layer(F.relu(self.layer(x))))
        return self.fc(F.relu(x).mean((2, 3)))


@pytest.mark.parametrize('name', RULES)
def test_a_parameter_used_by_several_functions(name: str) -> None:
    modular, functional = (seeded(Again(functional)).double() for functional in (False, True))
    x = images(3, dtype=torch.float64)
    left, right = (channels(model, name, x) for model in (functional, modular))
    assert list(left) == list(right)
    for group in right:
        assert apart(left[group], right[group]) <= 1e-6


class Blocks(nn.Module):
    '''A block with functions in it, called three times; and three copies of it, called once each.'''

    def __init__(self, copies: bool):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)
        self.block = nn.ModuleList([Block() for _ in range(3)]) if copies else Block()
        self.copies = copies

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        for position in range(3):
            x = (self.block[position] if self.copies else self.block)(x)
        return self.fc(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.conv(x))
        return self.act(x - y * torch.sigmoid(y.mean((2, 3), keepdim=True)))


@pytest.mark.parametrize('name', RULES)
def test_a_block_called_again(name: str) -> None:
    '''Functions in a module that is called again are told apart by the call.'''
    once, copies = seeded(Blocks(False)).double(), Blocks(True).double().eval()
    x = images(3, dtype=torch.float64)
    for module in ('stem', 'fc'):
        getattr(copies, module).load_state_dict(getattr(once, module).state_dict())
    for block in copies.block:
        block.load_state_dict(once.block.state_dict())
    rule = None if name == 'epsilon' else composite(name)
    found, expected = (zp.heatmap(model, rule, x, labels(3)) for model in (once, copies))
    assert apart(found, expected) <= 1e-6


class Iterating(nn.Module):
    '''Iterates over its children; what the canonizer adds must not be among them.'''

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(5, 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in self.children():
            x = F.leaky_relu(child(x))
        return x.flatten(1)


def test_networks_that_iterate_over_their_children_run() -> None:
    model, x = seeded(Iterating()).double(), images(3, dtype=torch.float64)
    output, found = attributed(model, 'epsilon_plus', x)
    assert apart(output, model(x)) <= 1e-12
    reference = nn.Sequential(*[layer for child in model.children() for layer in (child, nn.LeakyReLU())], nn.Flatten())
    assert apart(found, attributed(reference, 'epsilon_plus', x)[1]) <= 1e-6
    assert list(dict(model.named_children())) == ['conv1', 'conv2', 'conv3']


# --- composites that leave types without a rule


def gradient(model: nn.Module, x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x), x, start)[0]


class Everything(nn.Module):
    '''Gates, differences, sums, products, attention, norms, activations and layers by function.'''

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.other = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.fc, self.scale = nn.Linear(6, 4), nn.Parameter(torch.zeros(6, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.stem(x))
        y = F.conv2d(x, self.other.weight, self.other.bias)
        x = x + self.scale * y - y * torch.sigmoid(x) + F.avg_pool2d(x, 3, 1, 1)
        x = F.layer_norm(x.flatten(2).mT, (6,))
        x = x + self.attention(x, x, x)[0] + x * y.flatten(2).mT
        x = (x @ x.mT).softmax(-1) @ x
        return self.fc(F.relu(x).mean(1))


def test_without_rules_relevance_is_the_gradient() -> None:
    model, x = seeded(Everything()).double(), images(3, dtype=torch.float64)
    start = F.one_hot(labels(3), 4).double()
    with Composite(canonizers=[zp.GraphCanonizer(model, x)]).context(model) as modified:
        found = gradient(modified, x, start)
    assert apart(found, gradient(model, x, start)) <= 1e-12


def test_types_without_a_rule_keep_their_gradient() -> None:
    '''With a rule for sums alone, everything else is differentiated.'''

    class Summing(nn.Module):
        def __init__(self, modular: bool):
            super().__init__()
            self.stem, self.fc, self.modular, self.sum = nn.Conv2d(3, 6, 3), nn.Linear(216, 4), modular, Sum()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.silu(self.stem(x))
            y = x * torch.sigmoid(x) / 2
            return self.fc((self.sum(torch.stack([x, y], -1)) if self.modular else x + y).flatten(1))

    modular, functional = (seeded(Summing(modular)).double() for modular in (True, False))
    x, start = images(3, dtype=torch.float64), F.one_hot(labels(3), 4).double()
    composites = [LayerMapComposite([(Sum, Norm())], [zp.GraphCanonizer(model, x)]) for model in (modular, functional)]
    with composites[0].context(modular), composites[1].context(functional):
        assert apart(gradient(functional, x, start), gradient(modular, x, start)) <= 1e-9


class Rectified(nn.Module):
    '''ReLUs as modules or as functions, and an addition.'''

    def __init__(self, functional: bool):
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 1, 3, padding=1), nn.Linear(6, 4)
        self.first, self.last = (F.relu, torch.relu) if functional else (nn.ReLU(), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.stem(x))
        return self.fc(self.last(self.conv(x) - x).mean((2, 3)))


def test_guided_backprop_sees_functional_activations() -> None:
    modular, functional = (seeded(Rectified(functional)).double() for functional in (False, True))
    x, start = images(3, dtype=torch.float64), F.one_hot(labels(3), 4).double()
    with GuidedBackprop().context(modular) as modified:
        expected = gradient(modified, x, start)
    with GuidedBackprop(canonizers=[zp.GraphCanonizer(functional, x)]).context(functional) as modified:
        found = gradient(modified, x, start)
    assert apart(found, expected) <= 1e-12
    assert apart(found, gradient(functional, x, start)) > 0.1


def test_batchnorm_may_go_without_a_rule() -> None:
    '''A composite for layers alone differentiates gates and norms.'''
    model, x = built(lambda: PreActivation(nn.Conv2d(6, 5, 3, padding=1)))
    without = LayerMapComposite(
        [entry for entry in layer_map_base() if entry[0] is not BatchNorm] + [(Linear, Epsilon())],
        [zp.GraphCanonizer(model, x)],
    )
    with rules('epsilon', model, x).context(model) as modified:
        passed = gradient(modified, x, F.one_hot(labels(3), 4).double())
    with without.context(model) as modified:
        differentiated = gradient(modified, x, F.one_hot(labels(3), 4).double())
    assert apart(passed, differentiated) > 1e-3

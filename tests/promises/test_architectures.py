'''Real architectures: pruned exactly, nearly everywhere, at a cost that was predicted.'''
from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from oracles.oracle import assert_rows, silenced
from small import apart, drawn_of
from torch import nn

import zennit_prune as zp
from zennit_prune.planning._cost import CostModel

# the share of parameters that hold removable channels, which may not shrink: locking is no way to be exact
SHARES = {
    'vgg16': (64, 1.0), 'vgg16_bn': (64, 1.0), 'resnet18': (64, 0.9999), 'resnet50': (64, 1.0),
    'resnext50_32x4d': (64, 1.0), 'densenet121': (64, 0.9999), 'googlenet': (96, 0.9998),
    'inception_v3': (299, 0.9999), 'squeezenet1_0': (64, 0.9992),
    'shufflenet_v2_x1_0': (64, 0.9996), 'mobilenet_v2': (64, 0.9997), 'mobilenet_v3_small': (64, 0.9996),
    'mnasnet1_0': (64, 0.9998), 'efficientnet_b0': (64, 0.9998), 'regnet_y_400mf': (64, 0.9998),
    'convnext_tiny': (64, 0.9061), 'swin_t': (64, 0.6105), 'vit_b_16': (224, 0.6545),
}
AUXILIARY = ('googlenet', 'inception_v3')


def built(name: str) -> nn.Module:
    '''A network with random weights whose every channel matters: norms, layer scales and heads are not near zero.'''
    torch.manual_seed(0)
    options = {'init_weights': True} if name in AUXILIARY else {}
    model = getattr(torchvision.models, name)(weights=None, **options).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith('layer_scale'):
                parameter.uniform_(0.5, 1)
            elif parameter_name.startswith('heads.'):
                parameter.normal_(0, 0.05)
    return model


@pytest.fixture(params=SHARES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_pruned_exactly_and_nearly_everywhere(name: str) -> None:
    size, share = SHARES[name]
    model, example = built(name), torch.zeros(1, 3, size, size, dtype=torch.float64)
    graph = zp.trace(model, example)
    held = {member.parameter for group in graph.groups for member in group.members}
    numbers = {key: value.numel() for key, value in model.named_parameters()}
    assert sum(numbers[key] for key in held & set(numbers)) / sum(numbers.values()) >= share - 0.0101

    rng = np.random.default_rng(0)
    removed = {group.name: drawn_of(group, rng, max(group.step, group.size // 2))
               for group in graph.groups if group.size > group.step}
    plan = zp.Plan(graph, removed)
    small = plan.apply(model, verify=False)
    assert type(small) is type(model)
    assert zp.verify(model, small, plan, example) <= 1e-10
    cost, predict = zp.cost(small, example), CostModel(graph)
    lost = np.array([len(plan.removed.get(group.name, ())) for group in graph.groups], float)
    for unit in ('params', 'flops', 'bytes'):
        assert predict(unit, lost) == pytest.approx(getattr(cost, unit), abs=0.5)

    if name in AUXILIARY:  # heads that run in training only are pruned along
        assert any('aux' in key.lower() for key in plan.removed)
        small.train()(torch.randn(2, 3, size, size, dtype=torch.float64)).logits.sum().backward()


@pytest.mark.parametrize('name', ['squeezenet1_0', 'shufflenet_v2_x1_0', 'mobilenet_v3_small', 'regnet_y_400mf'])
def test_an_oracle_that_knows_values_only_agrees(name: str) -> None:
    model, x = built(name), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-6 * torch.randn_like(parameter))  # no two numbers are equal
    graph, rng = zp.trace(model, x), np.random.default_rng(0)
    plan = zp.Plan(graph, {group.name: drawn_of(group, rng, group.size // 2) for group in graph.groups})
    small = plan.apply(model, verify=False)
    assert_rows(model, small, plan)
    with torch.no_grad():
        expected = silenced(model, small)(x)
        assert apart(small(x), expected) <= 1e-12
        assert apart(model(x), expected) > 1e-3


def test_last_layer_is_locked_as_an_output(name: str) -> None:
    size, _ = SHARES[name]
    graph = zp.trace(built(name), torch.zeros(1, 3, size, size, dtype=torch.float64))
    assert any('output of the network' in reason for reason in graph.locked.values())
    assert str(graph).count('\n') >= len(graph.groups)

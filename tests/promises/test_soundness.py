'''Relevance is sound on the networks that people use, whatever they are written with.'''

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from small import apart, contents, labels, same
from torch import nn
from zennit.composites import EpsilonPlus
from zennit.core import Composite

import zennit_prune as zp
from zennit_prune.relevance._outputs import chosen_output
from zennit_prune.relevance._preflight import preflight

FAST = ['squeezenet1_1', 'mobilenet_v3_small', 'shufflenet_v2_x0_5', 'mnasnet0_5', 'regnet_y_400mf']
SLOW = [
    'alexnet',
    'convnext_tiny',
    'densenet121',
    'efficientnet_b0',
    'googlenet',
    'inception_v3',
    'mobilenet_v2',
    'resnet18',
    'resnext50_32x4d',
    'vgg11_bn',
]
SEGMENTATION = ['lraspp_mobilenet_v3_large', 'deeplabv3_mobilenet_v3_large', 'fcn_resnet50']
# softmax and cancelling sums let the mass grow with depth, and what rounding leaves of it grows alike
TRANSFORMERS = ['vit_b_16', 'swin_t', 'swin_v2_t', 'maxvit_t']
TIMM = [
    'cait_xxs24_224',
    'coatnet_nano_rw_224',
    'convmixer_768_32',
    'convnextv2_atto',
    'cspresnet50',
    'dla34',
    'dpn48b',
    'eca_nfnet_l0',
    'edgenext_xx_small',
    'efficientformer_l1',
    'efficientvit_b0',
    'ese_vovnet19b_dw',
    'fastvit_t8',
    'focalnet_tiny_srf',
    'gcvit_xxtiny',
    'ghostnet_050',
    'gmlp_ti16_224',
    'hrnet_w18_small',
    'inception_next_tiny',
    'mixer_s32_224',
    'mobilenetv4_conv_small',
    'mobilevit_xxs',
    'poolformer_s12',
    'pvt_v2_b0',
    'repvit_m1',
    'res2net50_14w_8s',
    'resmlp_12_224',
    'resnest14d',
    'resnetv2_50',
    'rexnet_100',
    'skresnet18',
    'starnet_s1',
    'swiftformer_xs',
    'tiny_vit_5m_224',
    'twins_svt_small',
    'visformer_tiny',
    'vit_tiny_patch16_224',
]


def settled(model: nn.Module, x: torch.Tensor) -> nn.Module:
    '''BatchNorm statistics of the data and no parameter that is zero, as in a trained network.'''
    generator = torch.Generator().manual_seed(0)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        model(x)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
            elif name.startswith('head'):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model.eval()


def built(build: Callable[[], nn.Module], size: int = 64) -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = build().double(), torch.randn(2, 3, size, size, dtype=torch.float64)
    return settled(model, x), x


def classifier(name: str) -> tuple[nn.Module, torch.Tensor]:
    options = {
        'googlenet': {'aux_logits': False},
        'inception_v3': {'aux_logits': False},
        'vit_b_16': {'image_size': 64},
    }
    size = {'inception_v3': 96, 'maxvit_t': 224}.get(name, 64)
    if name in ('googlenet', 'inception_v3'):
        options[name]['init_weights'] = False
    return built(
        lambda: torchvision.models.get_model(name, weights=None, num_classes=10, **options.get(name, {})), size
    )


def assert_sound(model: nn.Module, x: torch.Tensor, bound: float = 0.01, collects: bool = True) -> None:
    '''Output and network are kept; nothing is made between layers; channels can be scored.'''
    with torch.no_grad():
        expected = chosen_output(model(x))
        before = contents(model)
        with Composite(canonizers=[zp.GraphCanonizer(model, x)]).context(model) as modified:
            assert apart(chosen_output(modified(x)), expected) <= 1e-10
        assert same(before, contents(model))
    pruner = zp.Pruner(model, None, x)
    recording = pruner.graph._recording
    for rules in (pruner.composite, EpsilonPlus()):
        found = preflight(model, rules, recording, x)
        mass = max(stage.l1_norm for stage in found.stages)
        assert not any('unsound' in problem for problem in found.problems), found.problems
        share = 1e-5 if isinstance(rules, EpsilonPlus) else 1e-4  # stabilizers take a share of what cancels
        assert all(abs(stage.conservation_error) <= max(bound, share * mass) for stage in found.stages), str(found)
    if collects:
        target: Any = labels(2) if expected.dim() == 2 else 'predicted'
        relevance = pruner.collect([(x, target)], progress=False)
        assert all(torch.isfinite(values).all() for _, values in relevance.items())
    assert same(before, contents(model))


@pytest.mark.parametrize('name', FAST)
def test_small_classifiers(name: str) -> None:
    assert_sound(*classifier(name))


@pytest.mark.parametrize('transformer', [torchvision.models.VisionTransformer, torchvision.models.SwinTransformer])
def test_small_transformers(transformer: Any) -> None:
    options: dict[Any, dict[str, Any]] = {
        torchvision.models.VisionTransformer: {
            'image_size': 16,
            'patch_size': 8,
            'num_layers': 2,
            'num_heads': 2,
            'hidden_dim': 16,
            'mlp_dim': 32,
        },
        torchvision.models.SwinTransformer: {
            'patch_size': [4, 4],
            'embed_dim': 16,
            'depths': [2, 2],
            'num_heads': [2, 4],
            'window_size': [2, 2],
        },
    }
    assert_sound(*built(lambda: transformer(num_classes=4, **options[transformer]), 16), collects=False)


@pytest.mark.slow
@pytest.mark.parametrize('name', SLOW)
def test_classifiers(name: str) -> None:
    assert_sound(*classifier(name))


@pytest.mark.slow
@pytest.mark.parametrize('name', SEGMENTATION)
def test_segmentation(name: str) -> None:
    def build() -> nn.Module:
        return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5)

    model, x = built(build)
    assert_sound(model, x)


@pytest.mark.slow
@pytest.mark.parametrize('name', TRANSFORMERS)
def test_transformers(name: str) -> None:
    assert_sound(*classifier(name))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('timm') is None, reason='timm is not installed')
@pytest.mark.parametrize('name', TIMM)
def test_timm(name: str) -> None:
    import timm

    config = timm.create_model(name).default_cfg
    least = (config.get('min_input_size') or (3, 64, 64))[-1]
    size = config['input_size'][-1] if config.get('fixed_input_size') or least > 64 else 64
    assert_sound(*built(lambda: timm.create_model(name, num_classes=10), size), collects=False)

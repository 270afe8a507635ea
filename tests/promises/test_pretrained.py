'''Real pretrained networks on real images; skipped where they are not at hand.'''
from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import zennit_prune as zp
from zennit_prune.relevance._criteria import CRITERIA

DATA = Path(os.environ.get('ZENNIT_PRUNE_DATA', Path(__file__).resolve().parents[3] / 'shared' / 'data'))
# networks by the share of parameters that hold removable channels
SHARES = {'resnet20_cifar10': 0.998, 'resnet56_cifar10': 0.999, 'resnet8_mlperftiny_cifar10': 0.998,
          'mobilenet_v1_0.75_224_imagenet': 0.999}


@pytest.fixture(scope='module')
def loaders() -> ModuleType:
    if not (DATA / 'loaders.py').exists():
        pytest.skip('no pretrained networks here: set ZENNIT_PRUNE_DATA to the folder that holds them')
    sys.path.insert(0, str(DATA))
    import loaders
    return loaders


def references(loaders: ModuleType, name: str, per_class: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    if 'cifar' in name:
        images, labels = loaders.cifar10('train_5k')
    else:
        images, labels = loaders.zipped_images('imagenette160_train1000', 224, 224)
    chosen = torch.cat([torch.nonzero(labels == label).flatten()[:per_class] for label in labels.unique()])
    return images[chosen], labels[chosen]


@pytest.mark.parametrize('name', SHARES)
def test_exact_in_both_precisions(loaders: ModuleType, name: str) -> None:
    network, preprocess = loaders.load(name)
    images, labels = references(loaders, name, 2)
    pruner = zp.Pruner(network, None, preprocess(images[:1]))
    held = {member.parameter for group in pruner.graph.groups for member in group.members}
    numbers = {key: value.numel() for key, value in network.named_parameters()}
    assert sum(numbers[key] for key in held & set(numbers)) / sum(numbers.values()) >= SHARES[name]
    plan = pruner.plan(pruner.collect((preprocess(images), labels), progress=False), zp.Budget(flops=0.8))
    small = plan.apply(network)
    assert zp.cost(small, preprocess(images[:1])).flops <= 0.8 * zp.cost(network, preprocess(images[:1])).flops
    masked = plan.masked(network)
    with torch.no_grad():
        expected, found = masked(preprocess(images[:8])), small(preprocess(images[:8]))
    assert float((expected - found).abs().max() / expected.abs().max()) <= 1e-4
    network.double()
    assert zp.verify(network, plan.apply(network, verify=False), plan, preprocess(images[:1]).double()) <= 1e-10


def test_relevance_beats_chance(loaders: ModuleType) -> None:
    network, preprocess = loaders.load('resnet56_cifar10')
    images, labels = references(loaders, 'resnet56_cifar10')
    test, truth = (part[:500] for part in loaders.cifar10('test_5k'))

    def accuracy(plan: zp.Plan) -> float:
        with torch.no_grad():
            return float((plan.apply(network, verify=False)(preprocess(test)).argmax(1) == truth).float().mean())

    pruner = zp.Pruner(network, None, preprocess(images[:1]))
    relevance = pruner.collect((preprocess(images), labels), progress=False)
    chance = max(accuracy(pruner.plan(pruner.collect((), 'random', seed=seed), zp.Budget(flops=0.8)))
                 for seed in range(5))
    assert accuracy(pruner.plan(relevance, zp.Budget(flops=0.8))) > chance


def test_step_by_step_with_training_down_to_a_floor(loaders: ModuleType) -> None:
    network, preprocess = loaders.load('resnet20_cifar10')
    images, labels = references(loaders, 'resnet20_cifar10')
    x, (test, truth) = preprocess(images), (part[:500] for part in loaders.cifar10('test_5k'))
    test = preprocess(test)

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(test).argmax(1) == truth).float().mean())

    def learned(model: nn.Module) -> nn.Module:
        return zp.finetune(model, x, 2, teacher=network, progress=False)

    pruner = zp.Pruner(network, None, x[:1])
    plain, trained = (
        pruner.iterate((x, labels), zp.Budget(flops=0.6), 0.1, finetune=tune, repair='batchnorm', evaluate=accuracy,
                       progress=False) for tune in (None, learned)
    )  # fmt: skip
    assert accuracy(trained.model) == trained.history[-1].evaluation > max(0.6, plain.history[-1].evaluation - 0.02)
    assert len(plain.history) == 5 and all(step.reliability > 0.7 for step in plain.history[1:])
    with pytest.warns(zp.PruneWarning, match='below min_score=0.9'):
        good = pruner.iterate((x, labels), zp.Budget(flops=0.3), 0.1, repair='batchnorm', evaluate=accuracy,
                              min_score=0.9, progress=False)
    assert accuracy(good.model) == good.history[-1].evaluation >= 0.9


@pytest.mark.parametrize('criterion', [name for name in CRITERIA if name != 'relevance'])
@pytest.mark.parametrize('name', ['resnet20_cifar10', 'mobilenet_v1_0.75_224_imagenet'])
def test_every_criterion(loaders: ModuleType, name: str, criterion: str) -> None:
    network, preprocess = loaders.load(name)
    images, labels = references(loaders, name, 1)
    pruner = zp.Pruner(network, None, preprocess(images[:1]))
    relevance = pruner.collect((preprocess(images), labels), criterion, progress=False)
    assert list(relevance) == [group.name for group in pruner.graph.groups]
    assert all((values > 0).any() for _, values in relevance.items())
    small = pruner.plan(relevance, zp.Budget(flops=0.8)).apply(network)
    with torch.no_grad():
        assert torch.isfinite(small(preprocess(images[:2]))).all()

'''Does relevance choose better channels than chance, with nothing repaired and nothing trained?

At 80 % of the FLOPs, ten reference images a class: epsilon relevance (three draws of references) against five random
plans, on a ResNet-56 for CIFAR-10 and a MobileNetV1 for ImageNet. Also: the pruned network against the masked one in
float64 and float32. The networks and images are found in the folder that ``ZENNIT_PRUNE_DATA`` names, with its
``loaders.py``.

    python benchmarks/selection.py
'''
from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

import torch

import zennit_prune as zp

DATA = Path(os.environ.get('ZENNIT_PRUNE_DATA', Path(__file__).resolve().parents[2] / 'shared' / 'data'))
BUDGET = zp.Budget(flops=0.8)


def accuracy(network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, preprocess) -> float:
    '''The share of correct predictions.'''
    hits = 0
    with torch.inference_mode():
        for part, truth in zip(images.split(100), labels.split(100)):
            hits += int((network(preprocess(part)).argmax(1) == truth).sum())
    return hits / len(images)


def draw(labels: torch.Tensor, per_class: int, seed: int) -> torch.Tensor:
    '''So many random indices of every class.'''
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([index[torch.randperm(len(index), generator=generator)[:per_class]]
                      for index in (torch.nonzero(labels == label).flatten() for label in labels.unique())])


def compare(name: str, network, preprocess, references, test) -> None:
    '''Print accuracies of relevance and of chance, and the errors of exactness.'''
    images, labels = references
    example = preprocess(images[:1])
    pruner = zp.Pruner(network, None, example)
    print(f'{name}: unpruned {accuracy(network, *test, preprocess):.1%}')
    for per_cost in (True, False):
        ours, chance = [], []
        for seed in range(3):
            chosen = draw(labels, 10, seed)
            batches = [(preprocess(images[index]), labels[index]) for index in chosen.split(20)]
            plan = pruner.plan(pruner.collect(batches), BUDGET, per_cost=per_cost)
            ours.append(accuracy(plan.apply(network), *test, preprocess))
        for seed in range(5):
            random = pruner.plan(pruner.collect((), 'random', seed=seed), BUDGET, per_cost=per_cost)
            chance.append(accuracy(random.apply(network), *test, preprocess))
        each, others = (', '.join(f'{share:.1%}' for share in shares) for shares in (ours, chance))
        mean = statistics.mean(ours)
        print(f'  score per cost: {per_cost}: relevance {mean:.1%} ({each}), random {others}', flush=True)
        for dtype in (torch.float64, torch.float32):
            model = pruner.model.to(dtype)
            error = zp.verify(model, plan.apply(model, verify=False), plan, example.to(dtype))
            print(f'  pruned against masked, {dtype}: {error:.2g}')
        pruner.model.float()


def main() -> None:
    '''Both networks.'''
    if not (DATA / 'loaders.py').exists():
        sys.exit(f'no loaders.py in {DATA}: set ZENNIT_PRUNE_DATA.')
    sys.path.insert(0, str(DATA))
    import loaders
    network, preprocess = loaders.load('resnet56_cifar10')
    compare('ResNet-56', network, preprocess, loaders.cifar10('train_5k'), loaders.cifar10('test_5k'))
    network, preprocess = loaders.load('mobilenet_v1_0.75_224_imagenet')
    images, labels = loaders.zipped_images('imagenette160_train1000', 224, 224)
    test = loaders.zipped_images('imagenet_samples_even', 256, 224)
    compare('MobileNetV1 0.75', network, preprocess, (images, labels), test)


if __name__ == '__main__':
    main()

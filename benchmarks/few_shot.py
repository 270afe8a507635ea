'''How much accuracy is left with ten images a class, no labels in the repair and no training?

The mean and the spread over draws of references, at a share of the FLOPs. ResNets on 5,000 test images of CIFAR-10;
MobileNetV1 0.75 on the classes of Imagenette (references and a disjoint part for evaluation, logits of other classes
left out). The networks and images are found in the folder that ``ZENNIT_PRUNE_DATA`` names, with its ``loaders.py``.

    python benchmarks/few_shot.py                # relevance and refit, all networks, five draws
    python benchmarks/few_shot.py cross          # ResNet-56 at half of the FLOPs: criteria by repairs
'''
from __future__ import annotations

import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

import zennit_prune as zp

DATA = Path(os.environ.get('ZENNIT_PRUNE_DATA', Path(__file__).resolve().parents[2] / 'shared' / 'data'))
sys.path.insert(0, str(DATA))
import loaders  # noqa: E402

DRAWS = range(int(os.environ.get('DRAWS', 5)))
ROWS = [('resnet56_cifar10', 10, (0.7, 0.5, 0.35)), ('resnet56_cifar10', 1, (0.5,)),
        ('resnet20_cifar10', 10, (0.7, 0.5, 0.35)), ('resnet8_mlperftiny_cifar10', 10, (0.7, 0.5)),
        ('mobilenet_v1_0.75_224_imagenet', 10, (0.6, 0.45))]
Accuracy = Callable[[nn.Module], float]


def draw(labels: torch.Tensor, per_class: int, seed: int) -> torch.Tensor:
    '''So many random indices of every class, in random order.'''
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.cat([index[torch.randperm(len(index), generator=generator)[:per_class]]
                        for index in (torch.nonzero(labels == label).flatten() for label in labels.unique())])
    return chosen[torch.randperm(len(chosen), generator=generator)]


def accuracy_on(batches: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]], classes: torch.Tensor) -> Accuracy:
    '''The share of correct predictions among some classes, in percent.'''
    def accuracy(network: nn.Module) -> float:
        hits = count = 0
        with torch.inference_mode():
            for images, labels in batches():
                hits += int((classes[network(images)[:, classes].argmax(1)] == labels).sum())
                count += len(labels)
        return 100 * hits / count
    return accuracy


def setting(name: str, per_class: int, seed: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor, Accuracy]:
    '''A network, references with labels, and how to evaluate it.'''
    network, preprocess = loaders.load(name)
    if name.startswith('mobilenet'):
        images, labels = loaders.zipped_images('imagenette160_train1000', size=224, crop=224)
        chosen = draw(labels, per_class, seed)
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[chosen] = False
        test, truth = images[rest][::2], labels[rest][::2]
    else:
        images, labels = loaders.cifar10('train_5k')
        chosen = draw(labels, per_class, seed)
        test, truth = loaders.cifar10('test_5k')

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for part, answer in zip(test.split(50), truth.split(50)):
            yield preprocess(part), answer

    return network, preprocess(images[chosen]), labels[chosen], accuracy_on(batches, labels.unique())


def summary(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f'{statistics.mean(values):.1f} ± {spread:.1f}'


def main() -> None:
    print('| network | images a class | unpruned | FLOPs left | unrepaired | refitted | scores, s | refit, s |')
    print('| --- | --- | --- | --- | --- | --- | --- | --- |')
    for name, per_class, budgets in ROWS:
        found: dict[float, list[tuple[float, ...]]] = {budget: [] for budget in budgets}
        whole = []
        for seed in DRAWS:
            network, images, labels, accuracy = setting(name, per_class, seed)
            if not whole or name.startswith('mobilenet'):
                whole.append(accuracy(network))
            pruner = zp.Pruner(network, None, images[:1])
            start = time.perf_counter()
            relevance = pruner.collect((images, labels), progress=False)
            scored = time.perf_counter() - start
            for budget in budgets:
                plan = pruner.plan(relevance, zp.Budget(flops=budget))
                small = plan.apply(network)
                start = time.perf_counter()
                repaired = zp.repair(small, network, plan, images, progress=False)
                seconds = time.perf_counter() - start
                found[budget].append((accuracy(small), accuracy(repaired), scored, seconds))
        for budget, values in found.items():
            columns = list(zip(*values))
            print(f'| {name} | {per_class} | {statistics.mean(whole):.1f} | {budget:.0%} | '
                  f'{" | ".join(summary(list(column)) for column in columns[:2])} | '
                  f'{" | ".join(f"{statistics.median(column):.1f}" for column in columns[2:])} |', flush=True)


def cross() -> None:
    repairs = ('none', 'bias', 'batchnorm', 'refit')
    print(f'| criterion | {" | ".join(repairs)} |\n| --- |{" --- |" * len(repairs)}')
    for criterion in ('relevance', 'taylor', 'l1', 'random', 'paper'):
        found: dict[str, list[float]] = {repair: [] for repair in repairs}
        for seed in DRAWS:
            network, images, labels, accuracy = setting('resnet56_cifar10', 10, seed)
            paper = criterion == 'paper'
            pruner = zp.Pruner(network, zp.presets.paper.composite() if paper else None, images[:1])
            relevance = pruner.collect((images, labels), 'relevance' if paper else criterion, seed=seed,
                                       aggregate='signed' if paper else 'auto', progress=False)
            plan = pruner.plan(relevance, zp.Budget(flops=0.5), per_cost=not paper)
            small = plan.apply(network)
            for repair in repairs:
                found[repair].append(accuracy(zp.repair(small, network, plan, images, repair, progress=False)))
        print(f'| {criterion} | {" | ".join(summary(values) for values in found.values())} |', flush=True)


if __name__ == '__main__':
    torch.set_num_threads(1)
    warnings.simplefilter('ignore', zp.PruneWarning)
    cross() if sys.argv[1:] == ['cross'] else main()

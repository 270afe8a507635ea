'''How much accuracy is left with ten images a class, no labels in the repair and no training?

The mean and the spread over draws of references, at a share of the FLOPs. ResNets on 5,000 test images of CIFAR-10;
MobileNetV1 0.75 on the classes of Imagenette (references and a disjoint part for evaluation, logits of other classes
left out). The networks and images are found in the folder that ``ZENNIT_PRUNE_DATA`` names, with its ``loaders.py``.

    python benchmarks/few_shot.py rows           # relevance and refit, all networks, five draws
    python benchmarks/few_shot.py cross          # ResNet-56 at half of the FLOPs: criteria by repairs, Torch-Pruning
    python benchmarks/few_shot.py criteria       # the other networks and budgets: criteria, refitted, two draws
    python benchmarks/few_shot.py streams        # ResNet-8 with the channels of its residual stream kept, or not
    python benchmarks/few_shot.py table          # what was measured, as tables
    python benchmarks/few_shot.py plot           # the same as a picture

What was measured is appended to ``few_shot.jsonl`` and not measured again.
'''
from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import zennit_prune as zp

DATA = Path(os.environ.get('ZENNIT_PRUNE_DATA', Path(__file__).resolve().parents[2] / 'shared' / 'data'))
sys.path.insert(0, str(DATA))
import loaders  # noqa: E402

OUT = Path(os.environ.get('FEW_SHOT', 'few_shot.jsonl'))
DRAWS = range(int(os.environ.get('DRAWS', 5)))
NETWORKS = {'ResNet-56': 'resnet56_cifar10', 'ResNet-20': 'resnet20_cifar10', 'ResNet-8': 'resnet8_mlperftiny_cifar10',
            'MobileNetV1': 'mobilenet_v1_0.75_224_imagenet'}
ROWS = [('ResNet-56', 10, (0.7, 0.5, 0.35)), ('ResNet-56', 1, (0.5,)), ('ResNet-20', 10, (0.7, 0.5, 0.35)),
        ('ResNet-8', 10, (0.7, 0.5)), ('MobileNetV1', 10, (0.6, 0.45))]
OTHERS = ('taylor', 'l1', 'l1 uniform', 'random', 'paper')
REPAIRS = ('none', 'bias', 'batchnorm', 'refit')
PEERS = ('L1', 'L2', 'LAMP', 'Taylor')
Accuracy = Callable[[nn.Module], float]


class Case(NamedTuple):
    '''What is measured; ``kept``: patterns of layers whose channels stay, as text; ``cost``: what is left a part of.'''

    network: str
    per_class: int
    draw: int
    left: float
    criterion: str
    repair: str
    kept: str = ''
    cost: str = 'flops'


def draw(labels: torch.Tensor, per_class: int, seed: int) -> torch.Tensor:
    '''So many random indices of every class, in random order.'''
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.cat([index[torch.randperm(len(index), generator=generator)[:per_class]]
                        for index in (torch.nonzero(labels == label).flatten() for label in labels.unique())])
    return chosen[torch.randperm(len(chosen), generator=generator)]


def accuracy_on(batches: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]], classes: torch.Tensor) -> Accuracy:
    '''The share of correct predictions among some classes, in percent.'''
    def accuracy(network: nn.Module) -> float:
        right = count = 0
        with torch.no_grad():
            for inputs, labels in batches():
                right += int((classes[network(inputs)[:, classes].argmax(1)] == labels).sum())
                count += len(labels)
        return 100 * right / count

    return accuracy


def setting(name: str, per_class: int, seed: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor, Accuracy]:
    '''A network, references with labels, and what measures accuracy.'''
    network, preprocess = loaders.load(NETWORKS.get(name, name))
    if 'mobilenet' in NETWORKS.get(name, name):
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


def scored(pruner: zp.Pruner, images: torch.Tensor, labels: torch.Tensor, criterion: str, seed: int) -> zp.Relevance:
    '''The scores of a criterion; uniform ones are ranks within the layer.'''
    if criterion == 'paper':
        return pruner.collect((images, labels), aggregate='signed', progress=False)
    relevance = pruner.collect((images, labels), criterion.split()[0], seed=seed, progress=False)
    if criterion.endswith('uniform'):
        return zp.Relevance({name: values.argsort().argsort().double() / len(values)
                             for name, values in relevance.items()})
    return relevance


def measured(cases: Sequence[Case]) -> Iterator[tuple[Case, dict[str, float]]]:
    '''Accuracy, CPU seconds and peak memory in GiB of cases that differ in repair alone.'''
    case = cases[0]
    network, images, labels, accuracy = setting(case.network, case.per_class, case.draw)
    composite = zp.presets.paper.composite() if case.criterion == 'paper' else None
    pruner = zp.Pruner(network, composite, images[:1], ignore=case.kept.split())
    start = time.process_time()
    relevance = scored(pruner, images, labels, case.criterion, case.draw)
    seconds = time.process_time() - start
    plan = pruner.plan(relevance, zp.Budget(**{case.cost: case.left}),
                       per_cost=case.criterion != 'paper' and not case.criterion.endswith('uniform'))
    small = plan.apply(network)
    for each in cases:
        start = time.process_time()
        repaired = zp.repair(network, small, plan, images, each.repair, progress=False)
        passed = time.process_time() - start
        yield each, {'accuracy': accuracy(repaired), 'scores': seconds, 'repair': passed,
                     'memory': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20}


def peers(case: Case) -> Iterator[tuple[Case, dict[str, float]]]:
    '''Torch-Pruning at the same FLOPs, as it is and with BatchNorm estimated anew on the references.'''
    import torch_pruning as tp

    network, images, labels, accuracy = setting(case.network, case.per_class, case.draw)
    whole = zp.cost(network, images[:1]).flops
    for name in PEERS:
        for everywhere in (False, True):
            importance = {'L1': lambda: tp.importance.MagnitudeImportance(p=1),
                          'L2': lambda: tp.importance.MagnitudeImportance(p=2),
                          'LAMP': tp.importance.LAMPImportance, 'Taylor': tp.importance.TaylorImportance}[name]()
            low, high, best = 0.0, 0.95, None
            for _ in range(8):  # the least share of channels that reaches the budget
                middle = (low + high) / 2
                small = deepcopy(network)
                for parameter in small.parameters():
                    parameter.requires_grad_(True)
                ignored = [module for module in small.modules() if isinstance(module, nn.Linear)]
                pruner = tp.pruner.BasePruner(small, images[:1], importance, global_pruning=everywhere,
                                              pruning_ratio=middle, ignored_layers=ignored)
                if name == 'Taylor':
                    nn.functional.cross_entropy(small(images), labels).backward()
                pruner.step()
                small.zero_grad()
                if zp.cost(small, images[:1]).flops <= case.left * whole:
                    high, best = middle, small
                else:
                    low = middle
            if best is None:
                continue
            label = f'Torch-Pruning {name}{", global" * everywhere}'
            best.eval()
            yield case._replace(criterion=label, repair='none'), {'accuracy': accuracy(best)}
            for module in best.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.reset_running_stats()
                    module.momentum = None
            with torch.no_grad():
                best.train()(images)
            yield case._replace(criterion=label, repair='batchnorm'), {'accuracy': accuracy(best.eval())}


def known() -> dict[Case, dict[str, float]]:
    lines = OUT.read_text().splitlines() if OUT.exists() else []
    return {Case(*case): found for case, found in map(json.loads, lines)}


def run(cases: Iterable[Case]) -> None:
    '''Measure what is not known yet.'''
    done = known()
    together: defaultdict[Case, list[Case]] = defaultdict(list)
    for case in cases:
        if case not in done:
            together[case._replace(repair='')].append(case)
    for some in together.values():
        for case, found in measured(some):
            keep(case, found)


def keep(case: Case, found: dict[str, float]) -> None:
    with OUT.open('a') as file:
        file.write(json.dumps([case, found]) + '\n')
    print(*case, {key: round(value, 2) for key, value in found.items()}, flush=True)


def summary(values: list[float]) -> str:
    return f'{statistics.mean(values):.1f}' + (f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else '')


def table() -> None:
    found: defaultdict[Any, list[dict[str, float]]] = defaultdict(list)
    for case, values in known().items():
        found[case._replace(draw=0)].append(values)
    print('| network | a class | left | of | criterion | kept | repair | accuracy | draws | scores, s | repair, s |')
    print('| --- |' + ' --- |' * 10)
    for case, values in sorted(found.items()):
        seconds = [f'{statistics.median([each[key] for each in values]):.1f}' if key in values[0] else ''
                   for key in ('scores', 'repair')]
        print(f'| {case.network} | {case.per_class} | {case.left:.0%} | {case.cost} | {case.criterion} '
              f'| {case.kept} | {case.repair} | {summary([each["accuracy"] for each in values])} | {len(values)} '
              f'| {" | ".join(seconds)} |')


def plot() -> None:
    from matplotlib.figure import Figure

    found: defaultdict[tuple[str, str], dict[float, list[float]]] = defaultdict(dict)
    for case, values in known().items():
        if case.per_class == 10 and case.repair == 'refit' and not case.kept and case.cost == 'flops':
            found[case.network, case.criterion].setdefault(case.left, []).append(values['accuracy'])
    networks = [name for name in NETWORKS if (name, 'relevance') in found]
    figure = Figure((3 * len(networks), 3.2), layout='constrained')
    for axes, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks):
        for criterion in ('relevance', *OTHERS):
            points = sorted(found[network, criterion].items())
            if points:
                axes.errorbar([100 * left for left, _ in points], [statistics.mean(values) for _, values in points],
                              [statistics.pstdev(values) for _, values in points], marker='.', label=criterion,
                              linewidth=2 if criterion == 'relevance' else 1)
        axes.set(title=network, xlabel='FLOPs left, %')
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel('accuracy, %')
    figure.axes[0].legend(fontsize='small')
    figure.savefig('few_shot.png', dpi=110)


def main(mode: str) -> None:
    rows = [Case(name, per_class, seed, left, 'relevance', 'refit') for name, per_class, budgets in ROWS
            for seed in DRAWS for left in budgets]
    if mode == 'rows':
        run(rows)
    elif mode == 'cross':
        run(Case('ResNet-56', 10, seed, 0.5, criterion, repair) for seed in DRAWS
            for criterion in ('relevance', *OTHERS) for repair in REPAIRS)
        for seed in DRAWS[:2]:
            for case, found in peers(Case('ResNet-56', 10, seed, 0.5, '', '')):
                keep(case, found)
    elif mode == 'criteria':
        run(case._replace(criterion=criterion) for case in rows if case.draw < 2 for criterion in OTHERS)
    elif mode == 'streams':
        kept = ' '.join(streams('ResNet-8'))  # MobileNetV1 has none
        run(Case('ResNet-8', 10, seed, left, 'relevance', 'refit', which, cost) for seed in DRAWS
            for cost in ('flops', 'latency_fraction') for left in (0.8, 0.7, 0.6) for which in ('', kept))
    elif mode == 'table':
        table()
    elif mode == 'plot':
        plot()
    else:
        raise SystemExit(__doc__)


def streams(network: str) -> list[str]:
    '''The layers whose channels several layers bring forth or read.'''
    model, images, _, _ = setting(network, 1, 0)
    graph = zp.trace(model, images[:1])
    return [layer for group in graph.groups for layer in group.layers('producer')
            if len(group.layers('producer')) + len(group.layers('consumer')) > 2]


if __name__ == '__main__':
    torch.set_num_threads(1)
    warnings.simplefilter('ignore', zp.PruneWarning)
    main(' '.join(sys.argv[1:]))

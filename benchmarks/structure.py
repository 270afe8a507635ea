'''CPU seconds to find and remove channels, side by side with Torch-Pruning in one run, on one thread.

Ours: ``trace``, a plan for half of the FLOPs from random scores, and ``apply(verify=False)``, the structural proof
included. Torch-Pruning: its dependency graph, and half of the channels of every group removed. Networks are untrained;
both libraries take turns, and the median of the repeats is reported.

    python benchmarks/structure.py [network ...]
    python benchmarks/structure.py --plot docs/depth.png    # how both grow with the depth of a ResNet
'''
from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings

import numpy as np
import torch
import torch_pruning as tp
import torchvision

import zennit_prune as zp

DEPTHS = (18, 34, 50, 101, 152)
NETWORKS = ('resnet18', 'resnet50', 'densenet121', 'efficientnet_b0', 'convnext_tiny')
REPEATS = 5
FIELDS = ('network', 'trace', 'plan', 'apply', 'ours', 'Torch-Pruning', 'ratio')


def ours(model: torch.nn.Module, example: torch.Tensor) -> tuple[float, float, float]:
    '''CPU seconds of trace, plan and apply.'''
    start = time.process_time()
    pruner = zp.Pruner(model, None, example)
    traced = time.process_time()
    plan = pruner.plan(pruner.collect((), 'random'), zp.Budget(flops=0.5))
    planned = time.process_time()
    plan.apply(model, verify=False)
    return traced - start, planned - traced, time.process_time() - planned


def theirs(model: torch.nn.Module, example: torch.Tensor) -> float:
    '''CPU seconds of Torch-Pruning's graph and removal; the copy that it prunes is made outside.'''
    model = copy.deepcopy(model)
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    start = time.process_time()
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
    for group in graph.get_all_groups(ignored_layers=[last], root_module_types=[torch.nn.Conv2d, torch.nn.Linear]):
        channels = graph.get_out_channels(group[0].dep.target.module)
        group.prune(list(range(channels // 2)))
    return time.process_time() - start


def measured(name: str) -> list[tuple[tuple[float, float, float], float]]:
    '''Both libraries in turn; a first round, which loads what they need, is left out.'''
    model = getattr(torchvision.models, name)(weights=None).eval()
    example = torch.zeros(1, 3, 224, 224)
    return [(ours(model, example), theirs(model, example)) for _ in range(REPEATS + 1)][1:]


def plot(path: str) -> None:
    '''Draw CPU seconds over the depth of ResNets.'''
    from matplotlib.figure import Figure

    rounds = [measured(f'resnet{depth}') for depth in DEPTHS]
    figure = Figure(figsize=(5, 3.4), layout='constrained')
    axes = figure.subplots()
    for label, one in (('zennit_prune, with proof', 0), ('Torch-Pruning', 1)):
        seconds = [statistics.median(float(np.sum(both[one])) for both in found) for found in rounds]
        axes.plot(DEPTHS, seconds, marker='o', label=label)
        print(label, *(f'ResNet-{depth} {value:.3f}' for depth, value in zip(DEPTHS, seconds)))
    axes.set(xlabel='depth of the ResNet', ylabel='CPU seconds', xticks=DEPTHS, xlim=(0, None), ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    '''Print one line per network, or plot.'''
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('networks', nargs='*', default=NETWORKS, help='torchvision classifiers')
    parser.add_argument('--plot', metavar='FILE', help='draw the growth with depth instead')
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    if options.plot:
        plot(options.plot)
        return
    print(''.join(f'{field:>16}' for field in FIELDS))
    for name in options.networks:
        rounds = measured(name)
        steps = [statistics.median(mine[step] for mine, _ in rounds) for step in range(3)]
        total = statistics.median(sum(mine) for mine, _ in rounds)
        other = statistics.median(rival for _, rival in rounds)
        ratio = statistics.median(sum(mine) / rival for mine, rival in rounds)
        columns = ''.join(f'{seconds:>16.3f}' for seconds in (*steps, total, other))
        print(f'{name:>16}{columns}{ratio:>16.2f}', flush=True)


if __name__ == '__main__':
    main()

'''CPU seconds to find and remove channels, side by side with Torch-Pruning in one run, on one thread.

Ours: ``trace``, a plan for half of the FLOPs from random scores, and ``apply(verify=False)``, the structural proof
included. Torch-Pruning: its dependency graph, and half of the channels of every group removed. Networks are untrained;
both libraries take turns, and the median of the repeats is reported.

    python benchmarks/structure.py [network ...]
'''
from __future__ import annotations

import copy
import statistics
import sys
import time
import warnings

import torch
import torch_pruning as tp
import torchvision

import zennit_prune as zp

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


def main() -> None:
    '''Print one line per network.'''
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    print(''.join(f'{field:>16}' for field in FIELDS))
    for name in sys.argv[1:] or NETWORKS:
        model = getattr(torchvision.models, name)(weights=None).eval()
        example = torch.zeros(1, 3, 224, 224)
        rounds = [(ours(model, example), theirs(model, example)) for _ in range(REPEATS + 1)][1:]
        steps = [statistics.median(mine[step] for mine, _ in rounds) for step in range(3)]
        total = statistics.median(sum(mine) for mine, _ in rounds)
        other = statistics.median(rival for _, rival in rounds)
        ratio = statistics.median(sum(mine) / rival for mine, rival in rounds)
        columns = ''.join(f'{seconds:>16.3f}' for seconds in (*steps, total, other))
        print(f'{name:>16}{columns}{ratio:>16.2f}', flush=True)


if __name__ == '__main__':
    main()

'''A tour in half a minute: train a small network on scanned digits, explain it, look, prune it to half its FLOPs.'''
from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import trange
from zennit.composites import EpsilonPlus

from ..errors import PruneError
from ..looking._heatmap import heatmap
from ..looking._pictures import heatmap_image
from ..pipeline._pruner import Pruner
from ..planning._cost import Budget, cost
from ..planning._latency import latency
from ..planning._plan import Plan
from ..planning._storage import load, save
from ..repairs._repair import repair
from ..util._display import table

EPOCHS = 12
DROPOUT = 0.2
FURTHER = 2
BATCH = 64
SHOWN = 8
HALF = Budget(flops=0.5)


class Block(nn.Module):
    '''A residual block, written as people write it: with functional ReLU and ``+``.'''

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.dropout2d(F.relu(self.bn1(self.conv1(x))), DROPOUT, self.training)
        y = self.bn2(self.conv2(y))
        return F.dropout2d(F.relu(y + self.shortcut(x)), DROPOUT, self.training)


class DigitNet(nn.Module):
    '''Three residual blocks for 8 x 8 scans of digits.'''

    def __init__(self, width: int = 48):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width, width), Block(width, 2 * width, 2), Block(2 * width, 2 * width))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3)))


def load_digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    '''Return training images and labels, then test images and labels, of the handwritten digits of scikit-learn.'''
    try:
        from sklearn import datasets
    except ImportError as error:
        raise PruneError('the demo takes its digits from scikit-learn: pip install "zennit-prune[demo]".') from error
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0), device='cpu')
    train, test = order[:1200], order[1200:]
    return images[train], labels[train], images[test], labels[test]


def train(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int = 0) -> nn.Module:
    '''Train in place with Adam and a one-cycle schedule, and return the network in evaluation mode.'''
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters())
    batches = -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, epochs * batches)
    network.train()
    for _ in trange(epochs, desc='training', leave=False):
        for index in torch.randperm(len(images), generator=generator, device='cpu').split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(network(images[index]), labels[index]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def references(labels: torch.Tensor, per_class: int = 10) -> torch.Tensor:
    '''Return the indices of the first few images of every class.'''
    return torch.cat([torch.nonzero(labels == label).flatten()[:per_class] for label in labels.unique()])


@torch.no_grad()
def accuracy(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    '''Return the share of images whose class is predicted.'''
    return float((network(images).argmax(1) == labels).float().mean())


def run(folder: Path, epochs: int = EPOCHS) -> Plan:
    '''Do the whole tour, write files to ``folder`` and return the plan.'''
    folder.mkdir(parents=True, exist_ok=True)
    data, truth, test_data, test_truth = load_digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = train(DigitNet(), data, truth, epochs)
    chosen = references(truth)
    print(f'A residual network for scanned digits, explained on {len(chosen)} reference images.\n')

    composite = EpsilonPlus()
    pruner = Pruner(network, composite, data[:1])
    plan = pruner.plan(pruner.collect((data[chosen], truth[chosen])), HALF, per_cost=False)
    print(plan)

    shown, targets = test_data[:SHOWN], test_truth[:SHOWN]
    masked = plan.masked(network)
    maps = {'as it is': pruner.heatmap(shown, targets),
            'as it would be': heatmap(masked, composite, shown, targets)}
    would_be = accuracy(masked, test_data, test_truth)
    heatmap_image(shown, maps, folder / 'heatmaps.png', [f'digit {label}' for label in targets.tolist()])
    print(f'\nNothing is removed yet: look at {folder / "heatmaps.png"}. It would recognise {would_be:.1%} of the test '
          'images.')

    small = plan.apply(network)
    plan.save(folder / 'plan.json')
    save(network, Plan(pruner.graph), folder / 'original.safetensors')
    save(small, plan, folder / 'small.safetensors')
    if not torch.equal(load(DigitNet(), folder / 'small.safetensors').eval()(shown), small(shown)):
        raise PruneError('the saved network does not compute what was saved.')
    print(f'Removed, verified and saved: an ordinary {type(small).__name__}, so it can be trained on.\n')

    repaired = repair(network, small, plan, data[chosen])
    trained = train(copy.deepcopy(small), data, truth, FURTHER)
    print(_summary(folder, test_data, test_truth, network, {
        '': small, '... repaired without labels': repaired, f'... or trained on for {FURTHER} epochs': trained}))
    rivals = []
    for seed in range(3):
        random = pruner.plan(pruner.collect((), 'random', seed=seed), HALF, per_cost=False).apply(network, verify=False)
        rivals.append((accuracy(random, test_data, test_truth),
                       accuracy(train(random, data, truth, FURTHER), test_data, test_truth)))
    at_once, later = zip(*rivals)
    print(f'\nThree random choices at the same FLOPs: {_percent(at_once)}; after {FURTHER} epochs {_percent(later)}.')
    print(f'Files in {folder}/: heatmaps.png, plan.json, small.safetensors, original.safetensors.')
    return plan


def _percent(shares: Sequence[float]) -> str:
    return ', '.join(f'{share:.1%}' for share in shares)


def _summary(folder: Path, data: torch.Tensor, truth: torch.Tensor, network: nn.Module,
             pruned_networks: dict[str, nn.Module]) -> str:
    small = pruned_networks['']
    before, after = cost(network, data[:1]), cost(small, data[:1])
    original, pruned = ((folder / name).stat().st_size for name in ('original.safetensors', 'small.safetensors'))
    seconds = [latency(model, data[:BATCH]) for model in (network, small)]
    rows: list[tuple[str, ...]] = [(label, f'{old:,}', f'{new:,}', f'{new / old:.0%}') for label, old, new in (
        ('parameters', before.params, after.params), ('FLOPs per image', before.flops, after.flops),
        ('bytes on disk', original, pruned))]
    times = [f'{1e3 * time:.2f} ms' for time in seconds]
    rows.append((f'latency, batch of {BATCH}', *times, f'{seconds[1] / seconds[0]:.0%}'))
    for label, model in pruned_networks.items():
        whole = '' if label else f'{accuracy(network, data, truth):.1%}'
        rows.append((label or f'accuracy on {len(data)} test images', whole, f'{accuracy(model, data, truth):.1%}', ''))
    return table(('', 'before', 'after', 'left'), rows)

'''Repair: what can be recovered is, nothing else is touched, and what cannot be helped is left alone.'''
from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import test_patterns
import torch
import torchvision
from small import Block, Residual, apart, chain, images, lived_in, same, seeded, snapshot
from test_pretrained import loaders, references  # noqa: F401
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm import TMonitor

import zennit_prune as zp
from zennit_prune import walk
from zennit_prune.repair import METHODS, repair

Build = Callable[[], nn.Module]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert {thread for thread in threading.enumerate() if not isinstance(thread, TMonitor)} <= before


class Net(nn.Module):
    '''Modules by name, and a function that runs them.'''

    def __init__(self, run: Callable[[Any, torch.Tensor], Any], **parts: nn.Module):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def duplicated(model: nn.Module, graph: zp.ChannelGraph, name: str, removed: list[int]) -> zp.Plan:
    '''Make channels copies of those before them, wherever they are brought forth, scaled or shifted; remove them.'''
    group = graph.group(name)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for member in group.members:
            if member.role != 'consumer':
                along = tensors[member.parameter].transpose(0, member.dim)
                for position in removed:
                    along[member.index[position]] = along[member.index[position - 1]]
    return zp.Plan(graph, {group.name: removed})


def half_removed(graph: zp.ChannelGraph, seed: int = 0) -> zp.Plan:
    rng = np.random.default_rng(seed)
    return zp.Plan(graph, {group.name: rng.permutation(group.size)[:group.size // 2].tolist()
                           for group in graph.groups if group.size > 1})


def error(model: nn.Module, original: nn.Module, x: Any) -> float:
    '''The squared error of the outputs over their variance.'''
    with torch.no_grad():
        found, wanted = model(x), original(x)
    return float((found - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean())


# 1: networks whose removed channels can be made up for by those that stay
class Excited(nn.Module):
    '''A block with an expansion, a depthwise convolution, squeeze and excitation, and a linear bottleneck.'''

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.project, self.bn3 = nn.Conv2d(8, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(self.bn2(self.depthwise(F.silu(self.bn1(self.expand(x))))))
        y = y * torch.sigmoid(self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.fc((x + self.bn3(self.project(y))).relu().mean((2, 3)))


class Down(nn.Module):
    '''A block with a projection for a shortcut: two layers with one target.'''

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(8)
        self.short = nn.Sequential(nn.Conv2d(8, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.stem(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += self.short(x)
        return self.fc(F.relu(y).mean((2, 3)))


class Dense(nn.Module):
    '''BatchNorm first, and everything that was made before is read again.'''

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(5), nn.BatchNorm2d(9), nn.BatchNorm2d(13)])
        self.convs = nn.ModuleList([nn.Conv2d(5, 4, 3, padding=1, bias=False), nn.Conv2d(9, 4, 3, padding=1)])
        self.fc = nn.Linear(13, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.fc(F.relu(self.norms[-1](x)).mean((2, 3)))


class Attention(nn.Module):
    '''Attention between tokens, written by hand with ``F.linear`` or with the module, and an MLP.'''

    def __init__(self, module: bool, first: bool = True, width: int = 8):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.first = first
        self.attend = nn.MultiheadAttention(width, 2, batch_first=first) if module else None
        self.qkv, self.shift = nn.Parameter(torch.randn(3 * width, width)), nn.Parameter(torch.randn(3 * width))
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)
        self.fc = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        if not self.first:
            x = x.transpose(0, 1)
        if self.attend is None:
            q, k, v = F.linear(x, self.qkv, self.shift).chunk(3, -1)
            x = x + torch.softmax(q @ k.transpose(1, 2) / 3, -1) @ v
        else:
            x = x + self.attend(x, x, x, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.fc(x.mean(1 if self.first else 0))


def plain(bias: bool = False, norm: bool = True) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 6), (6, 7), (7, 5)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias), *[nn.BatchNorm2d(outputs)] * norm, nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))


def convolved(dim: int, **options: Any) -> nn.Module:
    kind = getattr(nn, f'Conv{dim}d')
    return nn.Sequential(kind(3, 6, 3, **options), nn.ReLU(), kind(6, 5, 3, **options), nn.ReLU(),
                         getattr(nn, f'AdaptiveAvgPool{dim}d')(1), nn.Flatten(), nn.Linear(5, 4))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randint(20, (count, 5), generator=torch.Generator().manual_seed(seed))


def pictures(count: int, seed: int) -> torch.Tensor:
    return noise(count, 3, 8, 8, seed=seed)


RECOVERABLE: dict[str, tuple[Build, Callable[[int, int], torch.Tensor], str, list[int]]] = {
    'chain': (plain, pictures, '0', [1, 5]),
    'chain, second': (plain, pictures, '3', [3]),
    'chain without BatchNorm': (lambda: plain(True, False), pictures, '2', [2, 4]),
    'flattened 7 by 7': (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(196, 4)),
        pictures, '0', [2]),
    'mlp': (
        lambda: nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 9), nn.BatchNorm1d(9), nn.ReLU(),
                              nn.Linear(9, 4)), lambda count, seed: noise(count, 6, seed=seed), '0', [1, 7]),
    'mlp over a sequence': (
        lambda: nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 4)),
        lambda count, seed: noise(count, 5, 6, seed=seed), '0', [1, 7]),
    'block': (Residual, pictures, 'block1.conv1', [1, 4]),
    'stream': (Residual, pictures, 'stem', [3]),
    'shortcut with a projection, inner': (Down, pictures, 'conv1', [2]),
    'shortcut with a projection, outer': (Down, pictures, 'stem', [1, 4]),
    'shortcut beside a grouped convolution': (lambda: Down(2), pictures, 'stem', [1, 4]),
    'concatenation': (Dense, pictures, 'stem', [1]),
    'concatenation, later': (Dense, pictures, 'convs.0', [2]),
    'depthwise': (Excited, pictures, 'expand', [1, 6]),
    'gate': (Excited, pictures, 'squeeze', [2, 3]),
    'grouped': (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.BatchNorm2d(6),
                              nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)), pictures, '0', [1]),
    'sequences': (lambda: convolved(1, padding=1), lambda count, seed: noise(count, 3, 9, seed=seed), '0', [3]),
    'volumes': (lambda: convolved(3, stride=(1, 2, 1)), lambda count, seed: noise(count, 3, 6, 7, 6, seed=seed), '0',
                [3]),
    'dilated': (lambda: convolved(2, dilation=2, padding='same'), pictures, '0', [3]),
    'reflected': (lambda: convolved(2, padding=1, padding_mode='reflect'), pictures, '0', [3]),
    'attention by hand': (lambda: Attention(False), tokens, 'up', [3, 8]),
    'attention': (lambda: Attention(True), tokens, 'up', [3, 8]),
    'attention, batch second': (lambda: Attention(True, False), tokens, 'up', [3, 8]),
}


@pytest.mark.parametrize('name', RECOVERABLE)
def test_recoverable(name: str) -> None:
    build, draw, group, removed = RECOVERABLE[name]
    model = seeded(build().double())
    plan = duplicated(model, zp.trace(model, draw(2, 0)), group, removed)
    small = plan.apply(model)
    repaired = repair(small, model, plan, draw(200, 1), progress=False)
    unseen = draw(50, 2)
    assert apart(small(unseen), model(unseen)) > 1e-3
    assert apart(repaired(unseen), model(unseen)) <= 1e-6

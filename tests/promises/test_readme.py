'''The code of README.md and of the pages in docs/ runs, on small stand-ins for weights and images.

The blocks of one page run one after the other and share their names, as a reader runs them.
'''
from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import torchvision
from small import seeded
from torch import nn
from torchvision.models.resnet import BasicBlock
from zennit.composites import EpsilonPlus

import zennit_prune as zp
from zennit_prune.cli._cli import main
from zennit_prune.planning import _latency as latencies
from zennit_prune.tracing import _rules as rules

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
PYTHON = re.compile(r'^```python\n(.*?)^```', re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r'^ *(zennit-prune .*?)(?: {2,}#.*)?$', re.MULTILINE)
WITH_PYTHON = [page for page in PAGES if PYTHON.search(page.read_text())]
COMMANDS = [command for page in PAGES for command in COMMAND.findall(page.read_text())]
SIDE = 16  # pixels, for images of 224


class ResNet18(nn.Module):
    '''Layers named as in torchvision's ResNet-18, four channels each at first, and ten classes.'''

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(BasicBlock(4, 4))
        self.layer2 = nn.Sequential(BasicBlock(4, 8, 2, _shortcut(4, 8)))
        self.layer3 = nn.Sequential(BasicBlock(8, 8))
        self.layer4 = nn.Sequential(BasicBlock(8, 8))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


def _shortcut(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))


def resnet18(weights: str | None = None) -> nn.Module:
    return seeded(ResNet18())


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    '''A small ResNet-18 without a download, an empty folder, times from numbers of elements, and rules for one test.'''
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.models, 'resnet18', resnet18)
    monkeypatch.setattr(latencies, 'medians', lambda prepared, *_: [_elements(*work.args) for work in prepared])
    monkeypatch.setattr(latencies, 'side_by_side', lambda models, *_: [_elements(model) for model in models])
    monkeypatch.setattr(rules, 'OPERATIONS', dict(rules.OPERATIONS))
    monkeypatch.setattr(rules, 'OF_USERS', set(rules.OF_USERS))


def _elements(measured: Any, *_: Any) -> float:
    '''In place of seconds: the parameters of a network, or the widths of an operation.'''
    numbers = [weight.numel() for weight in measured.parameters()] if isinstance(measured, nn.Module) else measured
    return 1e-6 * sum(numbers)


def names() -> dict[str, Any]:
    '''The names that the pages of docs/ use without making them; README.md makes its own.'''
    model, images, labels = resnet18(), torch.randn(8, 3, SIDE, SIDE), torch.arange(8)
    pruner = zp.Pruner(model, EpsilonPlus(), images[:1], progress=False)
    relevance = pruner.collect((images, labels), exemplars=8)
    return {'zp': zp, 'EpsilonPlus': EpsilonPlus, 'model': model, 'images': images, 'labels': labels,
            'loader': [(images, labels)], 'example': images[:1], 'pruner': pruner, 'relevance': relevance,
            'plan': pruner.plan(relevance, zp.Budget(flops=0.7)), 'group': 'layer1.0.conv1', 'channel': 1,
            'names': [f'class {number}' for number in range(10)]}


def blocks(page: Path) -> str:
    '''The Python of a page, on its lines, so that an error names the right one.'''
    text, code = page.read_text(), ''
    for block in PYTHON.finditer(text):
        code += '\n' * (text.count('\n', 0, block.start(1)) - code.count('\n')) + block[1]
    return code.replace('224', str(SIDE))


@pytest.mark.parametrize('page', WITH_PYTHON, ids=lambda page: page.name)
def test_code_runs(page: Path, stand_ins: None) -> None:
    exec(compile(blocks(page), page, 'exec'), {} if page.name == 'README.md' else names())


@pytest.mark.parametrize('line', COMMANDS)
def test_commands_are_understood(line: str, stand_ins: None) -> None:
    '''Options exist and have the right kinds of values; what commands do is tested elsewhere.'''
    Path('photos').mkdir()
    Path('pruned').mkdir()
    for name in ('resnet18.pth', 'pruned/plan.json'):
        Path(name).touch()
    _, command, *arguments = shlex.split(line)
    found = main.get_command(click.Context(main), command)
    assert found is not None and found.make_context(command, arguments).params['images'] == Path('photos')

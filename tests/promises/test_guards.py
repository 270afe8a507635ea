'''What keeps collecting from being silently wrong: patched rules, gates, networks that are not sound.'''

from __future__ import annotations

import warnings

import pytest
import torch
import torchvision
from small import Residual, composite, images, labels, seeded
from torch import nn
from torch.nn import functional as F
from zennit.core import BasicHook

import zennit_prune as zp


class Squeezing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.gate = torchvision.ops.SqueezeExcitation(8, 4)
        self.last = nn.Conv2d(8, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.gate(F.relu(self.stem(x)))
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


@pytest.mark.parametrize('method', ['forward', 'backward', 'post_forward'])
def test_patched_rules_are_refused(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def patched(self: BasicHook, *args: object) -> None:
        '''As LXT puts in the place of what Zennit has.'''

    pruner = zp.Pruner(seeded(Residual()), composite(), images())
    monkeypatch.setattr(BasicHook, method, patched)
    with pytest.raises(zp.PruneError, match=f'BasicHook.{method} was replaced by one of .*guards'):
        pruner.collect((images(4), labels()), progress=False)


def test_channels_inside_gates_are_kept_and_said_to_be() -> None:
    model = seeded(Squeezing())
    pruner = zp.Pruner(model, None, images())
    relevance = pruner.collect((images(4), labels()), progress=False)
    assert 'gate.fc1' in {group.name for group in pruner.graph.groups} - set(relevance)
    assert {'stem', 'last'} <= set(relevance)
    assert any('gate.fc1' in note and 'gates' in note for note in relevance.info['notes'])
    plan = pruner.plan(relevance, zp.Budget(flops=0.6))
    assert 'gate.fc1' not in plan.removed and plan.apply(model)(images(2)).shape == (2, 4)


class Summing(nn.Module):
    '''Ends in a cumulative sum, which no rule covers.'''

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.cumsum(F.relu(self.conv(x)), 3).mean((2, 3)))


def test_collect_warns_once_of_unsound_relevance_and_names_the_operation() -> None:
    pruner = zp.Pruner(seeded(Summing()), None, images())
    loader = [(images(4), labels()), (images(4), labels())]
    with pytest.warns(zp.PruneWarning, match='unsound.*cumsum') as found:
        relevance = pruner.collect(loader, progress=False)
    assert len([warning for warning in found if 'unsound' in str(warning.message)]) == 1
    assert any('cumsum' in note for note in relevance.info['notes'])


def test_a_sound_network_is_not_warned_of() -> None:
    pruner = zp.Pruner(seeded(Residual()), composite(), images())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        pruner.collect((images(4), labels()), progress=False)
    found = pruner.preflight(images(4), labels())
    assert found.sound and found.stages[-1].name == 'input'
    assert abs(found.stages[-1].conservation_error) < 1e-3

'''Where relevance is not finite, the first parameter, buffer or layer that is not finite is named.'''

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import images, labels, same, seeded, snapshot
from torch import nn

import zennit_prune as zp
from zennit_prune.relevance._nonfinite import overflow, why_not_finite


def network() -> Any:
    return seeded(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
                                nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))


def weight(model: Any) -> None:
    model[3].weight.data[2, 1, 0, 2] = torch.nan


def infinite_bias(model: Any) -> None:
    model[7].bias.data[:2] = torch.inf


def statistics(model: Any) -> None:
    model[1].running_mean[3] = torch.nan


def negative(model: Any) -> None:
    model[1].running_var[3] = -1.0


def large(model: Any) -> None:
    model[0].weight.data.mul_(1e30)
    model[3].weight.data.mul_(1e30)


BROKEN: dict[str, tuple[Callable[[Any], None], str]] = {
    'weight': (weight, r"'3\.weight' holds nan at \[2, 1, 0, 2\]: restore it"),
    'bias': (infinite_bias, r"'7\.bias' holds inf at \[0\] and 1 more such value:"),
    'statistics': (statistics, r"'1\.running_mean' holds nan at \[3\]"),
    'variance': (negative, r"'1\.running_var' holds -1 at \[3\]: a variance is never negative"),
    'overflow': (large, r"overflow in '3': numbers of up to \S+e\+\d+ come in.*not finite in float32.*float64"),
}


@pytest.mark.parametrize('kind', BROKEN)
def test_scores_maps_and_the_preflight_name_the_cause(kind: str) -> None:
    model, (spoil, expected) = network(), BROKEN[kind]
    spoil(model)
    before = snapshot(model)
    tool = zp.Pruner(model, None, images(), progress=False)
    for call in (lambda: tool.collect([(images(), labels())], progress=False), lambda: tool.preflight(images()),
                 lambda: tool.heatmap(images()), lambda: zp.agreement(model, model, None, images()),
                 lambda: zp.prune(model, None, [(images(), labels())], zp.Budget(channels=0.5), progress=False)):
        with pytest.raises(zp.PruneError, match=expected):
            call()
    assert str(before) == str(snapshot(model))  # NaN does not equal itself


@pytest.mark.parametrize('kind', BROKEN)
@pytest.mark.parametrize('method', ['refit', 'bias', 'batchnorm'])
def test_a_repair_names_the_cause_and_does_not_blame_the_data(kind: str, method: str) -> None:
    model, (spoil, expected) = network(), BROKEN[kind]
    plan = zp.Plan(zp.trace(model, images(), progress=False)).remove('0', [1, 2])
    healthy = plan.apply(model)
    spoil(model)
    with pytest.raises(zp.PruneError, match=f'original network returns values that are not finite: {expected}'):
        zp.repair(model, plan.apply(model, verify=False), plan, images(40), method, progress=False)
    model = network()
    spoil(healthy)
    with pytest.raises(zp.PruneError, match='pruned network returns values that are not finite: '):
        zp.repair(model, healthy, plan, images(40), method, progress=False)


def test_skipping_samples_does_not_help_against_a_broken_weight() -> None:
    model = network()
    weight(model)
    tool = zp.Pruner(model, None, images(), progress=False)
    with pytest.raises(zp.PruneError, match=r"no sample .*'3\.weight' holds nan") as error:
        tool.collect([(images(), labels())] * 2, nonfinite='skip', progress=False)
    assert 'sample 0' not in str(error.value)
    with pytest.raises(zp.PruneError) as error:
        tool.collect([(images(), labels())], progress=False)
    assert 'skip' not in str(error.value)


def test_half_precision_is_told_of_float32() -> None:
    model = network().half()
    model[0].weight.data.mul_(1e3)
    model[3].weight.data.mul_(1e3)
    assert 'float32 with .float()' in overflow(model, images().half())


class Masked(nn.Module):
    '''An attention mask of minus infinity in a buffer and before a softmax.'''

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.register_buffer('mask', torch.full((4, 4), -torch.inf).triu(1))
        self.broken = broken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x @ x.mT + self.mask).softmax(-1)
        return x / (x.sum(-1, keepdim=True) - 1).round() if self.broken else x


def test_masks_of_infinity_are_not_the_cause() -> None:
    x = images().flatten(2).mT[:, :4]
    assert 'in the network itself' in why_not_finite(Masked(True), x)
    assert 'add' not in why_not_finite(Masked(True), x)


def test_a_network_that_is_finite_has_no_cause() -> None:
    model = network()
    before = snapshot(model)
    assert why_not_finite(model, images()) == ''
    assert same(before, snapshot(model))

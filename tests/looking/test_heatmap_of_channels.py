'''Heatmaps of single channels, against Zennit's attributor with all other channels masked by hand.'''

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import Functional, Residual, apart, chain, composite, contents, images, labels, same, seeded
from zennit.attribution import Gradient

import zennit_prune as zp
from zennit_prune.looking import _heatmap

RULES = ['epsilon_plus', 'epsilon_alpha2_beta1', 'epsilon_gamma_box', 'epsilon_plus_flat']


@pytest.mark.parametrize('rules', RULES)
def test_all_channels_of_a_chain_sum_to_the_whole_heatmap(rules: str) -> None:
    model, x = chain().double(), images(3, dtype=torch.float64)
    pruner = zp.Pruner(model, composite(rules), x)
    whole = pruner.heatmap(x, labels(3))
    for group in pruner.graph.groups:
        maps = pruner.heatmap(x, labels(3), channel=(group, range(group.size)))
        assert maps.shape == (group.size, 3, 8, 8) and apart(maps.sum(0), whole) <= 1e-6
        assert all(apart(maps[0], other) > 1e-3 for other in maps[1:] if other.abs().max() > 0)


@pytest.mark.parametrize('rules', RULES)
def test_one_channel_equals_zennits_with_the_others_masked(rules: str) -> None:
    model, x = chain(), images(3)
    for channel in (0, 3):
        expected = _masked_by_hand(model, composite(rules), x, 2, channel)
        found = zp.heatmap(model, composite(rules), x, labels(3), channel=('2', channel))
        assert found.shape == (3, 8, 8) and apart(found, expected) <= 1e-5


def _masked_by_hand(model: Any, rules: Any, x: torch.Tensor, layer: int, channel: int) -> torch.Tensor:
    mask = torch.zeros(1, 5, 1, 1)
    mask[:, channel] = 1

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output * 1.0
        output.register_hook(lambda relevance: relevance * mask)
        return output

    model = chain()
    with Gradient(model, rules, attr_output=torch.eye(4)[labels(3)]) as attributor:
        handle = model[layer].register_forward_hook(hook)
        _, relevance = attributor(x.clone().requires_grad_())
        handle.remove()
    return relevance.sum(1)


def test_a_branch_gets_what_the_shortcut_does_not() -> None:
    model, x = seeded(Functional()).double(), images(3, dtype=torch.float64)
    pruner = zp.Pruner(model, composite('epsilon_plus_flat'), x)
    whole = pruner.heatmap(x, labels(3))
    branch = pruner.heatmap(x, labels(3), channel=('conv3', range(7))).sum(0)
    assert apart(branch, whole) > 0.05
    stream = pruner.heatmap(x, labels(3), channel=('stem', range(6))).sum(0)  # every site cuts the network in two
    assert apart(stream, whole) <= 1e-6


@pytest.mark.parametrize('at_once', [1, 3, 8, 100])
def test_chunks_do_not_matter(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = seeded(Residual()).double(), images(2, dtype=torch.float64)
    pruner = zp.Pruner(model, composite(), x)
    monkeypatch.setattr(_heatmap, 'AT_ONCE', at_once)
    maps = pruner.heatmap(x, labels(2), channel=('block2.conv1', [6, 0, 3, 5, 1]))
    for row, channel in zip(maps, (6, 0, 3, 5, 1)):
        assert apart(pruner.heatmap(x, labels(2), channel=('block2.conv1', channel)), row) <= 1e-10


def test_bad_requests_and_an_untouched_network() -> None:
    model = seeded(Residual()).train()
    before = contents(model)
    pruner = zp.Pruner(model, composite(), images())
    for group, channel, message in [('nowhere', 0, 'nowhere'), ('stem', 6, 'channel 6 is out of range'),
                                    ('stem', [], 'at least one'), ('stem', 'a', 'whole number'),
                                    ('stem', -1, '-1')]:
        with pytest.raises(zp.PruneError, match=message):
            pruner.heatmap(images(), labels(), channel=(group, channel))
    pruner.heatmap(images(), labels(), channel=(pruner.graph.groups[0], [0, 1]))
    assert same(before, contents(model))


@pytest.mark.parametrize('channel', ['stem', 3, ('stem',), ('stem', 1, 2), (3, 'stem')])
def test_a_channel_is_a_group_and_a_position(channel: Any) -> None:
    with pytest.raises(zp.PruneError, match=r'names no channel: give a group and a position in it.*layer1'):
        zp.heatmap(seeded(Residual()), composite(), images(), labels(), channel=channel)


def test_a_trace_saves_another(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = seeded(Residual()), images(2)
    graph = zp.trace(model, x)
    whole, part = (zp.heatmap(model, composite(), x, labels(2), channel=channel) for channel in (None, ('stem', 1)))
    monkeypatch.setattr(_heatmap, 'trace', None)
    monkeypatch.setattr(_heatmap.GraphCanonizer, '__init__', None)
    assert torch.equal(zp.heatmap(model, composite(), x, labels(2), graph=graph), whole)
    assert torch.equal(zp.heatmap(model, composite(), x, labels(2), channel=('stem', 1), graph=graph), part)

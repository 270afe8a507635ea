'''A preset stands where a composite stands, and sets the options that belong to it.'''
from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Residual, chain, images, labels, seeded
from torch import nn
from zennit.composites import EpsilonPlus

import zennit_prune as zp
from zennit_prune.pipeline import Preset

LOADER = (images(12), labels(12))
CHANNELS = zp.Budget(channels=0.8)
QUIET: Any = {'progress': False}


def network() -> nn.Module:
    return seeded(Residual(8))


def paper(**options: Any) -> zp.Pruner:
    return zp.Pruner(network(), zp.presets.paper, images(1), **QUIET, **options)


def equal(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


def by_hand() -> zp.Pruner:
    return zp.Pruner(network(), zp.presets.paper.composite(), images(1), **QUIET)


def test_its_options_are_the_defaults_of_every_method() -> None:
    one, other = paper(), by_hand()
    relevance = one.collect(LOADER)
    expected = other.collect(LOADER, aggregate='signed', initial='one-hot')
    assert relevance.info == expected.info and all(torch.equal(relevance[name], expected[name]) for name in expected)
    assert one.plan(relevance, CHANNELS).removed == other.plan(expected, CHANNELS, per_cost=False).removed
    with one.collector() as collector:
        assert collector.aggregate == 'signed'
    result, by_step = one.iterate(LOADER, CHANNELS), other.iterate(
        LOADER, CHANNELS, 0.05, 'relevance', 'none', aggregate='signed', initial='one-hot', per_cost=False)
    assert result.plan.removed == by_step.plan.removed and equal(result.model, by_step.model)
    assert len(result.history) == len(by_step.history) == 5
    at_once = one.prune(LOADER, CHANNELS)
    assert equal(at_once.model, at_once.plan.apply(one.model)), 'the preset repairs nothing'
    assert equal(zp.prune(network(), zp.presets.paper, LOADER, CHANNELS, **QUIET), at_once.model)


def test_what_is_given_wins() -> None:
    one = paper()
    assert one.collect(LOADER, aggregate='abs').info['aggregate'] == 'abs'
    assert one.collect(LOADER, 'relevance', 'sumabs').info['aggregate'] == 'sumabs'  # given by position
    assert len(one.iterate(LOADER, CHANNELS, 0.1).history) == 3
    small = zp.prune(network(), zp.presets.paper, LOADER, CHANNELS, aggregate='abs', repair='bias', **QUIET)
    result = by_hand().prune(LOADER, CHANNELS, repair='bias', aggregate='abs', initial='one-hot', per_cost=False)
    assert equal(small, result.model)


def test_a_pruner_for_the_pruned_network_keeps_them() -> None:
    assert paper().on(network()).collect(LOADER).info['aggregate'] == 'signed'


def test_it_cannot_be_applied_by_half() -> None:
    assert not hasattr(zp.presets.paper, 'options') and not hasattr(zp.presets.paper, 'keys')
    with pytest.raises(TypeError):
        paper().iterate(LOADER, CHANNELS, **zp.presets.paper)  # type: ignore[arg-type]
    with pytest.raises(zp.PruneError, match=r'a Zennit composite is needed, an instance.*preset as zp\.presets\.paper'):
        zp.Pruner(network(), zp.presets, images(1))  # type: ignore[arg-type]


def test_a_preset_of_ones_own() -> None:
    mine = Preset(EpsilonPlus, aggregate='positive', min_share=0.5)
    one = zp.Pruner(chain(), mine, images(1), **QUIET)
    result = one.prune(LOADER, zp.Budget(channels=0.6), repair='none')
    assert result.relevance.info['aggregate'] == 'positive' and result.relevance.info['composite'] == 'EpsilonPlus'
    assert all(2 * len(gone) <= one.graph.group(name).size for name, gone in result.plan.removed.items())
    assert repr(mine) == "Preset(EpsilonPlus, aggregate='positive', min_share=0.5)"
    with pytest.raises(zp.PruneError, match=r"option='agregate' is unknown: .*did you mean 'aggregate'"):
        zp.Pruner(chain(), Preset(EpsilonPlus, agregate='abs'), images(1))


def test_they_say_what_they_set() -> None:
    assert repr(zp.presets.paper) == ("Preset(zplus, criterion='relevance', aggregate='signed', initial='one-hot', "
                                      "step=0.05, per_cost=False, repair='none')")


def test_a_preset_is_for_its_own_criterion() -> None:
    model, data = seeded(Residual()), (images(8), labels(8))
    plain, paper = (zp.Pruner(model, rules, images(1), progress=False) for rules in (None, zp.presets.paper))
    assert paper.collect(data).info['aggregate'] == 'signed'
    for found in (paper.collect(data, 'taylor'), paper.collect(data, criterion='taylor')):
        assert dict(found.items()).keys() == dict(plain.collect(data, 'taylor').items()).keys()
        assert all(torch.equal(found[name], values) for name, values in plain.collect(data, 'taylor').items())
    soft = zp.Pruner(model, zp.pipeline.Preset(EpsilonPlus, initial='softmax'), images(1), progress=False)
    hard = zp.Pruner(model, EpsilonPlus(), images(1), progress=False)
    assert torch.equal(soft.heatmap(images(2)), hard.heatmap(images(2)))


def test_steps_of_a_preset_are_not_dropped_silently() -> None:
    one = zp.Pruner(seeded(Residual()), zp.presets.paper, images(1), progress=False)
    with pytest.warns(zp.PruneWarning, match='steps of 5%.*use Pruner.iterate'):
        one.prune((images(8), labels(8)), zp.Budget(channels=0.8))


def test_a_sweep_knows_its_preset(tmp_path: Path) -> None:
    model = seeded(Residual())
    for preset, message in ((zp.pipeline.Preset(EpsilonPlus, aggregate='abs'), ''),
                            (zp.pipeline.Preset(EpsilonPlus, aggregate='sumabs'), 'is of another sweep')):
        one = zp.Pruner(model, preset, images(1), progress=False)
        with pytest.raises(zp.PruneError, match=message) if message else nullcontext():
            zp.sweep(one, [(images(8), labels(8))], same_value, [zp.Budget(flops=0.7)], ['relevance'],
                     checkpoint=tmp_path / 'sweep.json')


def same_value(network: torch.nn.Module) -> float:
    return 1.0

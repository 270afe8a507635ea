'''How far rankings depend on their samples, and what a plan says of it.'''

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from promises.test_pretrained import loaders  # noqa: F401 (a fixture)
from small import chain, composite, images, labels

import zennit_prune as zp
from zennit_prune.relevance._relevance import Reliability, spearman


def pruner() -> zp.Pruner:
    return zp.Pruner(chain(), composite(), images())


def collected(count: int = 12) -> zp.Relevance:
    return pruner().collect((images(count), labels(count)), progress=False)


def test_the_whole_network_is_one_ranking_of_all_channels() -> None:
    x, target = images(12), labels(12)
    even, odd = (pruner().collect((x[part::2], target[part::2]), progress=False) for part in (0, 1))
    joined = [torch.cat([values for _, values in half.items()]) for half in (even, odd)]
    found = collected().reliability()
    assert found.network == pytest.approx(spearman(*joined), abs=1e-6)
    assert found.samples == 12 and found.groups == pytest.approx(
        {name: spearman(even[name], odd[name]) for name in ('0', '2', '5', '9')}, abs=1e-6)


@pytest.mark.parametrize(
    ('half', 'samples', 'full', 'needed'),
    [(0.83, 100, 0.907, 195), (0.5, 100, 0.667, 950), (0.95, 40, 0.974, 20), (1.0, 40, 1.0, 1), (0.1, 10, 0.182, 855)],
)
def test_spearman_brown_closed_forms(half: float, samples: int, full: float, needed: int) -> None:
    found = Reliability({}, half, samples)
    assert found.full == pytest.approx(full, abs=1e-3)
    assert abs(found.needed() - needed) <= 1
    twice = Reliability({}, found.full, 2 * samples)  # as reliable as halves of twice as many, so the same is needed
    assert abs(twice.needed() - found.needed()) <= 1
    assert found.needed(0.5) <= found.needed()


@pytest.mark.parametrize('half', [0.0, -0.4])
def test_halves_that_do_not_agree_foretell_nothing(half: float) -> None:
    found = Reliability({}, half, 40)
    assert found.needed() is None and 'cannot be told' in str(found)


@pytest.mark.parametrize('correlation', [0, 1, 1.5, -1])
def test_correlations_out_of_reach(correlation: float) -> None:
    with pytest.raises(zp.PruneError, match='between 0 and 1'):
        Reliability({}, 0.5, 10).needed(correlation)


def test_extrapolation_of_a_known_noise() -> None:
    '''Scores with independent Gaussian noise follow the formula.'''
    random = np.random.default_rng(0)
    truth = random.normal(size=20000)

    def halves(samples: int) -> torch.Tensor:
        noise = random.normal(size=(2, len(truth))) * 5 / (samples / 2) ** 0.5
        return torch.from_numpy(truth + noise)

    needed = Reliability.of({'all': halves(20)}, 20).needed()
    assert Reliability.of({'all': halves(2 * needed)}, needed).network == pytest.approx(0.95, abs=0.01)


def test_extrapolation_on_a_real_network(loaders: Any) -> None:  # noqa: F811
    '''Half of the references it asks for are too few, twice as many are enough: measured on others.'''
    network, preprocess = loaders.load('resnet20_cifar10')
    pictures, target = loaders.cifar10('train_5k')
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    tool = zp.Pruner(network, None, preprocess(pictures[:1]))

    def scores(start: int, count: int) -> zp.Relevance:
        part = order[start : start + count]
        return tool.collect((preprocess(pictures[part]), target[part]), progress=False)

    def agreement(count: int) -> float:
        return spearman(*(torch.cat([values for _, values in scores(start, count).items()]) for start in (1000, 3000)))

    needed = scores(0, 80).reliability().needed()
    assert agreement(needed // 2) < 0.95 < agreement(2 * needed)


# --- plans
def test_plans_show_what_their_ranking_is_worth() -> None:
    relevance = collected()
    plan = pruner().plan(relevance, zp.Budget(flops=0.6))
    lines = str(plan).splitlines()
    assert lines[0].split() == ['group', 'channels', 'left', 'share', 'reliability']
    for group, line in zip(plan.graph.groups, lines[2:]):
        assert line.split()[-1] == f'{relevance.reliability().groups[group.name]:.2f}'
    found = relevance.reliability()
    assert lines[-1] == (
        f'ranking of the whole network: {found.network:.2f} between halves of 6 references; '
        f'about {found.needed():,} would reach 0.95'
    )


def test_plans_without_samples_show_none() -> None:
    tool = pruner()
    for plan in (tool.plan(tool.collect([], 'l1'), zp.Budget(flops=0.6)), zp.Plan(tool.graph)):
        assert plan.reliability is None and 'reliability' not in str(plan) and 'ranking' not in str(plan)


def test_plans_keep_it_in_files_and_edits_but_not_in_comparisons(tmp_path: Path) -> None:
    tool, relevance = pruner(), collected()
    plan = tool.plan(relevance, zp.Budget(flops=0.6))
    plan.save(tmp_path / 'plan')
    loaded = zp.Plan.load(tmp_path / 'plan', tool.graph)
    assert loaded.reliability == relevance.reliability() and str(loaded) == str(plan)
    bare = zp.Plan(tool.graph, plan.removed)
    assert bare == plan and hash(bare) == hash(plan) and 'reliability' not in bare.to_dict()
    name, positions = next(iter(plan.removed.items()))
    for edited in (plan.keep(name, positions[:1]), plan.keep(name, positions).remove(name, positions)):
        assert edited.reliability == plan.reliability
    later = zp.Pruner(plan.apply(tool.model), composite(), images())
    assert plan.compose(zp.Plan(later.graph)).reliability is None


@pytest.mark.parametrize('damage', [3, {}, {'groups': 1, 'network': 0.5, 'samples': 2}, {'groups': {}, 'network': 'x'}])
def test_damaged_reliability_is_refused(tmp_path: Path, damage: Any) -> None:
    tool, path = pruner(), tmp_path / 'plan'
    path.write_text(json.dumps({**zp.Plan(tool.graph).to_dict(), 'reliability': damage}))
    with pytest.raises(zp.PruneError, match='damaged "reliability"'):
        zp.Plan.load(path, tool.graph)

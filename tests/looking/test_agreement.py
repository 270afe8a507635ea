'''Heatmaps of two networks compared, against closed forms and Zennit's own heatmaps.'''

from __future__ import annotations

from typing import Any

import pytest
import torch
from looking.test_heatmap import zennits
from scipy.stats import spearmanr
from small import Functional, Residual, apart, chain, composite, contents, images, labels, same, seeded
from torch import nn
from torch.nn import functional as F
from zennit.core import Composite

import zennit_prune as zp

RULES = ['epsilon_plus', 'epsilon_alpha2_beta1', 'epsilon_gamma_box', 'epsilon_plus_flat', 'epsilon_alpha2_beta1_flat']


def pair() -> tuple[nn.Module, nn.Module, zp.Plan]:
    model = seeded(Residual())
    plan = zp.Plan(zp.trace(model, images()), {'stem': [1, 2], 'block1.conv1': [0]})
    return model, plan.apply(model), plan


@pytest.mark.parametrize('net', [chain, lambda: seeded(Functional())], ids=['modules', 'functions'])
@pytest.mark.parametrize('rules', RULES)
def test_both_heatmaps_equal_zennits_for_the_originals_prediction(net: Any, rules: str) -> None:
    model, other, x = net(), seeded(net(), 5), images(6)
    predicted = model(x).argmax(1)
    assert (predicted != other(x).argmax(1)).any()  # else the target of the second network proves nothing
    found = zp.agreement(model, other, composite(rules), x)

    def start(output: torch.Tensor) -> torch.Tensor:
        return F.one_hot(predicted, 4).to(output)

    for network, maps in ((model, found.before), (other, found.after)):
        assert apart(maps, zennits(network, lambda given: composite(rules, given), x, start)) <= 1e-5
    assert torch.equal(found.difference, found.after - found.before)
    assert torch.equal(found.predicted[0], predicted) and torch.equal(found.predicted[1], other(x).argmax(1))
    assert torch.equal(found.same, predicted == other(x).argmax(1))


def test_measures_against_their_formulas(device: torch.device) -> None:
    model, small, plan = pair()
    model, small, x = (part.to(device, torch.float64) for part in (model, small, images(5)))
    found = zp.agreement(model, small, composite(), x, labels(5))
    for row in range(5):
        before, after = found.before[row].double().flatten(), found.after[row].double().flatten()
        assert float(found.cosine[row]) == pytest.approx(float(F.cosine_similarity(before, after, 0)))
        assert float(found.rank[row]) == pytest.approx(spearmanr(before, after).statistic)
        moved = (before / before.abs().sum() - after / after.abs().sum()).abs().sum() / 2
        assert float(found.total_variation[row]) == pytest.approx(float(moved)) and 0 < moved < 1
        largest = max(float(maps[row].abs().max()) for maps in (found.before, found.after, found.difference))
        assert float(found.scale[row]) == largest
    masked = zp.agreement(model, plan.masked(model), composite(), x, labels(5))
    assert apart(masked.after, found.after) <= 1e-5


def test_equal_networks_agree_and_opposite_ones_do_not() -> None:
    model = chain()
    found = zp.agreement(model, model, composite(), images())
    assert (found.cosine == 1).all() and (found.rank == 1).all() and found.same.all()
    assert (found.total_variation == 0).all()
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False))
    other = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False))
    other[1].load_state_dict({'weight': -linear[1].weight})
    found = zp.agreement(linear, other, Composite(), images(3, 2), labels(3, 2))
    assert torch.allclose(found.total_variation, torch.ones(3).double())
    assert torch.allclose(found.cosine, -torch.ones(3).double())
    nn.init.zeros_(other[1].weight)
    found = zp.agreement(linear, other, Composite(), images(3, 2), labels(3, 2))
    assert (found.total_variation == 1).all() and (found.cosine == 0).all()


def test_kept_predictions_with_moved_explanations_come_first() -> None:
    model, other, noise = chain(), chain(), seeded(chain(), 5)
    with torch.no_grad():
        for parameter, change in zip(other.parameters(), noise.parameters()):
            parameter.add_(change, alpha=0.5)
    other[-1].bias.data -= (other(images(12)) - model(images(12))).mean(0)  # some predictions stay, some do not
    found = zp.agreement(model, other, composite(), images(12))
    assert 0 < found.same.sum() < 12
    stay = int(found.same.sum())
    order = found.order.tolist()
    assert sorted(order) == list(range(12)) and found.same[order[:stay]].all() and not found.same[order[stay:]].any()
    for part in (order[:stay], order[stay:]):
        assert found.total_variation[part].tolist() == sorted(found.total_variation[part].tolist(), reverse=True)
    assert str(found).splitlines()[2].split()[0] == str(order[0]) and f'{stay} of 12 predictions stay' in str(found)


def test_segmentation_and_regression() -> None:
    masks = seeded(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    found = zp.agreement(masks, seeded(nn.Sequential(*[*masks]), 0), composite(), images(3))
    assert found.predicted[0].shape == (3, 8, 8) and found.same.shape == (3,) and found.same.all()
    assert 'per position' in str(found)
    number = seeded(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 1), nn.Flatten(0)))
    found = zp.agreement(number, number, composite(), images(3), None, lambda output: output)
    assert found.same.all() and found.total_variation.shape == (3,)
    with pytest.raises(zp.PruneError, match='without classes'):
        zp.agreement(number, number, composite(), images(3))


def test_networks_with_other_outputs_are_refused_and_nothing_is_touched() -> None:
    model, other = chain().train(), chain(3)
    before = contents(model)
    with pytest.raises(zp.PruneError, match=r'\(4, 4\) and \(4, 3\)'):
        zp.agreement(model, other, composite(), images())
    assert same(before, contents(model))

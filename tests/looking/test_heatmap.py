'''Heatmaps equal Zennit's.'''

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import Functional, Mixed, Residual, apart, chain, composite, images, labels, seeded
from torch import nn
from torch.nn import functional as F
from zennit.attribution import Gradient
from zennit.composites import COMPOSITES, LayerMapComposite, layer_map_base
from zennit.rules import Epsilon
from zennit.types import Linear

import zennit_prune as zp

NETS: dict[str, Callable[[], nn.Module]] = {
    'chain': chain,
    'residual': lambda: seeded(Residual()),
    'mixed': lambda: seeded(Mixed()),
    'functional': lambda: seeded(Functional()),
}


def zennits(model: nn.Module, rules: Callable[[Any], Any], x: torch.Tensor, start: Any) -> torch.Tensor:
    '''The heatmap, by Zennit's own attributor.'''
    model = copy.deepcopy(model)
    with Gradient(model, rules([zp.GraphCanonizer(model, x)]), attr_output=start) as attributor:
        _, relevance = attributor(x.detach().clone().requires_grad_())
    return relevance.sum(1)


def _one_hot(output: torch.Tensor) -> torch.Tensor:
    return F.one_hot(labels(len(output)), 4).to(output)


@pytest.mark.parametrize('rules', ['epsilon_plus', 'epsilon_alpha2_beta1', 'epsilon_gamma_box', 'epsilon_plus_flat'])
@pytest.mark.parametrize('net', NETS)
def test_heatmap_equals_zennits(net: str, rules: str) -> None:
    model, x = NETS[net](), images(3, 8)
    expected = zennits(model, lambda canonizers: composite(rules, canonizers), x, _one_hot)
    found = zp.heatmap(model, composite(rules), x, labels(3))
    assert found.shape == (3, 8, 8)
    assert apart(found, expected) <= 1e-5
    assert apart(zp.Pruner(model, composite(rules), x).heatmap(x, labels(3)), expected) <= 1e-5


def test_recommended_rules_are_epsilon() -> None:
    model, x = NETS['residual'](), images()
    expected = zennits(
        model, lambda canonizers: LayerMapComposite([*layer_map_base(), (Linear, Epsilon())], canonizers), x, _one_hot
    )
    assert apart(zp.heatmap(model, None, x, labels()), expected) <= 1e-5


@pytest.mark.parametrize('name', sorted(COMPOSITES))
def test_all_composites_make_heatmaps(name: str) -> None:
    found = zp.heatmap(chain(), composite(name), images(), labels())
    assert found.shape == (4, 8, 8) and torch.isfinite(found).all() and found.abs().sum() > 0


@pytest.mark.parametrize(
    ('initial', 'start'),
    [
        ('one-hot', _one_hot),
        ('logit', lambda output: _one_hot(output) * output),
        (torch.sigmoid, torch.sigmoid),
    ],
)
def test_initial_relevance(initial: Any, start: Any) -> None:
    expected = zennits(chain(), lambda canonizers: composite('epsilon_plus', canonizers), images(), start)
    assert apart(zp.heatmap(chain(), composite(), images(), labels(), initial), expected) <= 1e-5


def test_predicted_classes_are_the_default() -> None:
    model, x = chain(), images()
    assert torch.equal(zp.heatmap(model, composite(), x), zp.heatmap(model, composite(), x, model(x).argmax(1)))


def test_samples_do_not_mix() -> None:
    model, x = NETS['residual']().double(), images(5, dtype=torch.float64)
    together = zp.heatmap(model, composite(), x, labels(5))
    alone = torch.cat([zp.heatmap(model, composite(), x[i : i + 1], labels(5)[i : i + 1]) for i in range(5)])
    assert apart(together, alone) <= 1e-10


def test_the_input_keeps_its_values_and_flags() -> None:
    x = images()
    before = x.clone()
    zp.heatmap(chain(), composite(), x, labels())
    assert torch.equal(x, before) and not x.requires_grad and x.grad is None
    assert not zp.heatmap(chain(), composite(), x.requires_grad_(), labels()).requires_grad


def test_wrapped_networks_and_networks_in_training() -> None:
    model = NETS['residual']()
    expected = zp.heatmap(model, composite(), images(), labels())
    assert torch.equal(zp.heatmap(nn.DataParallel(model), composite(), images(), labels()), expected)
    assert torch.equal(zp.heatmap(model.train(), composite(), images(), labels()), expected)
    assert model.training


def test_heatmaps_where_gradients_are_off() -> None:
    expected = zp.heatmap(chain(), composite(), images(), labels())
    with torch.no_grad():
        assert torch.equal(zp.heatmap(chain(), composite(), images(), labels()), expected)


def test_inputs_that_are_no_images() -> None:
    model = seeded(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)))
    x = images(4, 2).flatten(1)[:, :5]
    found = zp.heatmap(model, None, x, labels())
    assert found.shape == (4, 5)
    by_name = zp.heatmap(model, None, {'input': x}, labels())
    assert torch.equal(by_name, found) and torch.equal(zp.heatmap(model, None, (x,), labels()), found)


@pytest.mark.parametrize(
    ('action', 'message'),
    [
        (lambda: zp.heatmap(chain(), composite(), images(), labels() + 1), 'label 4 is out of range'),
        (lambda: zp.heatmap(chain(), composite(), images(), labels(3)), r'\(3,\)'),
        (lambda: zp.heatmap(chain(), composite(), images(), None), 'labels'),
        (lambda: zp.heatmap(chain(), composite(), images(), 'best'), "'best'"),
        (lambda: zp.heatmap(chain(), composite(), images(), labels(), 'logits'), "'logits'"),
        (lambda: zp.heatmap(chain(), composite(), images() * float('nan'), labels()), 'not finite'),
        (lambda: zp.heatmap(chain(), composite(), images()[:, :1], labels()), r'\(4, 1, 8, 8\)|\(2, 1, 8, 8\)'),
        (lambda: zp.heatmap(3, composite(), images(), labels()), 'int'),
        (
            lambda: zp.heatmap(
                nn.Sequential(nn.Embedding(5, 6), nn.Flatten(), nn.Linear(18, 4)),
                None,
                torch.ones(4, 3).long(),
                labels(),
            ),
            'floating-point input',
        ),
    ],
)
def test_bad_input(action: Callable[[], Any], message: str) -> None:
    with pytest.raises(zp.PruneError, match=message):
        action()

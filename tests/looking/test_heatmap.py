'''Heatmaps equal Zennit's, and pictures of them open.'''

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
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


# --- pictures


def opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == 'PNG'
        return picture.convert('RGB')


def test_pictures_have_a_column_for_each_image_and_a_row_for_each_network(tmp_path: Path) -> None:
    sizes = {}
    for count in (1, 2, 3):
        for rows in (1, 2):
            x, maps = images(count), {f'network {row}': torch.randn(count, 8, 8) for row in range(rows)}
            zp.heatmap_image(tmp_path / 'map.png', x, maps)
            sizes[count, rows] = opened(tmp_path / 'map.png').size
    tile = sizes[2, 1][0] - sizes[1, 1][0]
    assert tile >= 128 and sizes[3, 1][0] - sizes[2, 1][0] == tile
    assert sizes[1, 2][1] - sizes[1, 1][1] == tile
    assert sizes[1, 1][1] >= 2 * 128
    assert {rows: height for (_, rows), (_, height) in sizes.items()} == {rows: sizes[1, rows][1] for rows in (1, 2)}


@pytest.mark.parametrize('shape', [(1, 3, 8, 8), (2, 1, 8, 8), (1, 3, 12, 20), (1, 3, 300, 200)])
def test_pictures_of_any_size(shape: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    zp.heatmap_image(
        str(tmp_path / 'map.png'), x, {'before': x.sum(1), 'after': x.abs().sum(1)}, ['first', 'second'][: len(x)]
    )
    width, height = opened(tmp_path / 'map.png').size
    assert width >= shape[0] * shape[3] and height >= 3 * shape[2]


def test_signs_have_colours_and_rows_share_a_scale(tmp_path: Path) -> None:
    '''Positive relevance is red and negative blue; half of the largest is paler.'''
    half = torch.zeros(1, 8, 8)
    half[0, :4], half[0, 4:] = 1.0, -1.0
    zp.heatmap_image(tmp_path / 'map.png', torch.zeros(1, 1, 8, 8), {'full': half, 'half': half / 2})
    pixels = np.asarray(opened(tmp_path / 'map.png')).astype(int)
    tile = pixels[:, -70]
    red, blue = (np.flatnonzero(tile[:, a] > tile[:, b] + 50) for a, b in ((0, 2), (2, 0)))
    assert len(red) > 50 and len(blue) > 50 and red[0] < blue[0]
    assert len(np.unique(tile, axis=0)) >= 5


def test_pictures_of_zeros(tmp_path: Path) -> None:
    zp.heatmap_image(tmp_path / 'map.png', torch.zeros(2, 3, 8, 8), {'nothing': torch.zeros(2, 8, 8)})
    assert opened(tmp_path / 'map.png').size[0] >= 256


@pytest.mark.parametrize('maps', [torch.zeros(3, 8, 8), torch.zeros(2, 1, 8, 8), torch.zeros(8, 8)])
def test_heatmaps_that_do_not_fit_the_images(maps: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(zp.PruneError, match=r"'after'.*2 images"):
        zp.heatmap_image(tmp_path / 'map.png', images(2), {'after': maps})
    assert not (tmp_path / 'map.png').exists()


@pytest.mark.parametrize(
    'arguments',
    [
        {'heatmaps': {}},
        {'images': torch.zeros(0, 3, 8, 8), 'heatmaps': {'a': torch.zeros(0, 8, 8)}},
        {'cmap': 'nocolours'},
    ],
)
def test_pictures_of_nothing(arguments: dict[str, Any], tmp_path: Path) -> None:
    given = {'images': images(2), 'heatmaps': {'a': torch.ones(2, 8, 8)}, **arguments}
    with pytest.raises(zp.PruneError):
        zp.heatmap_image(tmp_path / 'map.png', **given)

'''A layer's call as a regression, and ridge regression from moments against one from samples.'''
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from zennit_prune.repairs._regression import LEFT, RIDGES, TINY, Moments
from zennit_prune.repairs._targets import LayerCall

OPTIONS: list[tuple[int, dict[str, Any]]] = [
    (1, {}), (1, {'stride': 2, 'padding': 3, 'dilation': 2}), (1, {'padding': 'same', 'dilation': 3, 'groups': 2}),
    (2, {}), (2, {'stride': (2, 3), 'padding': (1, 0)}), (2, {'padding': 'same'}), (2, {'padding': 'valid'}),
    (2, {'padding': 'same', 'dilation': (2, 1), 'groups': 4}), (2, {'stride': (3,), 'padding': (2,), 'groups': 2}),
    (3, {'stride': (1, 2, 1), 'padding': (0, 1, 2), 'dilation': (2, 1, 1)}), (3, {'padding': 'same', 'groups': 4}),
]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize('kernel', [(3, 3, 3), (2, 1, 4)])
@pytest.mark.filterwarnings('ignore:Using padding')
@pytest.mark.parametrize('dim,options', OPTIONS)
def test_features_of_convolutions(dim: int, options: dict[str, Any], kernel: tuple[int, ...]) -> None:
    groups = options.get('groups', 1)
    x, weight = noise(3, 4, *(7, 9, 8)[:dim]), noise(8, 4 // groups, *kernel[:dim], seed=1)
    function = getattr(F, f'conv{dim}d')
    result = function(x, weight, **options)
    call = LayerCall(f'conv{dim}d', (x, weight), options, result, 3)
    rows = weight.reshape(groups, 8 // groups, -1)
    whole = call.features(slice(None))
    assert whole.shape == (3, groups, rows.shape[2], result[0, 0].numel())
    assert torch.allclose(rows @ whole, call.outputs(result, groups))
    assert torch.allclose(call.response(weight), result)
    channels = 4 // groups
    parts = [call.features(slice(start, start + 2)) for start in range(0, channels, 2)]
    assert torch.equal(torch.cat(parts, 2), whole)
    thinned = [slice(1, None, 2), slice(0, None, 3), slice(2, None, 1)][:dim]
    here = torch.arange(whole.shape[3]).reshape(result.shape[2:])[tuple(thinned)].flatten()
    assert torch.equal(call.features(slice(None), thinned), whole[..., here])
    assert torch.equal(call.outputs(result, groups, thinned), call.outputs(result, groups)[..., here])


@pytest.mark.parametrize('shape', [(3,), (3, 4), (3, 4, 2), (4, 3), (12,)])
def test_features_of_linear_layers(shape: tuple[int, ...]) -> None:
    x, weight, bias = noise(*shape, 5), noise(6, 5, seed=1), noise(6, seed=2)
    result = F.linear(x, weight, bias)
    call = LayerCall('linear', (x, weight, bias), {}, result, 3)
    features, outputs = call.features(slice(None)), call.outputs(result, 1)
    assert torch.allclose(weight @ features + bias[:, None], outputs)
    assert len(outputs) == (12 if shape == (12,) else 3)  # inputs come first, wherever the layer has them
    assert torch.equal(features[:, :, 1:3], call.features(slice(1, 3)))
    assert call.channel_dim == len(shape)


def by_hand(features: list[torch.Tensor], errors: list[torch.Tensor], intercept: bool, ridges: tuple[float, ...]
            ) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    '''The same from samples, (fold, groups, ..., samples): least squares with rows for the ridge, and every fold left
    out in turn.
    '''
    def fit(chosen: list[int], ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.cat([features[fold] for fold in chosen], 2)
        y = torch.cat([errors[fold] for fold in chosen], 2)
        x_mean, y_mean = (part.mean(2, keepdim=True) * intercept for part in (x, y))
        x, y = x - x_mean, y - y_mean
        weight = torch.zeros(len(x), x.shape[1], y.shape[1], dtype=x.dtype)
        if ridge < float('inf'):
            size = (ridge * x.square().sum(2).mean()).sqrt()
            rows = size * torch.eye(x.shape[1], dtype=x.dtype).expand(len(x), -1, -1)
            zeros = torch.zeros(len(x), y.shape[1], x.shape[1], dtype=x.dtype)
            left, right = torch.cat([x, rows], 2).mT, torch.cat([y, zeros], 2).mT
            weight = torch.linalg.lstsq(left, right, driver='gelsd').solution
        return weight, (y_mean - weight.mT @ x_mean)[..., 0]

    losses = {}
    everything = list(range(len(features)))
    for ridge in (*ridges, float('inf')):
        losses[ridge] = 0.0
        for fold in everything:
            weight, bias = fit([other for other in everything if other != fold], ridge)
            left = errors[fold] - weight.mT @ features[fold] - bias[..., None]
            losses[ridge] += float(left.square().sum())
    nothing = sum(float(error.square().sum()) for error in errors)
    if losses.get(TINY, 0) > LEFT * nothing:
        del losses[TINY]
    best = min(losses, key=lambda ridge: losses[ridge])
    return *fit(everything, best), best, 1 - losses[best] / nothing


@pytest.mark.parametrize('intercept', [True, False])
@pytest.mark.parametrize('groups,width,samples', [(1, 5, 40), (3, 4, 25), (1, 30, 6)])
@pytest.mark.parametrize('scatter', [0.0, 0.01, 1.0])
def test_solution_from_moments(groups: int, width: int, samples: int, intercept: bool, scatter: float) -> None:
    truth = noise(groups, width, 2, seed=9)
    features = [1 + noise(groups, width, samples, seed=fold) for fold in range(4)]
    errors = [truth.mT @ x + 2 * intercept + scatter * noise(groups, 2, samples, seed=10 + fold)
              for fold, x in enumerate(features)]
    moments = Moments(intercept)
    for fold in range(4):
        for part in (slice(0, 3), slice(3, None)):
            moments.add(fold, features[fold][..., part], errors[fold][..., part])
    change = moments.solve()
    assert change is not None
    weight, bias, ridge, gain = by_hand(features, errors, intercept, (TINY, *RIDGES))
    assert change.gain == pytest.approx(gain, rel=1e-4)
    assert change.ridge == ridge or width > samples  # small ridges are all the same there
    assert torch.allclose(change.weight, weight, rtol=1e-3, atol=1e-2 if width > samples else 1e-6)
    assert torch.allclose(change.bias, bias, rtol=1e-3, atol=1e-2 if width > samples else 1e-6)
    assert intercept or not change.bias.any()


def test_noise_is_no_reason_to_change() -> None:
    sizes = []
    for seed in range(20):
        moments = Moments(False)
        for fold in range(4):
            moments.add(fold, noise(1, 6, 30, seed=100 * seed + fold), noise(1, 3, 30, seed=100 * seed + 50 + fold))
        change = moments.solve()
        sizes.append(0.0 if change is None else float(change.weight.norm()))
    assert sizes.count(0.0) >= 10 and max(sizes) < 0.25  # least squares without a ridge: 0.39


def test_no_error_no_change() -> None:
    moments = Moments()
    for fold in range(4):
        moments.add(fold, noise(1, 6, 30, seed=fold), torch.zeros(1, 3, 30, dtype=torch.float64))
    assert moments.solve() is None


def test_what_only_holds_in_one_fold_is_not_learnt() -> None:
    x = noise(1, 4, 50)
    moments = Moments()
    for fold in range(4):
        moments.add(fold, x, (x[:, :2] + 1) * (-1) ** fold)
    assert moments.solve() is None


@pytest.mark.parametrize('ridges', [RIDGES, ()])
def test_single_fold(ridges: tuple[float, ...]) -> None:
    x = noise(1, 3 if ridges else 0, 200)
    y = (x[:, :1] if ridges else noise(1, 1, 200, seed=1)) + 5
    moments = Moments()
    moments.add(0, x, y)
    change = moments.solve(ridges)
    assert change is not None and torch.isfinite(change.weight).all()
    left = y - change.weight.mT @ x - change.bias[..., None]
    assert float(left.square().sum()) < 0.3 * float(y.square().sum())
    assert float(left.mean().abs()) < 1e-10


def test_constant_features() -> None:
    moments = Moments()
    for fold in range(4):
        x = noise(1, 3, 50, seed=fold)
        x[:, 1], x[:, 2] = 7.0, 0.0
        moments.add(fold, x, 2 * x[:, :1] + 3)
    change = moments.solve()
    assert change is not None
    assert torch.allclose(change.weight.flatten(), torch.tensor([2.0, 0, 0], dtype=torch.float64), atol=1e-6)
    assert torch.allclose(change.bias, torch.full((1, 1), 3.0, dtype=torch.float64), atol=1e-6)
    only = Moments()
    for fold in range(4):
        only.add(fold, torch.full((1, 2, 9), 3.0), torch.full((1, 1, 9), 4.0))
    change = only.solve()
    assert change is not None and not change.weight.any() and torch.allclose(change.bias, torch.tensor(4.0).double())


def test_single_precision_far_from_zero() -> None:
    moments = Moments()
    for fold in range(4):
        x = 50 + noise(1, 3, 500, seed=fold)
        moments.add(fold, x.float(), (2 * x[:, :1] - 100).float())
    change = moments.solve()
    assert change is not None
    assert torch.allclose(change.weight.flatten(), torch.tensor([2.0, 0, 0], dtype=torch.float64), atol=1e-2)


@pytest.mark.parametrize('intercept', [True, False])
def test_basis_of_the_samples_gives_the_same(intercept: bool) -> None:
    parts = [(1 + noise(2, 50, 7, seed=fold), noise(2, 3, 7, seed=10 + fold)) for fold in range(4)]
    parts = [(x, x[:, :3] - x[:, 3:6] + 0.1 * y) for x, y in parts]
    basis = torch.linalg.qr(torch.cat([x for x, _ in parts], 2))[0]
    whole, few = Moments(intercept), Moments(intercept, 50)
    for fold, (x, y) in enumerate(parts):
        whole.add(fold, x, y)
        few.add(fold, basis.mT @ x, y)
    a, b = whole.solve(RIDGES), few.solve(RIDGES)
    assert a is not None and b is not None and a.ridge == b.ridge and a.gain == pytest.approx(b.gain, rel=1e-4)
    assert torch.allclose(a.weight, basis @ b.weight, atol=1e-4)
    assert torch.allclose(a.bias, b.bias, atol=1e-4)

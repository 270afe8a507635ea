'''Attributors in place of the gradient: the mean over their passes, at every state.'''

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from small import Mixed, Residual, apart, chain, composite, images, labels, seeded
from torch import nn
from zennit.attribution import Gradient, IntegratedGradients, Occlusion, SmoothGrad

import zennit_prune as zp
from zennit_prune.relevance._attribute import fixed_randomness

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    'chain': chain,
    'residual': lambda: seeded(Residual()),
    'mixed': lambda: seeded(Mixed()),
}
SMOOTH = partial(SmoothGrad, noise_level=0.3, n_iter=4)


def x(count: int = 4) -> torch.Tensor:
    return images(count, dtype=torch.float64)


def pruner(name: str = 'chain', rules: Any = None) -> zp.Pruner:
    return zp.Pruner(NETWORKS[name]().double(), rules or composite(), x())


def collected(tool: zp.Pruner, inputs: Any = None, target: Any = None, **options: Any) -> zp.Relevance:
    return tool.collect([(x() if inputs is None else inputs, labels() if target is None else target)],
                        progress=False, **options)


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('attributor', [Gradient, partial(SmoothGrad, n_iter=1), lambda model: Gradient(model)])
def test_one_pass_is_the_gradient(attributor: Any, name: str) -> None:
    tool = pruner(name)
    expected, found = collected(tool), collected(tool, attributor=attributor)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize('initial', ['one-hot', 'softmax'])
@pytest.mark.parametrize('name', ['chain', 'residual'])
def test_smoothgrad_is_the_mean_over_noisy_inputs(name: str, initial: str) -> None:
    '''Signed relevance is linear in the passes, so each may be collected on its own.'''
    tool, inputs = pruner(name), x()
    spread = 0.3 * (inputs.amax((1, 2, 3), keepdim=True) - inputs.amin((1, 2, 3), keepdim=True))
    with fixed_randomness(7, inputs.device):
        noisy = [inputs + torch.randn_like(inputs) * spread for _ in range(3)]
    options = {'aggregate': 'signed', 'initial': initial}
    passes = [collected(tool, values, **options) for values in [*noisy, inputs]]
    found = collected(tool, attributor=SMOOTH, seed=7, **options)
    for key in found:
        assert apart(found[key], torch.stack([part[key] for part in passes]).mean(0)) <= 1e-10
        assert apart(found[key], passes[-1][key]) > 1e-3


def test_absolute_values_are_taken_of_the_mean() -> None:
    tool, single = pruner(), x()[:1]
    signed, absolute = (
        collected(tool, single, labels(1), attributor=SMOOTH, aggregate=aggregate) for aggregate in ('signed', 'abs')
    )
    assert all(torch.equal(absolute[name], signed[name].abs()) for name in signed)


def test_integrated_gradients() -> None:
    tool, inputs = pruner(), x()
    passes = [collected(tool, inputs * step, aggregate='signed') for step in torch.linspace(1 / 5, 1, 5)]
    found = collected(tool, attributor=partial(IntegratedGradients, n_iter=5), aggregate='signed')
    assert all(apart(found[name], torch.stack([part[name] for part in passes]).mean(0)) <= 1e-10 for name in found)


def test_several_targets() -> None:
    tool = pruner()
    target = torch.tensor([[0, 2]] * 4)
    found = collected(tool, target=target, attributor=SMOOTH)
    single = [collected(tool, target=target[:, number], attributor=SMOOTH) for number in (0, 1)]
    assert all(apart(found[name], (single[0][name] + single[1][name]) / 2) <= 1e-10 for name in found)


def test_noise_depends_on_the_seed_only() -> None:
    tool = pruner()
    before = torch.get_rng_state()
    first = collected(tool, attributor=SMOOTH, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    again, other = collected(tool, attributor=SMOOTH, seed=1), collected(tool, attributor=SMOOTH, seed=2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_batches_have_different_noise() -> None:
    tool, inputs, target = pruner(), x()[:1], labels(1)
    twice = tool.collect([(inputs, target)] * 2, attributor=SMOOTH, aggregate='signed', progress=False)
    once = collected(tool, inputs, target, attributor=SMOOTH, aggregate='signed')
    assert any(apart(twice[name], once[name]) > 1e-6 for name in twice)


@pytest.mark.parametrize('name', ['residual', 'mixed'])
def test_networks_with_shortcuts_and_batchnorm_run(name: str) -> None:
    relevance = collected(pruner(name), attributor=SMOOTH)
    assert relevance.info['attributor'] == 'SmoothGrad'
    assert all(torch.isfinite(values).all() for _, values in relevance.items())


def test_collectors_of_other_attributors_are_not_merged() -> None:
    tool, found = pruner(), []
    for attributor in (SMOOTH, partial(SmoothGrad, n_iter=5), None):
        with tool.collector(attributor=attributor) as collector:
            collector.update(x(), labels())
        found.append(collector)
    for one, other in ((0, 1), (0, 2), (2, 1)):
        with pytest.raises(zp.PruneError, match='attributor'):
            found[one].merge(found[other])


class Raising(Gradient):
    def forward(self, *_: Any) -> Any:
        raise RuntimeError('the attributor raises')


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.fc(self.a(pixels).relu().mean((2, 3)))


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    'an instance': (lambda: collected(pruner(), attributor=Gradient(chain())), 'function from a model'),
    'no Attributor': (lambda: collected(pruner(), attributor=lambda model: model), 'made a Passes'),
    'a name': (lambda: collected(pruner(), attributor='smooth'), "'smooth'.*SmoothGrad"),
    'with rules': (lambda: collected(pruner(), attributor=lambda m: Gradient(m, composite())), 'without composite'),
    'with a start': (
        lambda: collected(pruner(), attributor=lambda m: Gradient(m, attr_output=torch.ones_like)),
        'attr_output',
    ),
    'one that fails': (lambda: collected(pruner(), attributor=Raising), 'Raising.*the attributor raises'),
    'one without passes back': (
        lambda: collected(pruner(), attributor=lambda m: Occlusion(m, window=4, stride=4)),
        'no relevance arrives',
    ),
    'inputs by name': (
        lambda: zp.Pruner(seeded(Words()), None, {'pixels': images()}).collect(
            [({'pixels': images()}, labels())], attributor=Gradient, progress=False
        ),
        'single tensor.*dict',
    ),
}


@pytest.mark.parametrize('kind', BAD)
def test_bad_attributors(kind: str) -> None:
    action, message = BAD[kind]
    with pytest.raises(zp.PruneError, match=message):
        action()


def test_attributors_leave_the_network_alone() -> None:
    model = chain().double()
    weights = [tensor.clone() for tensor in model.parameters()]
    zp.Pruner(model, composite(), x()).collect([(x(), labels())], attributor=SMOOTH, progress=False)
    assert all(torch.equal(old, new) and new.grad is None for old, new in zip(weights, model.parameters()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

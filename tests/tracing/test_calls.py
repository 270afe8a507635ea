'''What a trace records of function calls, and that a run finds the same calls again.'''

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from relevance.test_canonize import attribute, conserving
from small import Residual, apart, images, seeded
from torch import nn
from torch.nn import functional as F

import zennit_prune as zp
from zennit_prune.tracing._calls import CallCounter, Site
from zennit_prune.tracing._recorded import FunctionCall
from zennit_prune.util._networks import tensors_in


class Sites(CallCounter):
    '''Where a network calls functions with tensors.'''

    def __init__(self, network: nn.Module):
        super().__init__(network)
        self.sites: dict[Site, list[tuple[int, ...]]] = {}

    def intercept(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        site = self.site
        self.sites[site] = [tuple(tensor.shape) for tensor in tensors_in((args, kwargs))]
        return func(*args, **kwargs)


def ran(model: nn.Module, x: torch.Tensor, grad: bool) -> dict[Site, list[tuple[int, ...]]]:
    counter = Sites(model)
    with torch.set_grad_enabled(grad), counter:
        model(x.clone().requires_grad_(grad))
    return counter.sites


def traced(model: nn.Module, x: torch.Tensor) -> dict[Site, FunctionCall]:
    return {call.site: call for call in zp.trace(model, x)._recording.runs['eval'].functions}


class Attending(nn.Module):
    '''Self- and cross-attention, in every form that ``forward`` takes.'''

    def __init__(self, **options: Any):
        super().__init__()
        self.embed, self.fc = nn.Linear(3, 8), nn.Linear(8, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=3, vdim=3, batch_first=True)
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).mT
        embedded = F.gelu(self.embed(tokens))
        embedded = embedded + self.attention(embedded, embedded, embedded, **self.options)[0]
        embedded = embedded + self.cross(embedded, tokens, tokens, **self.options)[0]
        return self.fc(embedded.mean(1))


class Encoding(nn.Module):
    '''Torch's own encoder layers, which have a fast path of their own.'''

    def __init__(self, **options: Any):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **options)
        self.embed, self.encoder, self.fc = (
            nn.Linear(3, 8),
            nn.TransformerEncoder(layer, 2, None, False),
            nn.Linear(8, 4),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.encoder(self.embed(x.flatten(2).mT)).mean(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    'attention': Attending,
    'attention without weights': lambda: Attending(need_weights=False),
    'masked attention': lambda: Attending(attn_mask=torch.zeros(16, 16)),
    'masked attention without weights': lambda: Attending(attn_mask=torch.zeros(16, 16).bool(), need_weights=False),
    'encoder': Encoding,
    'encoder, norm first': lambda: Encoding(norm_first=True, activation='gelu'),
    'residual': Residual,
}


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('name', NETWORKS)
def test_a_run_finds_the_calls_of_the_trace(name: str, grad: bool) -> None:
    '''Without a gradient, encoder layers take a fast path, where functions are neither met nor needed.'''
    model, x = seeded(NETWORKS[name]()), images(2, 4)
    calls, sites = traced(model, x), ran(model, x, grad)
    met = set(calls) & set(sites)
    assert met == set(calls) or ('encoder' in name and not grad)
    for site in met:
        assert [argument.shape for argument in calls[site].arguments] == sites[site], site
    if 'attention' in name:
        inside = {site.function for site in met if site.module in ('attention', 'cross')}
        attended = {'scaled_dot_product_attention'} if 'without' in name else {'softmax', 'bmm', 'baddbmm'}
        assert 'linear' in inside and attended & inside


@pytest.mark.parametrize('name', NETWORKS)
def test_networks_with_attention_keep_their_output_and_are_met(name: str) -> None:
    model, x = seeded(NETWORKS[name]()).double(), images(2, 4, dtype=torch.float64)
    if name == 'masked attention':
        model.options = {'attn_mask': torch.zeros(16, 16, dtype=torch.float64)}
    with torch.no_grad():
        expected = model(x)
    rules = conserving(zp.GraphCanonizer(model, x))
    output, relevance = attribute(model, rules, x, F.one_hot(torch.arange(2), 4).double())
    assert apart(output, expected) <= 1e-10 and torch.isfinite(relevance).all()
    with rules.context(model) as modified, torch.no_grad():
        assert apart(modified(x), expected) <= 1e-10


class Recorded(nn.Module):
    def __init__(self, step: Callable[[torch.Tensor, torch.Tensor], Any]):
        super().__init__()
        self.conv, self.step = nn.Conv2d(3, 6, 3), step
        self.scale = nn.Parameter(torch.ones(6, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        self.step(x, self.scale)
        return x


CALLS: dict[str, tuple[Callable[..., Any], str, list[int], int | None]] = {
    'out of place': (lambda x, s: x + s, 'add', [0], None),
    'in place': (lambda x, s: x.add_(s), 'add', [0], 0),
    'operator in place': (lambda x, s: _plus_equals(x, s), 'add', [0], 0),
    'constant first': (lambda x, s: s * x, 'mul', [1], None),
    'twice the same': (lambda x, s: x * x, 'mul', [0, 1], None),
    'keyword': (lambda x, s: torch.add(other=x, input=s), 'add', [1], None),
    'keywords of a layer in any order': (
        lambda x, s: F.layer_norm(
            bias=torch.ones(6), weight=s[:, 0, 0], input=x.mT.mT.transpose(1, 3), normalized_shape=(6,)
        ),
        'layer_norm',
        [0],
        None,
    ),
    'nested': (lambda x, s: torch.cat([s.expand_as(x), x], 1), 'cat', [1], None),
    'activation in place': (lambda x, s: F.relu(x, inplace=True), 'relu', [0], 0),
    'method in place': (lambda x, s: x.relu_(), 'relu', [0], 0),
    'no view': (lambda x, s: torch.relu(x[:, :3]), 'relu', [0], None),
}


def _plus_equals(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    x += s
    return x


@pytest.mark.parametrize('name', CALLS)
def test_arguments_that_depend_on_the_input_and_are_written_to(name: str) -> None:
    step, function, active, in_place = CALLS[name]
    calls = [
        call
        for site, call in traced(Recorded(step), images(2)).items()
        if site.function.strip('_').removeprefix('i') == function and site.module == ''
    ]
    assert len(calls) == 1
    assert calls[0].active == active and calls[0].in_place == in_place
    assert calls[0].operations and calls[0].results


def test_calls_without_activations_are_not_recorded() -> None:
    calls = traced(Recorded(lambda x, s: (s * 2).sum()), images(2))
    assert {site.function for site in calls} == {'conv2d'}


def test_modules_made_while_the_network_runs() -> None:
    class Making(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.LeakyReLU()(self.conv(x))
            x = nn.LayerNorm(6, elementwise_affine=False)(x.permute(0, 2, 3, 1))
            return self.fc(nn.AdaptiveAvgPool2d(1)(x.permute(0, 3, 1, 2)).flatten(1))

    model, x = seeded(Making()).double(), images(2, dtype=torch.float64)
    _, relevance = attribute(model, conserving(zp.GraphCanonizer(model, x)), x, F.one_hot(torch.arange(2), 4).double())
    assert relevance.sum((1, 2, 3)).tolist() == pytest.approx([1, 1], abs=1e-6)

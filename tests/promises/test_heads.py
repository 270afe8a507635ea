'''Whole heads of attention, and attributes that forward makes shapes from.'''

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import zennit_prune as zp
from tests.small import apart, images, labels, seeded

HEADS, SIZE, WIDTH = 4, 3, 10


class Attention(nn.Module):
    '''Attention with sizes as attributes, as in timm.'''

    def __init__(self, product: Callable[..., torch.Tensor], norm: bool = False):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = HEADS, SIZE, HEADS * SIZE
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * HEADS * SIZE), nn.Linear(HEADS * SIZE, WIDTH)
        self.norm = nn.LayerNorm(SIZE) if norm else nn.Identity()
        self.product = product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.product(self.norm(q), self.norm(k), v).transpose(1, 2).reshape(n, t, self.attn_dim))


class Net(nn.Module):
    def __init__(self, attention: nn.Module):
        super().__init__()
        self.embed, self.attn, self.head = nn.Conv2d(3, WIDTH, 4, 4), attention, nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attn(x)).mean(1))


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v


ATTENTION: dict[str, Callable[[], nn.Module]] = {
    'function': lambda: Attention(F.scaled_dot_product_attention),
    'by hand': lambda: Attention(by_hand),
    'normalised': lambda: Attention(F.scaled_dot_product_attention, norm=True),
}


def made(name: str) -> tuple[nn.Module, torch.Tensor, zp.graph.ChannelGraph]:
    model, x = seeded(Net(ATTENTION[name]())).double(), images(dtype=torch.float64)
    return model, x, zp.trace(model, x)


@pytest.mark.parametrize('name', ATTENTION)
def test_whole_heads_go(name: str) -> None:
    model, x, graph = made(name)
    group = graph.group('attn.qkv')
    assert group.size == HEADS
    plan = zp.Plan(graph).remove('attn.qkv', [1, 3])
    small = plan.apply(model)
    oracle = copy.deepcopy(model)
    with torch.no_grad():
        oracle.attn.proj.weight.unflatten(1, (HEADS, SIZE))[:, [1, 3]] = 0
    assert apart(small(x), oracle(x)) <= 1e-12
    assert apart(plan.masked(model)(x), oracle(x)) <= 1e-12
    assert apart(oracle(x), model(x)) > 1e-3
    assert (small.attn.num_heads, small.attn.head_dim, small.attn.attn_dim) == (2, SIZE, 2 * SIZE)
    assert (model.attn.num_heads, model.attn.attn_dim) == (HEADS, HEADS * SIZE)
    assert type(small.attn.num_heads) is int
    assert small.attn.qkv.out_features == 3 * 2 * SIZE
    rows = model.attn.qkv.weight.unflatten(0, (3, HEADS, SIZE))[:, [0, 2]].flatten(0, 2)
    assert torch.equal(small.attn.qkv.weight, rows)


def test_heads_are_pruned_in_place_saved_and_pruned_again(tmp_path: Path) -> None:
    model, x, graph = made('function')
    plan = zp.Plan(graph, {'attn.qkv': [0]})
    small = plan.apply(model)
    zp.save(small, plan, tmp_path / 'small.safetensors')
    loaded = zp.load(model, tmp_path / 'small.safetensors')
    assert torch.equal(loaded(x), small(x))
    other = copy.deepcopy(model)
    other.attn.num_heads = 'four'
    with pytest.raises(zp.PruneError, match=r"saved from another network: .*'num_heads'"):
        zp.load(other, tmp_path / 'small.safetensors')
    again = zp.trace(small, x)
    assert again.group('attn.qkv').size == HEADS - 1
    last = zp.Plan(again, {'attn.qkv': [0, 2]}).apply(small)
    plan.apply_(model)
    assert torch.equal(model(x), small(x))
    assert (model.attn.num_heads, last.attn.num_heads) == (HEADS - 1, 1)


def test_heads_have_relevance() -> None:
    model, x, graph = made('function')
    with torch.no_grad():
        model.attn.proj.weight.unflatten(1, (HEADS, SIZE))[:, 2] = 0
    relevance = zp.Pruner(model, None, x).collect([(x, labels())], progress=False)
    assert relevance['attn.qkv'].shape == (HEADS,)
    assert relevance['attn.qkv'].argmin() == 2 and relevance['attn.qkv'][2] == 0
    plan = zp.Plan(graph, {'attn.qkv': [2]})
    masked, small = plan.masked(model), plan.apply(model)
    assert apart(zp.heatmap(masked, None, x, labels()), zp.heatmap(small, None, x, labels())) <= 1e-6


def test_widths_go_where_they_can() -> None:
    class Scaled(Attention):
        def __init__(self) -> None:
            super().__init__(lambda q, k, v: (0.5 * q @ k.mT).softmax(-1) @ v)

    model, x = seeded(Net(Scaled())).double(), images(dtype=torch.float64)
    graph = zp.trace(model, x)
    assert graph.group('attn.qkv').size == SIZE
    small = zp.Plan(graph, {'attn.qkv': [1]}).apply(model)
    assert (small.attn.num_heads, small.attn.head_dim, small.attn.attn_dim) == (HEADS, SIZE - 1, HEADS * (SIZE - 1))


class Derived(Attention):
    '''The width of a head is what the stream's is divided by the number of heads.'''

    def __init__(self) -> None:
        super().__init__(F.scaled_dot_product_attention)
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.product(q, k, v).transpose(1, 2).reshape(n, t, c))


class OfTorch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize('layernorm', ['lock', 'surviving'])
@pytest.mark.parametrize('make', [Derived, OfTorch])
def test_heads_of_a_width_tied_to_the_stream_stay(make: type[nn.Module], layernorm: str) -> None:
    '''A third of everything, or a half, would fit by chance.'''
    model = Net(make())
    model.embed, model.head = nn.Conv2d(3, 12, 4, 4), nn.Linear(12, 4)
    graph = zp.trace(seeded(model), images(), layernorm=layernorm)
    assert graph.groups == ()
    assert '(view in attn' in graph.locked['embed']
    why = graph.why('attn.qkv' if make is Derived else 'attn.attention.in_proj_weight')
    assert ('invalid for input' if make is Derived else 'was expecting embedding dimension of 12') in why


def test_heads_of_timm() -> None:
    timm = pytest.importorskip('timm')
    model = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=3, num_classes=4)
    model, x = seeded(model).double(), images(2, 16, dtype=torch.float64)
    graph = zp.trace(model, x, layernorm='surviving')
    sizes = {group.name: group.size for group in graph.groups}
    assert sizes['blocks.0.attn.qkv'] == sizes['blocks.1.attn.qkv'] == 3 and 12 in sizes.values()
    with pytest.warns(zp.PruneWarning, match='LayerNorm'):
        small = zp.Plan(graph, {group.name: [1] for group in graph.groups}).apply(model)
    assert [block.attn.num_heads for block in small.blocks] == [2, 2]
    assert small(x).shape == (2, 4)


# attributes
class Sized(nn.Module):
    '''Makes a shape from an attribute.'''

    def __init__(self, use: Callable[[Any, torch.Tensor], torch.Tensor], **attributes: Any):
        super().__init__()
        self.first, self.head, self.use = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 4), use
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.use(self, self.first(x)).mean(2))


FOLLOWS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    'reshape': lambda net, x: x.reshape(len(x), net.width, -1),
    'view of a tuple': lambda net, x: x.view((len(x), net.width, 4)),
    'by keyword': lambda net, x: torch.reshape(x, shape=(len(x), net.width, 4)),
    'tuple': lambda net, x: x.view(-1, *net.shape, 4),
    'unflatten': lambda net, x: x.flatten(1).unflatten(1, (net.width, 4)),
    'norm': lambda net, x: net.norm(x.flatten(2).mT.unflatten(0, (-1, 1)).flatten(0, 1)).mT,
}
STAYS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    'number': lambda net, x: x.reshape(len(x), 8, -1),
    'also a factor': lambda net, x: x.reshape(len(x), net.width, -1) / net.width,
    'also another size': lambda net, x: x.reshape(len(x), net.width, 4) * x.new_ones(net.width, 1, 1).expand(
        net.width, len(x), 4)[0].mean() * torch.ones(8)[net.width - 1],
    'computed': lambda net, x: x.reshape(len(x), net.width // 1, -1),
}


@pytest.mark.parametrize('name', FOLLOWS)
def test_attributes_follow(name: str) -> None:
    model = seeded(Sized(FOLLOWS[name], width=8, shape=(8,), norm=nn.LayerNorm(8, elementwise_affine=False))).double()
    x = images(dtype=torch.float64)
    graph = zp.trace(model, x, layernorm='surviving')
    with torch.no_grad():
        plan = zp.Plan(graph, {'first': [0, 5, 6]})
        small = plan.apply(model, verify=True)
    changed = {'norm': small.norm.normalized_shape, 'tuple': small.shape}.get(name, (small.width,))
    assert changed == (5,) and model.width == 8 and model.shape == (8,)


@pytest.mark.parametrize('name', STAYS)
def test_attributes_that_are_more_than_a_size_keep_their_channels(name: str) -> None:
    graph = zp.trace(seeded(Sized(STAYS[name], width=8)), images())
    assert graph.groups == () and graph.locked['first']


class ThreeLayers(nn.Module):
    '''Attention as it is mostly written by hand: three layers, one width of a head.'''

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, SIZE
        self.query, self.key, self.value = (nn.Linear(WIDTH, HEADS * SIZE) for _ in range(3))
        self.proj = nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, self.num_heads, self.head_dim).transpose(1, 2)
                   for layer in (self.query, self.key, self.value))
        return self.proj(((0.5 * q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_channels_that_one_attribute_counts_go_together() -> None:
    model, x = seeded(Net(ThreeLayers())).double(), images(dtype=torch.float64)
    graph = zp.trace(model, x)
    assert {group.name: group.size for group in graph.groups} == {'embed': WIDTH, 'attn.query': SIZE}
    assert 'self.head_dim in attn' in graph.why('attn.value').split('coupled by')[-1]
    small = zp.Plan(graph, {'attn.query': [1], 'embed': [2, 3]}).apply(model)
    assert (small.attn.num_heads, small.attn.head_dim) == (HEADS, SIZE - 1)
    assert small.attn.value.out_features == HEADS * (SIZE - 1)
    oracle = copy.deepcopy(model)
    with torch.no_grad():
        oracle.attn.query.weight.unflatten(0, (HEADS, SIZE))[:, 1] = 0
        oracle.attn.query.bias.unflatten(0, (HEADS, SIZE))[:, 1] = 0
        oracle.attn.proj.weight.unflatten(1, (HEADS, SIZE))[:, :, 1] = 0
        for layer in (oracle.attn.query, oracle.attn.key, oracle.attn.value, oracle.head):
            layer.weight[:, [2, 3]] = 0
    assert apart(small(x), oracle(x)) <= 1e-12 < 1e-3 < apart(oracle(x), model(x))


def test_an_attribute_that_also_counts_what_stays_keeps_its_channels() -> None:
    model = seeded(Sized(lambda net, x: x.view(len(x), net.width, -1) + net.first.bias.view(net.width, 1)
                         + torch.arange(8.0).view(net.width, 1).to(x), width=8))
    graph = zp.trace(model, images())
    assert graph.groups == () and graph.locked['first']

'''LayerNorm over the surviving channels, against oracles that know nothing of the graph.'''

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small import Residual, apart, images, labels, seeded
from torch import nn
from torch.nn import functional as F
from torchvision.models.convnext import CNBlock, LayerNorm2d
from torchvision.ops import Permute

import zennit_prune as zp

WIDTH = 12


class Encoder(nn.Module):
    '''A transformer block as in ViT, on patches of 4 by 4; LayerNorm as modules, as a function, and over no weights.'''

    def __init__(self, width: int = WIDTH, heads: int = 2, size: int = 3):
        super().__init__()
        self.heads, self.scale = heads, size**-0.5
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(torch.zeros(1, 4, width))
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * heads * size)
        self.proj = nn.Linear(heads * size, width)
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.up = nn.Linear(width, 7)
        self.down = nn.Linear(7, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        '''With ``keep``, a mask of channels: the oracle, in which nothing reads the others.'''

        def norm(x: torch.Tensor, weight: Any, bias: Any, eps: float) -> torch.Tensor:
            assert keep is not None
            count = keep.sum()
            mean = (x * keep).sum(-1, keepdim=True) / count
            variance = ((x - mean).square() * keep).sum(-1, keepdim=True) / count
            return (weight * (x - mean) / (variance + eps).sqrt() + bias) * keep

        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        y = self.norm1(x) if keep is None else norm(x, self.norm1.weight, self.norm1.bias, self.norm1.eps)
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        y = ((q @ k.mT) * self.scale).softmax(-1) @ v
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        if keep is None:
            y = F.layer_norm(x, x.shape[-1:], weight=self.weight, bias=self.bias, eps=1e-3)
        else:
            y = norm(x, self.weight, self.bias, 1e-3)
        x = x + self.down(F.gelu(self.up(y)))
        y = F.layer_norm(x, x.shape[-1:]) if keep is None else norm(x, 1, 0, 1e-5)
        return self.head(y.mean(1))


class ConvNeXt(nn.Module):
    '''Two stages of torchvision's blocks.'''

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 2, 2)
        self.norm = LayerNorm2d(WIDTH)
        self.blocks = nn.Sequential(CNBlock(WIDTH, 1.0, 0.0), CNBlock(WIDTH, 1.0, 0.0))
        self.last = LayerNorm2d(WIDTH)
        self.down = nn.Conv2d(WIDTH, 6, 2, 2)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        def norm(layer: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
            assert keep is not None
            mask = keep.view(-1, 1, 1)
            mean = (x * mask).sum(1, keepdim=True) / keep.sum()
            variance = ((x - mean).square() * mask).sum(1, keepdim=True) / keep.sum()
            y = (x - mean) / (variance + layer.eps).sqrt()
            return (y * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)) * mask

        if keep is None:
            return self.head(self.down(self.last(self.blocks(self.norm(self.stem(x))))).mean((2, 3)))
        x = norm(self.norm, self.stem(x))
        for block in self.blocks:
            depthwise, _, layer, up, act, down, _ = block.block
            y = norm(layer, depthwise(x)).permute(0, 2, 3, 1)
            x = x + block.layer_scale * down(act(up(y))).permute(0, 3, 1, 2)
        return self.head(self.down(norm(self.last, x)).mean((2, 3)))


NETS = {'encoder': (Encoder, 'embed'), 'convnext': (ConvNeXt, 'stem')}
GONE = [0, 3, 4, 9]


def made(net: str) -> tuple[nn.Module, torch.Tensor, zp.graph.ChannelGraph]:
    model, x = seeded(NETS[net][0]()).double(), images(dtype=torch.float64)
    return model, x, zp.trace(model, x, layernorm='surviving')


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', zp.PruneWarning)
        yield


@pytest.mark.parametrize('net', NETS)
def test_pruned_networks_take_statistics_over_the_surviving_channels(net: str) -> None:
    model, x, graph = made(net)
    stream = graph.group(NETS[net][1])
    assert stream.size == WIDTH
    keep = torch.ones(WIDTH, dtype=torch.float64)
    keep[GONE] = 0
    expected = model(x, keep)
    assert apart(expected, model(x)) > 1e-2  # the oracle is another network
    plan = zp.Plan(graph, {stream.name: GONE})
    with quiet():
        small = plan.apply(model)
    assert apart(small(x), expected) <= 1e-12
    assert apart(plan.masked(model)(x), expected) <= 1e-12
    for module in small.modules():
        if isinstance(module, nn.LayerNorm):
            assert module.normalized_shape == (8,) == tuple(module.weight.shape)


@pytest.mark.parametrize('net', NETS)
def test_masked_networks_explain_copy_and_train_as_pruned_ones_do(net: str) -> None:
    model, x, graph = made(net)
    plan = zp.Plan(graph, {group.name: [1, 2] for group in graph.groups if group.size > 2})
    with quiet():
        small = plan.apply(model)
    masked = plan.masked(model)
    assert type(masked) is type(model)
    assert apart(zp.heatmap(masked, None, x, labels()), zp.heatmap(small, None, x, labels())) <= 1e-6
    twin, other = copy.deepcopy(masked), pickle.loads(pickle.dumps(masked))
    masked.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in masked.state_dict().items()})
    for network in (twin, other):
        assert type(network) is type(model) and apart(network(x), small(x)) <= 1e-12
        assert len(zp.trace(network, x).groups)
    assert masked(x).abs().max() == 0


def test_the_change_of_statistics_is_warned_of() -> None:
    model, _, graph = made('encoder')
    with pytest.warns(zp.PruneWarning, match=r"LayerNorm runs over .*'norm1'.*more than the removal") as warned:
        zp.Plan(graph, {'embed': [0]}).apply(model)
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        zp.Plan(graph, {'up': [0]}).apply(model)


def test_channels_are_locked_unless_asked_for() -> None:
    model, x = seeded(Encoder()), images()
    graph = zp.trace(model, x)
    assert 'LayerNorm runs over it' in graph.locked['embed']
    assert 'embed' in {group.name for group in zp.Pruner(model, None, x, layernorm='surviving').graph.groups}
    with pytest.raises(zp.PruneError, match="neither 'lock'"):
        zp.trace(model, x, layernorm='all')


def test_a_wrong_network_is_found() -> None:
    model, x, graph = made('encoder')
    plan = zp.Plan(graph, {'embed': GONE})
    with quiet():
        small = plan.apply(model)
    small.norm1.eps = 0.1
    with pytest.raises(zp.VerificationError):
        zp.verify(model, small, plan, x)


class Wide(nn.Module):
    '''One norm between two layers.'''

    def __init__(self, norm: nn.Module, axes: tuple[int, ...] = (0, 1, 2, 3)):
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 4, 6)
        self.axes = axes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.first(x).permute(self.axes)).permute(self.axes)).flatten(1)


class Called(nn.Module):
    def __init__(self, call: Callable[[torch.Tensor], Any]):
        super().__init__()
        self.call = call

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(x)


def test_norms_over_space_too() -> None:
    model, x = seeded(Wide(nn.LayerNorm((8, 6, 6)))).double(), images(dtype=torch.float64)
    plan = zp.Plan(zp.trace(model, x, layernorm='surviving'), {'first': [0, 7]})
    with quiet():
        small = plan.apply(model)
    y = model.first(x)[:, 1:7]
    y = F.layer_norm(y, (6, 6, 6), model.norm.weight[1:7], model.norm.bias[1:7])
    assert apart(small(x), F.conv2d(y, model.head.weight[:, 1:7], model.head.bias).flatten(1)) <= 1e-12
    assert small.norm.normalized_shape == (6, 6, 6)


@pytest.mark.parametrize(
    'call',
    [lambda x: F.layer_norm(x, (8,)), lambda x: torch.native_layer_norm(x, x.shape[-1:], None, None, 1e-5)[0]],
)
def test_what_cannot_follow_is_locked(call: Callable[[torch.Tensor], Any]) -> None:
    model, x = seeded(Wide(Called(call), (0, 3, 2, 1))).double(), images(dtype=torch.float64)
    graph = zp.trace(model, x, layernorm='surviving')
    assert not graph.groups and graph.locked['first']


def test_iterating_and_latency_budgets_know_these_channels() -> None:
    model, x = seeded(ConvNeXt()), images(8)
    pruner = zp.Pruner(model, None, x, layernorm='surviving')
    with quiet():
        result = pruner.iterate([(x, labels(8))], zp.Budget(flops=0.5), step=0.3, progress=False)
    assert result.model.stem.out_channels < WIDTH
    plan = pruner.plan(result.relevance, zp.Budget(latency_fraction=0.96))
    assert plan.timing is not None
    with quiet():
        small = zp.prune(model, None, [(x, labels(8))], zp.Budget(flops=0.3), progress=False, layernorm='surviving')
    assert small.stem.out_channels < WIDTH


def test_permutes_are_seen_through() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 8, 3), Permute([0, 2, 3, 1]), nn.LayerNorm(8), nn.Linear(8, 5), nn.ReLU(),
                                 nn.Flatten(1, 2), Called(lambda x: x.mean(1)), nn.Linear(5, 4)))
    model.insert(0, nn.LayerNorm(8, elementwise_affine=False))  # of the input, which has no channels to lose
    graph = zp.trace(model, images(), layernorm='surviving')
    assert {group.name: group.size for group in graph.groups} == {'1': 8, '4': 5}
    with quiet():
        assert zp.Plan(graph, {'1': [0]}).apply(model)[3].normalized_shape == (7,)


def test_masked_networks_with_computed_weights_can_be_pickled() -> None:
    model = seeded(Residual())
    nn.utils.parametrizations.weight_norm(model.stem)
    masked = zp.Plan(zp.trace(model, images(1)), {'block1.conv1': [0, 1]}).masked(model)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(masked))(images()), masked(images()))
    assert model.stem._load_state_dict_pre_hooks

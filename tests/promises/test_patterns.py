'''One small network per pattern people write: pruned exactly, or locked with a reason.'''

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from oracles.oracle import assert_rows, reading_dims, silenced
from small import drawn_of
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import FrozenBatchNorm2d

import zennit_prune as zp
from zennit_prune.surgery._verify import compare
from zennit_prune.tracing._boundaries import einsum

Forward = Callable[..., Any]


class Net(nn.Module):
    '''A network of named layers and parameters whose forward is a function.'''

    def __init__(self, forward: Forward, **parts: Any):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


@dataclass
class Answer:
    features: Any
    logits: torch.Tensor


class Pattern(NamedTuple):
    '''A network, and what is expected: sizes of groups by name; parts of the reasons for which layers are locked.

    For the oracle: along which dimensions parameters are read that no layer holds, and which layers' outputs are
    multiplied with others, so that no weight reads them.
    '''

    make: Callable[[], Net]
    groups: dict[str, int] | None = None
    locked: dict[str, str] | None = None
    example: Callable[[], Any] = lambda: image()
    reads: dict[str, int] = {}
    meeting: tuple[str, ...] = ()


def image(size: int = 6) -> torch.Tensor:
    return torch.randn(3, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def conv(inputs: int, outputs: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def classified(net: Net, h: torch.Tensor) -> torch.Tensor:
    return net.head(h.mean((2, 3)))


def one_layer(change: Forward, width: int = 8, out: int | None = None, **parts: Any) -> Callable[[], Net]:
    '''``conv``, what ``change`` does with its output, ``head``.'''

    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        return classified(net, change(net, net.conv(x)))

    return lambda: Net(forward, conv=conv(3, width), head=nn.Linear(out or width, 4), **parts)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))))


def with_buffer(make: Callable[[], Net], **buffers: torch.Tensor) -> Callable[[], Net]:
    def made() -> Net:
        net = make()
        for name, tensor in buffers.items():
            net.register_buffer(name, tensor)
        return net

    return made


def noise(*shape: int) -> torch.Tensor:
    return parameter(*shape).data


def tokens(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.conv(x).flatten(2).transpose(1, 2)


def attention(scores: Forward) -> Callable[[], Net]:
    '''Attention by hand; ``scores`` makes weights of queries and keys.'''

    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        h = tokens(net, x)
        return net.head((scores(net.query(h), net.key(h)) @ net.value(h)).mean(1))

    return lambda: Net(forward, **attending())


def attending() -> dict[str, nn.Module]:
    return {'conv': conv(3, 8), 'query': nn.Linear(8, 6), 'key': nn.Linear(8, 6), 'value': nn.Linear(8, 5),
            'head': nn.Linear(5, 4)}


def padded_tokens(net: Net, x: torch.Tensor) -> torch.Tensor:
    h = tokens(net, x)
    query, key, value = (F.pad(layer(h), (0, 0, 1, 1), value=net.value_of_pad)
                         for layer in (net.query, net.key, net.value))
    return net.head(((query @ key.transpose(1, 2) * 0.4).softmax(-1) @ value).mean(1))


def two_heads(net: Net, x: torch.Tensor) -> torch.Tensor:
    h = tokens(net, x)
    query, key, value = (layer(h).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (net.query, net.key, net.value))
    mixed = (query @ key.transpose(-2, -1) * 0.4).softmax(-1) @ value
    return net.head(mixed.transpose(1, 2).flatten(2)).mean(1)


def split_path(net: Net, x: torch.Tensor) -> torch.Tensor:
    left, right = net.conv(x).split([3, 5], 1)
    return classified(net, torch.cat([right, left], 1))


def cached(net: Net, x: torch.Tensor) -> torch.Tensor:
    h = net.conv(x)
    if getattr(net, 'cache', None) is None:
        net.cache = torch.ones(h.shape[2:], dtype=h.dtype, device=h.device)
    net.last = h
    return classified(net, h * net.cache)


def auxiliary(net: Net, x: torch.Tensor) -> Any:
    h = net.conv(x)
    y = classified(net, net.next(h))
    return (y, net.side(h.mean((2, 3)))) if net.training else y


def in_place(net: Net, x: torch.Tensor) -> torch.Tensor:
    h = net.conv(x)
    left, right = h.chunk(2, 1)
    left.mul_(2).add_(right)
    h.relu_()
    h += net.other(x)
    return classified(net, h)


def shared_twice(net: Net, x: torch.Tensor) -> torch.Tensor:
    h = net.conv(x)
    return classified(net, net.same(F.silu(net.same(h))))


def grown(net: Net, x: torch.Tensor) -> torch.Tensor:
    '''An answer whose features the caller reads.'''
    h = net.conv(x)
    return h, classified(net, net.next(h))


def stack(**parts: Any) -> Callable[[Forward], Callable[[], Net]]:
    return lambda forward: lambda: Net(forward, conv=conv(3, 8), head=nn.Linear(8, 4), **parts)


def selected(net: Net, x: torch.Tensor) -> torch.Tensor:
    left, right = net.left(x), net.right(x)
    weights = net.choose(net.squeeze((left + right).mean((2, 3), keepdim=True)).relu()).unflatten(1, (2, -1)).softmax(1)
    return classified(net, (torch.stack([left, right], 1) * weights).sum(1))


def c2f(net: Net, x: torch.Tensor) -> torch.Tensor:
    parts = list(net.first(x).chunk(2, 1))
    for layer in (net.a, net.b):
        parts.append(layer(parts[-1]))
    return classified(net, net.last(torch.cat(parts, 1)))


def unet(net: Net, x: torch.Tensor) -> torch.Tensor:
    top = net.top(x).relu()
    return classified(net, net.last(torch.cat([top, net.up(net.down(top).relu())], 1)).relu())


def non_local(net: Net, x: torch.Tensor) -> torch.Tensor:
    h = net.conv(x)
    query, key, value = (layer(h).flatten(2) for layer in (net.query, net.key, net.value))
    mixed = value @ (query.transpose(1, 2) @ key).softmax(-1).transpose(1, 2)
    return classified(net, h + net.out(mixed.unflatten(2, h.shape[2:])))


def picked(net: Net, x: torch.Tensor) -> torch.Tensor:
    qkv = net.qkv(tokens(net, x)).unflatten(-1, (3, -1)).permute(2, 0, 1, 3)
    query, key, value = qkv[0] * 0.4, qkv[1], qkv[2]
    return net.head(((query @ key.transpose(1, 2)).softmax(-1) @ value).mean(1))


FREE = {'conv': 8}
torch.manual_seed(0)  # some hold layers that are made here
PATTERNS: dict[str, Pattern] = {
    # locked, and why
    'final layer': Pattern(one_layer(lambda net, h: h), FREE, {'head': 'output of the network'}),
    'hard-coded view': Pattern(
        one_layer(lambda net, h: h.view(-1, 2, 4, 6, 6).flatten(1, 2)), {}, {'conv': 'view in the network itself'}
    ),
    'view with the sizes that a module keeps': Pattern(
        one_layer(lambda net, h: net.inner(h), inner=nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Flatten(1, 2))),
        {'conv': 4},
    ),
    'uneven split': Pattern(lambda: Net(split_path, conv=conv(3, 8), head=nn.Linear(8, 4)), {}, {'conv': 'split'}),
    'computed scale': Pattern(one_layer(lambda net, h: h / h.shape[1] ** 0.5), {}, {'conv': 'a number changes'}),
    'constant scale': Pattern(one_layer(lambda net, h: h / math.sqrt(8)), FREE),
    'tensor of the width': Pattern(
        one_layer(lambda net, h: h / torch.tensor(h.shape[1])), {}, {'conv': 'a number changes'}
    ),
    'fixed slice': Pattern(
        one_layer(lambda net, h: torch.cat([h[:, :3].relu(), h[:, 3:]], 1)), {'conv': 5}, {'conv': '3 of 8'}
    ),
    'fixed channel': Pattern(one_layer(lambda net, h: h * h[:, :1].sigmoid()), {'conv': 7}, {'conv': '1 of 8'}),
    'feature extractor': Pattern(
        lambda: Net(grown, conv=conv(3, 8), next=conv(8, 6), head=nn.Linear(6, 4)),
        {'next': 6},
        {'conv': 'output of the network'},
    ),
    'softmax over channels': Pattern(one_layer(lambda net, h: h.softmax(1)), {}, {'conv': 'softmax'}),
    'normalised channels': Pattern(one_layer(lambda net, h: F.normalize(h, dim=1)), {}, {'conv': 'norm'}),
    'local response norm': Pattern(
        one_layer(lambda net, h: net.norm(h), norm=nn.LocalResponseNorm(3)), {}, {'conv': 'in norm'}
    ),
    'layer norm': Pattern(
        one_layer(lambda net, h: net.norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=nn.LayerNorm(8)),
        {},
        {'conv': 'LayerNorm'},
    ),
    'fixed permutation': Pattern(
        one_layer(lambda net, h: h[:, [2, 0, 1, 3, 4, 7, 6, 5]]), {}, {'conv': 'selected by a tensor'}
    ),
    'top channels': Pattern(one_layer(lambda net, h: h.topk(2, 1)[0], out=2), {}, {'conv': 'topk'}),
    'plain tensor attribute': Pattern(
        one_layer(lambda net, h: h * net.plain, plain=noise(8, 1, 1).double()), {}, {'conv': 'fixed size'}
    ),
    'rolled channels': Pattern(one_layer(lambda net, h: h.roll(1, 1)), {}, {'conv': 'other channels come out'}),
    'rolled rows and columns': Pattern(one_layer(lambda net, h: h.roll((1, -2), (2, -1)) * h), {'conv': 8}),
    'rolled flat': Pattern(one_layer(lambda net, h: h.roll(1)), {}, {'conv': 'no rule covers'}),
    'nn.MultiheadAttention': Pattern(
        lambda: Net(
            lambda net, x: net.head(net.mix(*[tokens(net, x)] * 3)[0].mean(1)),
            conv=conv(3, 8),
            mix=nn.MultiheadAttention(8, 2, batch_first=True),
            head=nn.Linear(8, 4),
        )
    ),
    'nn.LSTM': Pattern(
        lambda: Net(
            lambda net, x: net.head(net.mix(tokens(net, x))[0].mean(1)),
            conv=conv(3, 8),
            mix=nn.LSTM(8, 6, batch_first=True),
            head=nn.Linear(6, 4),
        ),
        {},
        {'mix.weight_ih_l0': 'mix'},
    ),
    # arguments and answers
    'dict in, dict out': Pattern(
        stack()(lambda net, images, shift: {'logits': classified(net, net.conv(images)) + shift}),
        FREE,
        example=lambda: {'images': image(), 'shift': torch.ones(3, 4, dtype=torch.float64)},
    ),
    'tuple of arguments': Pattern(
        stack()(lambda net, x, y: classified(net, net.conv(x) + net.conv(y))), FREE, example=lambda: (image(), image())
    ),
    'nested arguments': Pattern(
        stack()(lambda net, batch: classified(net, net.conv(batch['views'][0]))),
        FREE,
        example=lambda: ({'views': [image()]},),
    ),
    'tuple out': Pattern(
        stack()(lambda net, x: (classified(net, net.conv(x)), [net.conv(x).mean((1, 2, 3))])),
        {},
        {'conv': 'mean runs over it'},
    ),
    'dataclass out': Pattern(
        stack(next=conv(8, 6))(lambda net, x: (lambda h: Answer(net.next(h), classified(net, h)))(net.conv(x))),
        FREE,
        {'next': 'output of the network'},
    ),
    # reuse and sharing
    'module called twice': Pattern(stack(same=conv(8, 8))(shared_twice), FREE),
    'tied weights': Pattern(
        lambda: Net(
            lambda net, x: F.linear(F.relu(F.linear(x.flatten(1), net.weight, net.bias)), net.weight.t()),
            weight=parameter(8, 108),
            bias=parameter(8),
        ),
        {'weight': 8},
        reads={'weight': 0},
    ),
    'shared parameter': Pattern(
        stack(weight=parameter(8, 8, 1, 1))(
            lambda net, x: classified(net, F.conv2d(F.relu(F.conv2d(net.conv(x), net.weight)), net.weight))
        ),
        FREE,
    ),
    'embedding tied to the output': Pattern(
        lambda: Net(lambda net, x: F.linear(F.relu(net.embed(x)), net.embed.weight), embed=nn.Embedding(7, 6)),
        None,
        None,
        example=lambda: torch.arange(6).view(2, 3),
    ),
    'unused layer': Pattern(
        stack(unused=conv(8, 5))(lambda net, x: classified(net, net.conv(x))), FREE, {'unused': 'not used'}
    ),
    # kinds of layers
    'functional convolution': Pattern(
        lambda: Net(
            lambda net, x: classified(net, F.conv2d(x, net.weight, net.bias)),
            weight=parameter(8, 3, 1, 1),
            bias=parameter(8),
            head=nn.Linear(8, 4),
        ),
        {'weight': 8},
    ),
    'transposed convolution': Pattern(
        one_layer(lambda net, h: net.up(h), out=6, up=nn.ConvTranspose2d(8, 6, 2, 2)), {'conv': 8, 'up': 6}
    ),
    'one-dimensional convolution': Pattern(
        one_layer(lambda net, h: net.along(h.flatten(2)).unsqueeze(-1), out=6, along=nn.Conv1d(8, 6, 3)),
        {'conv': 8, 'along': 6},
    ),
    'three-dimensional convolution': Pattern(
        one_layer(lambda net, h: net.volume(h.unsqueeze(2)).squeeze(2), out=6, volume=nn.Conv3d(8, 6, 1)),
        {'conv': 8, 'volume': 6},
    ),
    'circular padding': Pattern(
        one_layer(lambda net, h: net.round(h), out=6, round=conv(8, 6, 3, padding_mode='circular')),
        {'conv': 8, 'round': 6},
    ),
    'reflected padding': Pattern(
        one_layer(lambda net, h: net.mirror(h), out=6, mirror=conv(8, 6, 3, padding_mode='reflect')),
        {'conv': 8, 'mirror': 6},
    ),
    'replicated padding': Pattern(
        one_layer(lambda net, h: net.edge(h), out=6, edge=conv(8, 6, 3, padding_mode='replicate')),
        {'conv': 8, 'edge': 6},
    ),
    'padding with ones': Pattern(
        one_layer(lambda net, h: net.next(F.pad(h, (1, 0, 2, 1), value=1.0)), out=6, next=conv(8, 6, 3)),
        {'conv': 8, 'next': 6},
    ),
    'padding with ones, cropped and pooled': Pattern(
        one_layer(
            lambda net, h: net.next(F.max_pool2d(F.pad(h, (-1, 2, 1, 0), value=-1.0), 2)), out=6, next=conv(8, 6, 3)
        ),
        {'conv': 8, 'next': 6},
    ),
    'padding modules': Pattern(
        one_layer(
            lambda net, h: net.next(net.constant(net.zero(h))), out=6, next=conv(8, 6, 3), zero=nn.ZeroPad2d(1),
            constant=nn.ConstantPad2d((0, 1, 2, 0), 0.5),
        ),
        {'conv': 8, 'next': 6},
    ),
    'padding functions': Pattern(
        one_layer(
            lambda net, h: net.next(
                F.pad(F.pad(F.pad(h, (1, 2, 0, 1), 'circular'), (2, 0, 0, 1), mode='reflect'), [1] * 4, 'replicate')
            ),
            out=6, next=conv(8, 6, 3),
        ),
        {'conv': 8, 'next': 6},
    ),
    'padding in one dimension': Pattern(
        one_layer(
            lambda net, h: net.next(net.pad(F.pad(net.along(h.flatten(2)), (2, 1), value=3.0))).unsqueeze(-1), out=5,
            along=nn.Conv1d(8, 6, 3, padding=1, padding_mode='circular'), pad=nn.ReflectionPad1d(2),
            next=nn.Conv1d(6, 5, 3),
        ),
        {'conv': 8, 'along': 6, 'next': 5},
    ),
    'padding in three dimensions': Pattern(
        one_layer(
            lambda net, h: net.next(F.pad(net.pad(net.volume(h[:, :, None])), [0, 1] * 3, value=2.0)).flatten(2, 3),
            out=5, volume=nn.Conv3d(8, 6, 3, padding=1, padding_mode='circular'), pad=nn.ReplicationPad3d(1),
            next=nn.Conv3d(6, 5, 2),
        ),
        {'conv': 8, 'volume': 6, 'next': 5},
    ),
    'channels padded with ones': Pattern(
        one_layer(lambda net, h: net.next(F.pad(h, (0, 0, 0, 0, 1, 3), value=1.0)), out=6, next=conv(12, 6)),
        {'conv': 8, 'next': 6},
    ),
    'rows padded with ones, then flattened': Pattern(
        lambda: Net(
            lambda net, x: net.head(net.wide(F.pad(net.conv(x), (1, 0), value=1.0).flatten(1)).relu()),
            conv=conv(3, 8), wide=nn.Linear(336, 6), head=nn.Linear(6, 4),
        ),
        {'conv': 8, 'wide': 6},
    ),
    'tokens padded with zeros': Pattern(lambda: Net(padded_tokens, **attending(), value_of_pad=0.0),
                                        {'conv': 8, 'query': 6, 'value': 5}, meeting=('query',)),
    'tokens padded with ones': Pattern(
        lambda: Net(padded_tokens, **attending(), value_of_pad=1.0), {'conv': 8, 'value': 5},
        {'query': 'activations are multiplied', 'key': 'that are not zero where their weights are'},
    ),
    'einsum': Pattern(
        one_layer(lambda net, h: torch.einsum('bchw,dc->bdhw', h, net.matrix), out=5, matrix=parameter(5, 8)),
        {'conv': 8, 'matrix': 5},
    ),
    'bilinear pooling': Pattern(
        lambda: Net(
            lambda net, x: net.head(
                torch.einsum('bi,bj->bij', net.conv(x).mean((2, 3)), net.other(x).mean((2, 3))).flatten(1)
            ),
            conv=conv(3, 4),
            other=conv(3, 5),
            head=nn.Linear(20, 4),
        )
    ),
    'attention by hand': Pattern(
        attention(lambda q, k: (q @ k.transpose(1, 2) * 0.4).softmax(-1)), {'conv': 8, 'query': 6, 'value': 5},
        meeting=('query',),
    ),
    'two heads by hand': Pattern(
        lambda: Net(
            two_heads,
            conv=conv(3, 8),
            query=nn.Linear(8, 12),
            key=nn.Linear(8, 12),
            value=nn.Linear(8, 8),
            head=nn.Linear(8, 4),
        ),
        meeting=('query',),
    ),
    'scale before the scores': Pattern(
        attention(lambda q, k: ((q / q.shape[-1] ** 0.5) @ k.transpose(1, 2)).softmax(-1)),
        {'conv': 8, 'value': 5},
        {'query': 'a number changes'},
    ),
    'instance norm': Pattern(
        one_layer(lambda net, h: net.norm(h).relu(), norm=nn.InstanceNorm2d(8, affine=True)), FREE
    ),
    'dropout': Pattern(one_layer(lambda net, h: net.drop(h), drop=nn.Dropout2d(0.5)), FREE),
    'auxiliary head in training': Pattern(
        lambda: Net(auxiliary, conv=conv(3, 8), next=conv(8, 6), side=nn.Linear(8, 4), head=nn.Linear(6, 4)),
        {'conv': 8, 'next': 6},
    ),
    'in-place operations': Pattern(stack(other=conv(3, 8))(in_place), {'conv': 4}),
    'buffer per channel': Pattern(
        with_buffer(one_layer(lambda net, h: (h - net.mean) * 2), mean=noise(1, 8, 1, 1)), FREE
    ),
    'integer buffer selects': Pattern(
        with_buffer(one_layer(lambda net, h: h[:, net.order]), order=torch.arange(8).flip(0)),
        {},
        {'conv': 'selected by a tensor'},
    ),
    'cache made in forward': Pattern(lambda: Net(cached, conv=conv(3, 8), head=nn.Linear(8, 4)), FREE),
    'repeated channels': Pattern(one_layer(lambda net, h: h.repeat(1, 2, 1, 1), out=16), FREE),
    'interleaved channels': Pattern(one_layer(lambda net, h: h.repeat_interleave(2, 1), out=16), FREE),
    'maxout': Pattern(one_layer(lambda net, h: h.view(len(h), 2, -1, 6, 6).amax(1), out=4), {'conv': 4}),
    'standardised weights': Pattern(
        one_layer(
            lambda net, h: F.conv2d(h, net.weight / net.weight.std((1, 2, 3), keepdim=True)),
            out=6,
            weight=parameter(6, 8, 1, 1),
        ),
        {'weight': 6},
        {'conv': 'std runs over it'},
    ),
    'mixture of kernels': Pattern(
        one_layer(
            lambda net, h: F.conv2d(h, (h.mean((0, 2, 3))[:2, None, None, None, None] * net.kernels).sum(0)),
            out=6,
            kernels=parameter(2, 6, 8, 1, 1),
        ),
        {'conv': 6, 'kernels': 6},
        reads={'kernels': 2},
    ),
    # moving and mixing channels
    'channel shuffle': Pattern(
        one_layer(lambda net, h: net.next(h.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)), next=conv(8, 8)),
        {'conv': 4, 'next': 8},
    ),
    'channel shuffle of groups': Pattern(
        one_layer(
            lambda net, h: net.next(net.shuffle(net.mix(h))),
            mix=conv(8, 8, groups=2),
            next=conv(8, 8, groups=2),
            shuffle=nn.ChannelShuffle(2),
        )
    ),
    'pixel shuffle': Pattern(one_layer(lambda net, h: F.pixel_shuffle(h, 2), width=16, out=4), {'conv': 4}),
    'pixel unshuffle': Pattern(
        one_layer(lambda net, h: net.next(F.pixel_unshuffle(h, 2)), out=6, next=conv(32, 6)), {'conv': 8, 'next': 6}
    ),
    'even split': Pattern(
        one_layer(lambda net, h: torch.cat(h.split(4, 1)[::-1], 1), out=8), None, {'conv': 'split'}
    ),
    'even chunks': Pattern(one_layer(lambda net, h: torch.cat(h.chunk(2, 1), 1)), {'conv': 8}),
    'crossed chunks': Pattern(one_layer(lambda net, h: torch.cat(h.chunk(2, 1)[::-1], 1)), {'conv': 8}),
    'gated linear unit': Pattern(one_layer(lambda net, h: F.glu(h, 1), out=4), {'conv': 4}),
    'gated linear unit along the last dimension': Pattern(
        one_layer(lambda net, h: net.gate(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), out=4, gate=nn.GLU()), {'conv': 4}
    ),
    'gated over space': Pattern(one_layer(lambda net, h: F.glu(h)), FREE),
    'gated by its other half': Pattern(
        one_layer(lambda net, h: (lambda a, b: a * b.sigmoid())(*h.chunk(2, 1)), out=4), {'conv': 4}
    ),
    'selective kernels': Pattern(
        lambda: Net(selected, left=conv(3, 8, 3), right=conv(3, 8, 5), squeeze=conv(8, 4), choose=conv(4, 16),
                    head=nn.Linear(8, 4)),
        {'left': 8, 'squeeze': 4},
    ),
    'C2f': Pattern(
        lambda: Net(c2f, first=conv(3, 8), a=conv(4, 4, 3), b=conv(4, 4, 3), last=conv(16, 6), head=nn.Linear(6, 4)),
        {'first': 4, 'a': 4, 'b': 4, 'last': 6},
    ),
    'concat of different kinds': Pattern(
        lambda: Net(
            lambda net, x: net.head(torch.cat([net.conv(x), x, net.other(x).tanh()], 1).mean((2, 3))),
            conv=conv(3, 8), other=conv(3, 5), head=nn.Linear(16, 4),
        ),
        {'conv': 8, 'other': 5},
    ),
    'channel-padded shortcut': Pattern(
        one_layer(lambda net, h: net.next(h) + F.pad(h, (0, 0, 0, 0, 0, 4)), out=12, next=conv(8, 12))
    ),
    'strided slices of space': Pattern(one_layer(lambda net, h: h[:, :, ::2, 1::2]), FREE),
    'strided slice of channels': Pattern(
        one_layer(lambda net, h: h[:, ::2], out=4), {}, {'conv': 'sliced at fixed positions'}
    ),
    'flipped space': Pattern(one_layer(lambda net, h: h.flip(2, 3) + h), FREE),
    'flipped channels': Pattern(one_layer(lambda net, h: net.next(h.flip(1)), out=6, next=conv(8, 6)),
                                {'conv': 8, 'next': 6}),
    'U-Net skip': Pattern(
        lambda: Net(unet, top=conv(3, 6, 3), down=nn.Conv2d(6, 8, 2, 2), up=nn.ConvTranspose2d(8, 5, 2, 2),
                    last=conv(11, 7, 3), head=nn.Linear(7, 4)),
        {'top': 6, 'down': 8, 'up': 5, 'last': 7},
    ),
    'siamese branches': Pattern(
        stack()(lambda net, x: net.head((net.conv(x) - net.conv(x.flip(3))).abs().mean((2, 3)))), FREE
    ),
    'grouped transposed convolution': Pattern(
        one_layer(lambda net, h: net.up(h), out=12, up=nn.ConvTranspose2d(8, 12, 2, 2, groups=2)), {'conv': 8, 'up': 12}
    ),
    'depthwise transposed convolution': Pattern(
        one_layer(lambda net, h: net.up(h), out=16, up=nn.ConvTranspose2d(8, 16, 3, 2, groups=8)), FREE
    ),
    'grouped transposed convolution as a function': Pattern(
        one_layer(lambda net, h: F.conv_transpose2d(h, net.weight, groups=2), out=6, weight=parameter(8, 3, 2, 2)),
        {'conv': 8, 'weight': 3},
        reads={'weight': 0},
    ),
    'PReLU per channel': Pattern(one_layer(lambda net, h: net.act(h), act=nn.PReLU(8)), FREE),
    'PReLU for all': Pattern(one_layer(lambda net, h: net.act(h), act=nn.PReLU()), FREE),
    'instance norm with statistics': Pattern(
        one_layer(
            lambda net, h: net.norm(h).relu(), norm=nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        )
    ),
    'frozen batch norm': Pattern(one_layer(lambda net, h: net.norm(h), norm=FrozenBatchNorm2d(8)), FREE),
    'parameter per channel': Pattern(
        one_layer(lambda net, h: h * net.scale + net.shift, scale=parameter(1, 8, 1, 1), shift=parameter(8, 1, 1)), FREE
    ),
    'non-local block': Pattern(
        lambda: Net(non_local, conv=conv(3, 8), query=conv(8, 4), key=conv(8, 4), value=conv(8, 5), out=conv(5, 8),
                    head=nn.Linear(8, 4)),
        {'conv': 8, 'query': 4, 'value': 5},
        meeting=('query',),
    ),
    'flattened channels-last': Pattern(
        lambda: Net(
            lambda net, x: net.head(net.wide(net.conv(x).permute(0, 2, 3, 1).flatten(1)).relu()),
            conv=conv(3, 8), wide=nn.Linear(288, 6), head=nn.Linear(6, 4),
        ),
        {'conv': 8, 'wide': 6},
    ),
    'detached branch': Pattern(
        one_layer(lambda net, h: h + net.next(h.detach()), next=conv(8, 8)), FREE
    ),
    'embedded tokens': Pattern(
        lambda: Net(lambda net, x: net.head(net.next(net.embed(x)).mean(1)), embed=nn.Embedding(7, 6),
                    next=nn.Linear(6, 5), head=nn.Linear(5, 4)),
        {'embed': 6, 'next': 5},
        example=lambda: torch.arange(6).view(2, 3),
    ),
    'nn.GRU': Pattern(
        lambda: Net(
            lambda net, x: net.head(net.mix(tokens(net, x))[0].mean(1)),
            conv=conv(3, 8), mix=nn.GRU(8, 6, batch_first=True), head=nn.Linear(6, 4),
        ),
        {},
        {'mix.weight_ih_l0': 'mix'},
    ),
    'queries picked from a joint projection': Pattern(
        lambda: Net(picked, conv=conv(3, 8), qkv=nn.Linear(8, 15), head=nn.Linear(5, 4)), {'conv': 8, 'qkv': 5},
        meeting=('qkv',),
    ),
}


def made(pattern: Pattern) -> tuple[Net, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return pattern.make().double().eval(), pattern.example()


def plans(graph: zp.graph.ChannelGraph) -> list[zp.Plan]:
    '''A few channels of every group, in three ways that leave more than one of each.'''
    found = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        plan = zp.Plan(graph)
        for group in graph.groups:
            if group.size > 2:
                positions = drawn_of(group, rng, int(rng.integers(1, group.size - 1)))
                plan = plan.remove(group.name, positions)
        if plan.removed:
            found.append(plan)
    return found


def outputs(value: Any) -> list[torch.Tensor]:
    '''All tensors in an answer, whatever holds them.'''
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (Answer, SimpleNamespace)):
        value = vars(value)
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in outputs(item)]


def called(model: nn.Module, example: Any) -> list[torch.Tensor]:
    args = () if isinstance(example, dict) else example if isinstance(example, tuple) else (example,)
    with torch.no_grad():
        return outputs(model(*args, **(example if isinstance(example, dict) else {})))


def assert_prunes_exactly(
    model: nn.Module, graph: zp.graph.ChannelGraph, example: Any, pattern: Pattern | None = None
) -> None:
    '''The structural proof alone accepts only what is right in numbers and keeps the shapes of all outputs.

    Numbers are those of the library's masked network and, of a pattern, also of an oracle that knows nothing of it.
    '''
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shapes = [tensor.shape for tensor in called(copy.deepcopy(model), example)]
    for plan in plans(graph):
        small = plan.apply(model, verify=False)
        compare(graph, model, small, plan.removed, example)
        assert type(small) is type(model)
        assert [tensor.shape for tensor in called(small, example)] == shapes
        if pattern is not None:
            assert_rows(model, small, plan)
            silent = called(silenced(model, small, pattern.reads, pattern.meeting), example)
            for found, expected in zip(called(small, example), silent, strict=True):
                assert float((found - expected).abs().max()) <= 1e-12 * float(expected.abs().max())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items() if name in state)


@pytest.mark.parametrize('name', PATTERNS)
def test_pattern(name: str) -> None:
    pattern = PATTERNS[name]
    model, example = made(pattern)
    graph = zp.trace(model, example)
    if pattern.groups is not None:
        assert {group.name: group.size for group in graph.groups} == pattern.groups
    for layer, reason in (pattern.locked or {}).items():
        assert reason in graph.locked[layer]
    assert_prunes_exactly(model, graph, example, pattern)


def test_the_oracle_of_patterns_has_teeth() -> None:
    '''Removed channels matter in nearly all patterns, and a network with a column of another channel is told.'''
    changed, caught = [], []
    for pattern in PATTERNS.values():
        model, example = made(pattern)
        for plan in plans(zp.trace(model, example))[:1]:
            small = plan.apply(model, verify=False)
            silent = called(silenced(model, small, pattern.reads, pattern.meeting), example)
            found = called(model, example)
            changed.append(any(float((a - b).abs().max()) > 1e-6 for a, b in zip(silent, found, strict=True)))
            name = next((name for name, dim in reading_dims(model).items()
                         if name in dict(small.named_parameters()) and small.get_parameter(name).shape[dim]
                         < model.get_parameter(name).shape[dim]), None)
            if name is None:
                continue
            dim = reading_dims(model)[name]
            with torch.no_grad():
                weight = small.get_parameter(name)
                weight.copy_(weight.roll(1, dim))
            silent = called(silenced(model, small, pattern.reads, pattern.meeting), example)
            caught.append(any(float((a - b).abs().max()) > 1e-6
                              for a, b in zip(silent, called(small, example), strict=True)))
    assert len(changed) > 70 and np.mean(changed) > 0.95
    assert len(caught) > 50 and np.mean(caught) > 0.95


def check(make: Callable[[], Net]) -> None:
    model, example = made(Pattern(make))
    assert_prunes_exactly(model, zp.trace(model, example), example)


# known to be wrong: accepted without a proof in numbers, though they do not compute the masked original
UNLABELLED = 'an operation on a tensor without labels is not recorded, so a number computed from a width goes unseen'


@pytest.mark.parametrize(
    'make',
    [
        pytest.param(
            attention(lambda q, k: (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)),
            id='scores scaled after the product',
        ),
        pytest.param(
            one_layer(lambda net, h: h / (torch.ones(1, dtype=h.dtype, device=h.device) * h.shape[1])),
            id='ones times the width',
        ),
        pytest.param(one_layer(lambda net, h: h / torch.tensor([h.shape[1], 1.0])[0]), id='tensor of several numbers'),
        pytest.param(
            one_layer(lambda net, h: h / torch.arange(1, h.shape[1] + 1, device=h.device).sum()), id='sum of a range'
        ),
        pytest.param(
            lambda: Net(
                lambda net, x: classified(net, net.conv(x / net.conv.weight.shape[0]).relu()),
                conv=conv(3, 8),
                head=nn.Linear(8, 4),
            ),
            id='input scaled by a width',
        ),
        pytest.param(
            lambda: Net(
                lambda net, x: classified(net, net.conv(x)).softmax(1).sum(1) * net.conv.out_channels,
                conv=conv(3, 8),
                head=nn.Linear(8, 4),
            ),
            id='answer scaled by a width',
        ),
    ],
)
def test_number_computed_from_a_width_is_seen(make: Callable[[], Net]) -> None:
    check(make)


@pytest.mark.parametrize(
    'make',
    [
        pytest.param(
            one_layer(
                lambda net, h: F.conv2d(h, net.weight, padding='same', dilation=1 + h.shape[1] // 8),
                out=6,
                weight=parameter(6, 8, 3, 3),
            ),
            id='dilation',
        ),
        pytest.param(
            one_layer(
                lambda net, h: h.roll(h.shape[1], 2) * torch.linspace(0, 1, 6, dtype=h.dtype, device=h.device)[:, None]
            ),
            id='roll',
        ),
        pytest.param(one_layer(lambda net, h: h[:, :, h.shape[1] // 4 : h.shape[1] // 4 + 2]), id='slice of rows'),
        pytest.param(
            one_layer(lambda net, h: F.avg_pool2d(h, 2, padding=1, count_include_pad=h.shape[1] == 8)),
            id='flag of a pool',
        ),
    ],
)
def test_argument_computed_from_a_width_is_seen(make: Callable[[], Net]) -> None:
    check(make)


def test_channels_selected_by_number_stay_where_they_are() -> None:
    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        h = net.conv(x)
        return classified(net, h) + (h[:, 2] - 2 * h[:, -1]).mean((1, 2))[:, None]

    model, example = made(Pattern(lambda: Net(forward, conv=conv(3, 4), head=nn.Linear(4, 4))))
    graph = zp.trace(model, example)
    for group in graph.groups:
        plan = zp.Plan(graph, {group.name: [0]})
        try:
            small = plan.apply(model, verify=False)
        except zp.VerificationError:
            raise
        except zp.PruneError:
            continue
        compare(graph, model, small, plan.removed, example)


@pytest.mark.parametrize(
    'feature', [torch.sigmoid, lambda x: F.elu(x) + 1, torch.exp], ids=['sigmoid', 'elu + 1', 'exp']
)
def test_masked_network_where_activations_meet(feature: Callable[[torch.Tensor], torch.Tensor]) -> None:
    check(attention(lambda q, k: feature(q) @ feature(k).transpose(1, 2)))


def namespace_answer(net: Net, x: torch.Tensor) -> Any:
    h = net.conv(x)
    return SimpleNamespace(features=h, logits=classified(net, h))


def nested_answer(net: Net, x: torch.Tensor) -> Any:
    h = net.conv(x)
    return Answer(Answer(h, h), classified(net, h))


def listed_answer(net: Net, x: torch.Tensor) -> Any:
    h = net.conv(x)
    return [Answer(h, classified(net, h))], classified(net, h)


@pytest.mark.parametrize('forward', [namespace_answer, nested_answer, listed_answer])
def test_outputs_in_any_container_are_locked_or_refused(forward: Forward) -> None:
    model, example = made(Pattern(stack()(forward)))
    try:
        graph = zp.trace(model, example)
    except zp.PruneError:
        return
    assert not graph.groups


def width_one(make: Callable[[], Net]) -> None:
    '''Narrow the first group to one channel.'''
    model, example = made(Pattern(make))
    graph = zp.trace(model, example)
    for group in graph.groups:
        plan = zp.Plan(graph, {group.name: range(1, group.size)})
        compare(graph, model, plan.apply(model, verify=False), plan.removed, example)


def shuffled(net: Net, h: torch.Tensor) -> torch.Tensor:
    n, c, height, width = h.shape
    return h.view(n, 2, c // 2, height, width).transpose(1, 2).reshape(n, c, height, width)


@pytest.mark.parametrize(
    'make',
    [
        pytest.param(one_layer(lambda net, h: h), id='convolution'),
        pytest.param(
            one_layer(shuffled),
            id='channel shuffle'
        ),
        pytest.param(
            one_layer(
                lambda net, h: net.dense(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), out=6, dense=nn.Linear(8, 6)
            ),
            id='linear over the last dimension'
        ),
        pytest.param(
            one_layer(lambda net, h: net.norm(h).relu(), norm=nn.InstanceNorm2d(8, affine=True)),
            id='instance norm'
        ),
        pytest.param(
            one_layer(
                lambda net, h: torch.einsum('bchw,bc->bchw', h, torch.einsum('bd,cd->bc', torch.einsum(
                    'bchw,dc->bd', h, net.squeeze).relu(), net.excite).sigmoid()),
                squeeze=parameter(4, 8), excite=parameter(8, 4)
            ),
            id='squeeze and excitation by einsum'
        ),
        pytest.param(
            one_layer(lambda net, h: torch.einsum('bchw,ce,ed->bdhw', h, net.inner, net.outer), out=5,
                      inner=parameter(8, 6), outer=parameter(6, 5)),
            id='three factors'
        ),
    ],
)
def test_narrowed_to_a_single_channel(make: Callable[[], Net]) -> None:
    width_one(make)


@pytest.mark.parametrize('equation', [
    'bchw,dc->bd', 'bc,bc->bc', 'bc,cd->', 'bc , dc', 'bij,bjk->bik', 'bc,cd,dh->hb', 'cb,cb->b', 'bi,ci->bc', 'i,i->',
    'hc,bcwh->wb', 'bb,bc->c', '...c,dc->...d', 'b,c->bc', 'bchw->bc'])
def test_einsum_is_traced_by_what_computes_the_same(equation: str) -> None:
    sizes = {letter: size for size, letter in enumerate('bcdhijkw', 2)}
    tensors = [noise(*(sizes[letter] for letter in term.replace('...', 'bh').strip()))
               for term in equation.split('->')[0].split(',')]
    for given in (tensors, [tensors]):
        assert torch.allclose(einsum(equation, *given), torch.einsum(equation, *given), atol=1e-5)


def test_whole_groups_of_group_norm_can_go() -> None:
    model, example = made(Pattern(one_layer(lambda net, h: net.norm(h).relu(), norm=nn.GroupNorm(4, 8))))
    graph = zp.trace(model, example)
    assert [group.size for group in graph.groups] == [4]
    small = zp.Plan(graph, {'conv': [1, 2]}).apply(model)
    assert (small.norm.num_groups, small.norm.num_channels) == (2, 4)


def test_batch_norm_after_pixel_shuffle() -> None:
    make = one_layer(lambda net, h: net.norm(F.pixel_shuffle(h, 2)), width=16, out=4, norm=nn.BatchNorm2d(4))
    model, example = made(Pattern(make))
    assert [group.size for group in zp.trace(model, example).groups] == [4]


def test_locked_parametrized_layers_are_listed() -> None:
    model, example = made(Pattern(stack()(lambda net, x: classified(net, net.conv(x)))))
    weight_norm(model.conv)
    graph = zp.trace(model, example)
    assert any(name.startswith('conv') for name in (*graph.locked, *(group.name for group in graph.groups)))


# what is refused
def test_branch_on_a_value_is_refused_and_named() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu() if x.sum() > 0 else x

    model, example = made(Pattern(one_layer(lambda net, h: net.gate(h), gate=Branch())))
    with pytest.raises(zp.PruneError, match="module 'gate'"):
        zp.trace(model, example)


def test_branch_on_a_width_is_exact_or_refused() -> None:
    model, example = made(Pattern(one_layer(lambda net, h: h.relu() if h.shape[1] > 4 else h)))
    graph = zp.trace(model, example)
    plan = zp.Plan(graph, {'conv': [0]})
    compare(graph, model, plan.apply(model, verify=False), plan.removed, example)
    with pytest.raises(zp.PruneError, match=r"Remove fewer channels of 'conv', or none: trace with ignore=\['conv'\]"):
        zp.Plan(graph, {'conv': [0, 1, 2, 3, 4]}).apply(model, verify=False)
    assert not zp.trace(model, example, ignore=['conv']).groups


def two_widths(relate: Forward, width: int = 8, out: int = 8) -> Callable[[], Net]:
    '''Two layers, and what compares the width of the one with the other's.'''
    return one_layer(lambda net, h: relate(h, net.other(h)), width, out, other=conv(width, out))


def reason(change: Forward, x: torch.Tensor | None = None) -> str:
    model = one_layer(change)().double().eval()
    graph = zp.trace(model, image() if x is None else x)
    assert not graph.groups
    return graph.locked['conv']


def test_reasons_name_what_changes() -> None:
    table = reason(lambda net, h: h * h.new_tensor([[h.shape[1] ** -0.5] * 9] * 9), image(9))
    assert table.startswith('a number changes with the number of channels, from 0.353553 to 0.')
    assert len(table) < 120
    parts = reason(lambda net, h: torch.cat([part.relu() for part in h.split(2, 1)], 1))
    assert 'split returns' in parts and ' tensors, not 4' in parts
    ones = reason(lambda net, h: h + 0 * torch.tensor([1.0] * h.shape[1]).sum())
    assert 'from [1, 1, 1, 1 and 4 more] to [1, 1' in ones


def test_large_tables_made_from_a_width_are_seen() -> None:
    def scaled(h: torch.Tensor, width: int) -> torch.Tensor:
        table = np.ones(h.shape[2:], np.float32)
        table[-1, -1] = width ** -0.5
        return h * torch.from_numpy(table)

    assert 'a number changes' in reason(lambda net, h: scaled(h, h.shape[1]), image(12))
    model = one_layer(lambda net, h: scaled(h, 8))().double().eval()
    assert_prunes_exactly(model, zp.trace(model, image(12)), image(12))


def test_other_strides_of_the_same_shape_are_locked() -> None:
    def strided(strides: Callable[[torch.Tensor], tuple[int, ...]]) -> zp.graph.ChannelGraph:
        return zp.trace(Net(lambda net, x: (lambda h: net.out(h.as_strided(h.shape, strides(h))))(net.into(x)),
                            into=nn.Linear(4, 8), out=nn.Linear(8, 3)).double(), noise(8, 4).double())

    assert 'as_strided' in strided(lambda h: (1, len(h))).locked['into']  # as if it were transposed
    assert [group.name for group in strided(lambda h: h.stride()).groups] == ['into']


def test_not_a_number_is_no_other_number() -> None:
    model, example = made(Pattern(one_layer(lambda net, h: torch.where(h > 2, float('nan'), h).nan_to_num())))
    assert [group.size for group in zp.trace(model, example).groups] == [8]


def asserted(h: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    assert v.shape == h.shape
    return v


@pytest.mark.parametrize('relate', [
    lambda h, v: v.view(len(v), h.shape[1], -1, 6), asserted, lambda h, v: v * (v.numel() / h.numel()),
    lambda h, v: v if v.shape[1] == h.shape[1] else v * 2])
def test_widths_that_must_stay_equal_are_locked(relate: Forward) -> None:
    '''On trial, groups of equal size lose different numbers of channels.'''
    model, example = made(Pattern(two_widths(relate)))
    graph = zp.trace(model, example)
    assert graph.groups == () and {'conv', 'other'} <= set(graph.locked)


def test_widths_that_must_stay_in_proportion_are_locked() -> None:
    model, example = made(Pattern(two_widths(lambda h, v: v.view(len(v), 2 * h.shape[1], -1, 6), 6, 12)))
    assert zp.trace(model, example).groups == ()


# what a pruned network keeps
def test_frozen_parameters_stay_frozen() -> None:
    model, example = made(Pattern(one_layer(lambda net, h: h)))
    model.conv.requires_grad_(False)
    small = zp.Plan(zp.trace(model, example), {'conv': [0, 5]}).apply(model)
    assert {name: parameter.requires_grad for name, parameter in small.named_parameters()} == {
        'conv.weight': False,
        'conv.bias': False,
        'head.weight': True,
        'head.bias': True,
    }


def test_shared_parameters_stay_shared() -> None:
    model, example = made(
        Pattern(
            stack(same=conv(8, 8), twin=conv(8, 8))(
                lambda net, x: classified(net, net.twin(F.silu(net.same(net.conv(x)))))
            )
        )
    )
    model.twin.weight = model.same.weight
    graph = zp.trace(model, example)
    assert_prunes_exactly(model, graph, example)
    small = zp.Plan(graph, {graph.groups[0].name: [2]}).apply(model)
    assert small.twin.weight is small.same.weight
    assert small.twin.weight.shape[:2] == (7, 7)


def test_training_only_head_is_pruned_along() -> None:
    model, example = made(PATTERNS['auxiliary head in training'])
    small = zp.Plan(zp.trace(model, example), {'conv': [0, 1]}).apply(model)
    y, side = small.train()(example)
    assert small.side.weight.shape == (4, 6)
    assert y.shape == side.shape == (3, 4)


def test_trace_leaves_caches_of_the_network_alone() -> None:
    model, example = made(PATTERNS['cache made in forward'])
    before = set(vars(model))
    zp.trace(model, example)
    assert set(vars(model)) == before


def test_network_with_a_filled_cache_is_exact() -> None:
    model, example = made(PATTERNS['cache made in forward'])
    with torch.no_grad():
        model(example)
    assert_prunes_exactly(model, zp.trace(model, example), example)


def test_network_that_fills_its_cache_after_the_trace_is_exact() -> None:
    model, example = made(PATTERNS['cache made in forward'])
    graph = zp.trace(model, example)
    with torch.no_grad():
        model(example)
    assert_prunes_exactly(model, graph, example)


@pytest.mark.parametrize('name', ['dropout', 'plain tensor attribute', 'auxiliary head in training'])
def test_trace_leaves_the_random_state_and_training_flags_alone(name: str) -> None:
    model, example = made(PATTERNS[name])
    model.train()
    list(model.children())[-1].eval()
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    graph = zp.trace(model, example)
    for plan in plans(graph)[:1]:
        assert [module.training for module in plan.apply(model).modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_type_is_kept(dtype: torch.dtype) -> None:
    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        return classified(net, net.next(net.norm(net.conv(x)).relu()))

    model, example = made(
        Pattern(lambda: Net(forward, conv=conv(3, 8, 3), norm=nn.BatchNorm2d(8), next=conv(8, 6), head=nn.Linear(6, 4)))
    )
    model, example = model.to(dtype), example.to(dtype)
    small = zp.Plan(zp.trace(model, example), {'conv': [0, 3], 'next': [1, 2, 3, 4, 5]}).apply(model)
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    assert small(example).dtype == dtype


# ignore
@pytest.mark.parametrize(
    'pattern, groups', [('first', {'second': 6}), ('sec*', {'first': 8}), ('second.weight', {'first': 8}), ('*', {})]
)
def test_ignored_layers_keep_their_channels(pattern: str, groups: dict[str, int]) -> None:
    model, example = made(
        Pattern(
            lambda: Net(
                lambda net, x: classified(net, net.second(net.first(x).relu())),
                first=conv(3, 8),
                second=conv(8, 6),
                head=nn.Linear(6, 4),
            )
        )
    )
    graph = zp.trace(model, example, ignore=[pattern])
    assert {group.name: group.size for group in graph.groups} == groups
    for name in {'first', 'second'} - set(groups):
        assert pattern in graph.locked[name]
    assert_prunes_exactly(model, graph, example)


@pytest.mark.parametrize('ignore', [['third'], [''], 'first'])
def test_ignoring_nothing_is_an_error(ignore: Any) -> None:
    model, example = made(Pattern(one_layer(lambda net, h: h)))
    with pytest.raises(zp.PruneError, match='ignore'):
        zp.trace(model, example, ignore=ignore)


# what reaches a tensor around the dispatcher, or is made from a width


def writes_into_a_view(net: Net, h: torch.Tensor) -> torch.Tensor:
    mask = h.new_ones(h.shape[0], h.shape[1], 1, 1)
    mask[:, :2] = 0
    return h * mask


AROUND: dict[str, Forward] = {
    'new_tensor': lambda net, h: h * h.new_tensor(1.0 / h.shape[1]),
    'asarray': lambda net, h: h * torch.asarray(1.0 / h.shape[1]),
    'constructor': lambda net, h: h * torch.Tensor([h.shape[1] / 8]),
    'sum of ones': lambda net, h: h / torch.ones(h.shape[1]).sum(),
    'product of ones': lambda net, h: h * (h.new_ones(1, h.shape[1]) @ h.new_ones(h.shape[1], 1)).reshape(1, 1, 1, 1),
    'write into a view': writes_into_a_view,
    'parameter of an activation': lambda net, h: h - nn.Parameter(h, requires_grad=False).mean(1, keepdim=True),
    'subclass of an activation': lambda net, h: h - h.as_subclass(torch.Tensor).mean(1, keepdim=True),
    'data': lambda net, h: h - h.data.mean(1, keepdim=True),
    'strided': lambda net, h: h - h.as_strided((3, 1, 6, 6), (288, 36, 6, 1)),
    'weight plus low rank': lambda net, h: F.conv2d(h, net.w + (net.b @ net.a).reshape(net.w.shape)),
    'exponential of a weight': lambda net, h: F.conv2d(h, net.w.exp()),
    'weight plus one': lambda net, h: F.conv2d(h, net.w + 1),
}


def subclasses_can_be_seen() -> bool:
    '''Whether this release of torch makes subclasses of tensors while operations are recorded.'''
    try:
        with FlopCounterMode(display=False):
            torch.ones(1).as_subclass(torch.Tensor)
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(subclasses_can_be_seen(), reason='this release of torch can do it')
def test_subclasses_that_cannot_be_seen_are_refused_by_name() -> None:
    model = one_layer(AROUND['subclass of an activation'])().double().eval()
    with pytest.raises(zp.PruneError, match=r'in the network itself, Tensor\.as_subclass'):
        zp.trace(model, image())


@pytest.mark.parametrize('name', AROUND)
def test_what_goes_around_the_dispatcher_is_exact_or_locked(name: str) -> None:
    if name == 'subclass of an activation' and not subclasses_can_be_seen():
        pytest.skip('refused by name')
    parts = {'w': parameter(8, 8, 1, 1), 'a': parameter(2, 8), 'b': parameter(8, 2)}
    model = one_layer(AROUND[name], **parts)().double().eval()
    graph = zp.trace(model, image())
    for plan in plans(graph):
        small = plan.apply(model, verify=False)
        assert compare(graph, model, small, plan.removed, image()) <= 1e-10


@pytest.mark.parametrize('branch', [
    lambda h: h.mean().tolist() > 0.1, lambda h: float(h.detach().numpy().sum()) > 0,
    lambda h: torch.allclose(h, h + 1),
    lambda h: bool(nn.Parameter(h, requires_grad=False).sum() > 0), lambda h: bool(h.data.sum() > 0)])
def test_branches_on_values_are_refused(branch: Callable[[torch.Tensor], bool]) -> None:
    model = one_layer(lambda net, h: h if branch(h) else -h)().double().eval()
    with pytest.raises(zp.PruneError, match='uses a value of its input'):
        zp.trace(model, image())


@pytest.mark.parametrize('select', [
    lambda h: h[h.mean((1, 2, 3)) > 0], lambda h: h.flatten(1)[:, (h > 0).flatten(1).nonzero()[:, 1]],
    lambda h: h.masked_select(h > 0)[None]])
def test_sizes_that_depend_on_values_are_refused(select: Callable[[torch.Tensor], torch.Tensor]) -> None:
    net = Net(lambda net, x: select(net.next(net.conv(x))).relu().sum(), conv=conv(3, 8), next=conv(8, 6)).double()
    with pytest.raises(zp.PruneError, match=r'the size of a tensor depends on values of the input .*and heads'):
        zp.trace(net, image())


def test_random_networks_are_told_so() -> None:
    model = one_layer(lambda net, h: h + torch.randn_like(h))().double().eval()
    plan = zp.Plan(zp.trace(model, image()), {'conv': [0]})
    with pytest.raises(zp.VerificationError, match='random numbers'):
        plan.apply(model)
    assert plan.apply(model, verify=False).conv.out_channels == 7


def test_channels_that_are_a_whole_dimension_are_locked() -> None:
    model = one_layer(lambda net, h: net.norm(h), norm=nn.GroupNorm(1, 8))().double().eval()
    graph = zp.trace(model, image())
    assert graph.groups == () and 'are coupled' in graph.locked['conv']


class Listed(nn.Module):
    '''Uses its layers through lists.'''

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(3, 8), conv(8, 6)])
        self.head = nn.Linear(6, 4)
        self.weights = [layer.weight for layer in self.layers]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, weight in zip(self.layers, self.weights, strict=True):
            x = F.relu(F.conv2d(x, weight, layer.bias))
        return self.head(x.mean((2, 3)))


def test_ignored_containers_keep_all_that_is_in_them() -> None:
    model = Listed().double().eval()
    assert {group.name for group in zp.trace(model, image()).groups} == {'layers.0', 'layers.1'}
    assert zp.trace(model, image(), ignore=['layers']).groups == ()


def test_references_in_lists_follow_when_pruned_in_place() -> None:
    model = Listed().double().eval()
    plan = zp.Plan(zp.trace(model, image()), {'layers.0': [0, 5], 'layers.1': [1]})
    expected = plan.apply(model)(image())
    plan.apply_(model)
    assert model.weights[0] is model.layers[0].weight
    assert torch.equal(model(image()), expected)


def test_optimizer_that_keeps_its_own_list_is_refused() -> None:
    model = Listed().double().eval()
    plan = zp.Plan(zp.trace(model, image()), {'layers.0': [0]})
    with pytest.raises(zp.PruneError, match='LBFGS'):
        plan.apply_(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(zp.PruneError, match='Optimizer is needed'):
        plan.apply_(model, 'sgd')  # type: ignore[arg-type]
    assert model.layers[0].out_channels == 8


def test_masks_are_no_positions() -> None:
    graph = zp.trace(Listed().double().eval(), image())
    with pytest.raises(zp.PruneError, match='no position'):
        zp.Plan(graph).remove('layers.0', torch.tensor([True, False]))

'''Networks made up at random, and an oracle for pruning them that knows nothing of the library.

A network is a list of steps over registers, run by :class:`Generated`. :func:`identify` runs the same steps on lists
of channel identities instead of tensors: what a convolution produces is new, an addition makes identities one, a
concatenation joins lists. From that alone follows which reads must be silent when channels go
(:func:`Identities.masks`), and the original network with these reads silenced is what a pruned network must equal.
'''

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

FIXED = 0  # the identity of everything that must stay: inputs, outputs, constants

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    'relu': nn.ReLU,
    'relu_': lambda: nn.ReLU(inplace=True),
    'silu': nn.SiLU,
    'silu_': lambda: nn.SiLU(inplace=True),
    'leaky': nn.LeakyReLU,
    'hardswish': nn.Hardswish,
    'dropout': nn.Dropout,
    'prelu_one': nn.PReLU,
}


class Step(NamedTuple):
    '''One step: the value of register ``output`` is ``kind`` of the registers ``inputs``.'''

    kind: str
    inputs: tuple[int, ...]
    output: int
    module: str = ''
    numbers: tuple[int, ...] = ()


class Generated(nn.Module):
    '''Runs a list of steps; register 0 is the input, the last step's value the output.'''

    def __init__(self, steps: Sequence[Step], layers: dict[str, nn.Module]):
        super().__init__()
        self.steps = list(steps)
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.silenced(x, {})

    def silenced(self, x: torch.Tensor, masks: dict[int, torch.Tensor]) -> torch.Tensor:
        '''The output where what each step reads is multiplied by its mask, if it has one.'''
        values: dict[int, Any] = {0: x}
        for number, step in enumerate(self.steps):
            inputs = [values[register] for register in step.inputs]
            if number in masks:
                inputs[0] = inputs[0] * masks[number]
            layer = self.layers[step.module] if step.module else None
            values[step.output] = FORWARD[step.kind](layer, step.numbers, *inputs)
        return values[self.steps[-1].output]


class Scale(nn.Module):
    '''A scale per channel: a parameter, or a buffer.'''

    def __init__(self, channels: int, learned: bool):
        super().__init__()
        scale = torch.randn(channels, 1, 1)
        if learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer('scale', scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def _shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def _channels_last(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _gate(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a * torch.sigmoid(b)


# a layer (or None), the step's numbers, and the values of its inputs
FORWARD: dict[str, Callable[..., Any]] = {
    'convolution': lambda layer, _, x: layer(x),
    'linear': lambda layer, _, x: layer(x),
    'linear_last': lambda layer, _, x: _channels_last(layer, x),
    'follower': lambda layer, _, x: layer(x),
    'group_norm': lambda layer, _, x: layer(x),
    'layer_norm': lambda layer, _, x: _channels_last(layer, x),
    'activation': lambda layer, _, x: layer(x),
    'sigmoid': lambda _, __, x: torch.sigmoid(x),
    'relu_in_place': lambda _, __, x: F.relu_(x),
    'add': lambda _, __, *values: sum(values[1:], values[0]),
    'add_in_place': lambda _, __, a, b: a.add_(b),
    'gate': lambda _, __, a, b: _gate(a, b),
    'maximum': lambda _, __, a, b: torch.maximum(a, b),
    'stack_mean': lambda _, __, *values: torch.stack(values).mean(0),
    'cat': lambda _, __, *values: torch.cat(values, 1),
    'cat_rows': lambda _, __, *values: torch.cat(values, 2),
    'chunk': lambda _, numbers, x: x.chunk(numbers[0], 1),
    'halves': lambda _, numbers, x: torch.split(x, x.shape[1] // numbers[0], 1),
    'split_fixed': lambda _, numbers, x: torch.split(x, list(numbers), 1),
    'item': lambda _, numbers, values: values[numbers[0]],
    'flip': lambda _, __, x: x.flip(1),
    'shuffle': lambda _, numbers, x: _shuffle(x, numbers[0]),
    'view_fixed': lambda _, numbers, x: x.view(x.shape[0], *numbers, *x.shape[2:]).flatten(1, 2),
    'pixel_shuffle': lambda _, __, x: F.pixel_shuffle(x, 2),
    'pixel_unshuffle': lambda _, __, x: F.pixel_unshuffle(x, 2),
    'max_pool': lambda _, __, x: F.max_pool2d(x, 3, 2, 1),
    'avg_pool': lambda _, __, x: F.avg_pool2d(x, 2),
    'upsample': lambda _, __, x: F.interpolate(x, scale_factor=2.0, mode='nearest'),
    'squeeze': lambda _, __, x: F.adaptive_avg_pool2d(x, 1),
    'pad_space': lambda _, __, x: F.pad(x, (1, 0, 0, 1)),
    'pad_channels': lambda _, numbers, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *numbers)),
    'channel_mean_gate': lambda _, __, x: x * torch.sigmoid(x.mean(1, keepdim=True)),
    'mean': lambda _, __, x: x.mean((2, 3)),
    'flatten': lambda _, __, x: x.flatten(1),
}


class Identities:
    '''Which channels are one and the same, and who reads them.

    Attributes
    ----------
    produced: dict of str to list of int
        The identities of the output channels of every layer that produces new ones.
    reads: dict of int to list of int
        The identities that each reading step reads, in order.
    '''

    def __init__(self) -> None:
        self.parent = [FIXED]
        self.produced: dict[str, list[int]] = {}
        self.reads: dict[int, list[int]] = {}
        self.followed: dict[str, list[int]] = {}

    def new(self, count: int) -> list[int]:
        start = len(self.parent)
        self.parent += range(start, start + count)
        return list(range(start, start + count))

    def find(self, identity: int) -> int:
        while self.parent[identity] != identity:
            identity = self.parent[identity]
        return identity

    def join(self, left: Iterable[int], right: Iterable[int]) -> None:
        '''Make identities one, pair by pair.'''
        for a, b in zip(left, right, strict=True):
            low, high = sorted((self.find(a), self.find(b)))
            self.parent[high] = low

    def fix(self, identities: Iterable[int]) -> None:
        for identity in identities:
            self.join([identity], [FIXED])

    def classes(self) -> dict[int, set[int]]:
        '''All identities, by the one that stands for them.'''
        found: dict[int, set[int]] = {}
        for identity in range(len(self.parent)):
            found.setdefault(self.find(identity), set()).add(identity)
        return found

    def free(self) -> set[int]:
        '''Identities of channels which something reads and nothing fixes.'''
        read = {self.find(identity) for identities in self.reads.values() for identity in identities} - {FIXED}
        return {identity for identity in range(len(self.parent)) if self.find(identity) in read}

    def masks(self, removed: set[int], model: Generated) -> dict[int, torch.Tensor]:
        '''For each reading step that reads a removed channel, a mask of zeros and ones over its input.'''
        masks = {}
        for number, identities in self.reads.items():
            kept = [float(identity not in removed) for identity in identities]
            if not all(kept):
                shape = (-1, 1, 1) if model.steps[number].kind != 'linear' else (-1,)
                masks[number] = torch.tensor(kept, dtype=torch.float64).view(shape)
        return masks


def identify(model: Generated, channels: int, size: int) -> Identities:
    '''Follow channel identities through the steps of a network whose input has shape (channels, size, size).'''
    found = Identities()
    values: dict[int, Any] = {0: [FIXED] * channels}
    with torch.no_grad():
        sizes = _sizes(model, channels, size)
    for number, step in enumerate(model.steps):
        inputs = [values[register] for register in step.inputs]
        layer = model.layers[step.module] if step.module else None
        values[step.output] = _identified(found, number, step, layer, inputs, sizes[step.inputs[0]])
    found.fix(values[model.steps[-1].output])
    return found


def _sizes(model: Generated, channels: int, size: int) -> dict[int, Any]:
    '''The number of positions of every register's value.'''
    values: dict[int, Any] = {0: torch.zeros(1, channels, size, size, dtype=torch.float64)}
    for step in model.steps:
        layer = model.layers[step.module] if step.module else None
        values[step.output] = FORWARD[step.kind](layer, step.numbers, *[values[register] for register in step.inputs])
    return {register: value[0, 0].numel() for register, value in values.items() if isinstance(value, torch.Tensor)} | {
        register: None for register, value in values.items() if not isinstance(value, torch.Tensor)
    }


def _identified(found: Identities, number: int, step: Step, layer: Any, inputs: list[Any], positions: int) -> Any:
    '''The identities of a step's value.'''
    x, kind = inputs[0], step.kind
    if kind == 'convolution' and layer.groups > 1 and layer.weight.shape[1] == 1:
        factor = layer.weight.shape[0] // layer.groups
        _follow(found, step.module, x)
        return [identity for identity in x for _ in range(factor)]
    if kind in ('convolution', 'linear', 'linear_last'):
        found.reads[number] = x
        _follow(found, step.module, x)
        if step.module not in found.produced:
            found.produced[step.module] = found.new(layer.weight.shape[0])
        return found.produced[step.module]
    if kind == 'follower':
        _follow(found, step.module, x)
    elif kind == 'group_norm':
        _follow(found, step.module, x)
        size = len(x) // layer.num_groups
        found.join(x, [x[position // size * size] for position in range(len(x))])
    elif kind in ('layer_norm', 'channel_mean_gate', 'view_fixed'):
        found.fix(x)
    elif kind in ('add', 'add_in_place', 'gate', 'maximum', 'stack_mean', 'cat_rows'):
        for other in inputs[1:]:
            if len(x) == len(other):
                found.join(x, other)
            else:  # one channel scales all
                found.fix(min(x, other, key=len))
        return max(inputs, key=len)
    elif kind == 'cat':
        return [identity for value in inputs for identity in value]
    elif kind in ('chunk', 'halves'):
        width = len(x) // step.numbers[0]
        return [x[start : start + width] for start in range(0, len(x), width)]
    elif kind == 'split_fixed':
        found.fix(x)
        stops = np.cumsum(step.numbers).tolist()
        return [x[stop - width : stop] for width, stop in zip(step.numbers, stops, strict=True)]
    elif kind == 'item':
        return x[step.numbers[0]]
    elif kind == 'flip':
        return x[::-1]
    elif kind == 'shuffle':
        return np.array(x).reshape(step.numbers[0], -1).T.reshape(-1).tolist()
    elif kind == 'pixel_shuffle':
        found.join(x, [x[position // 4 * 4] for position in range(len(x))])
        return x[::4]
    elif kind == 'pixel_unshuffle':
        return [identity for identity in x for _ in range(4)]
    elif kind == 'pad_channels':
        before, after = step.numbers
        return [FIXED] * before + x + [FIXED] * after
    elif kind == 'flatten':
        return [identity for identity in x for _ in range(positions)]
    return x


def _follow(found: Identities, module: str, identities: list[int]) -> None:
    '''A layer that is called again has the same weights for what flows in now.'''
    if module in found.followed:
        found.join(found.followed[module], identities)
    found.followed[module] = identities


class Generator:
    '''Draws a network step by step.

    Parameters
    ----------
    seed: int
        The network is a function of this number.
    '''

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.steps: list[Step] = []
        self.layers: dict[str, nn.Module] = {}
        self.channels = int(self.rng.integers(1, 4))
        self.size = int(self.rng.choice([6, 7, 8]))
        self.shapes: dict[int, tuple[int, int]] = {0: (self.channels, self.size)}

    def network(self) -> Generated:
        with torch.random.fork_rng():
            torch.manual_seed(int(self.rng.integers(2**31)))
            x = self.convolution(0)
            for _ in range(self.rng.integers(1, 5)):
                x = self.block(x)
            self.head(x)
            model = Generated(self.steps, self.layers).double()
            _randomise(model)
        return model.eval()

    # steps
    def add(
        self, kind: str, *inputs: int, shape: Any = None, layer: nn.Module | None = None, numbers: Sequence[int] = ()
    ) -> int:
        '''Append a step; its shape (channels, rows) is the first input's unless given.'''
        name = ''
        if layer is not None:
            name = f'{kind}{len(self.layers)}'
            self.layers[name] = layer
        output = len(self.steps) + 1
        self.steps.append(Step(kind, inputs, output, name, tuple(numbers)))
        self.shapes[output] = self.shapes[inputs[0]] if shape is None else shape
        return output

    def maybe(self, chance: float) -> bool:
        return bool(self.rng.random() < chance)

    def choose(self, options: Sequence[Any]) -> Any:
        return options[self.rng.integers(len(options))]

    def divisor(self, number: int, least: int = 2) -> int | None:
        '''A number of blocks into which ``number`` channels can be cut.'''
        found = [d for d in range(least, number) if number % d == 0]
        return self.choose(found) if found else None

    def convolution(self, x: int, out: int | None = None, stride: int | None = None, groups: int = 1) -> int:
        channels, rows = self.shapes[x]
        if stride is None:
            stride = 2 if rows > 3 and self.maybe(0.2) else 1
        out = out or int(self.choose([2, 3, 4, 4, 6, 8]))
        kernel = 3 if self.maybe(0.5) else 1
        layer = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=self.maybe(0.5))
        return self.add('convolution', x, shape=(out, -(-rows // stride)), layer=layer)

    def block(self, x: int) -> int:
        if self.shapes[x][0] > 16:
            x = self.convolution(x)
        kinds = [
            self.chain,
            self.chain,
            self.residual,
            self.residual,
            self.branches,
            self.chunks,
            self.excitation,
            self.option_a,
            self.twice,
            self.shuffled,
            self.resolution,
        ]
        return self.choose(kinds)(x)

    def chain(self, x: int) -> int:
        for _ in range(self.rng.integers(1, 5)):
            x = self.single(x)
        return x

    def single(self, x: int) -> int:
        '''One step that keeps a single stream.'''
        channels, _rows = self.shapes[x]
        kind = self.choose(
            [
                'convolution',
                'convolution',
                'activation',
                'activation',
                'norm',
                'norm',
                'depthwise',
                'grouped',
                'scale',
                'prelu',
                'rare',
            ]
        )
        if kind == 'activation':
            if self.maybe(0.15):
                return self.add('relu_in_place', x)
            return self.add('activation', x, layer=ACTIVATIONS[self.choose(list(ACTIVATIONS))]())
        if kind == 'norm':
            groups = self.divisor(channels)
            if groups and self.maybe(0.35):
                return self.add('group_norm', x, layer=nn.GroupNorm(groups, channels))
            return self.add('follower', x, layer=nn.BatchNorm2d(channels, affine=self.maybe(0.9)))
        if kind == 'depthwise':
            factor = self.choose([1, 1, 2])
            return self.convolution(x, channels * factor, groups=channels) if channels > 1 else x
        if kind == 'grouped':
            groups = self.divisor(channels)
            return (
                self.convolution(x, groups * self.choose([1, 2, 3]), groups=groups) if groups else self.convolution(x)
            )
        if kind == 'scale':
            return self.add('follower', x, layer=Scale(channels, self.maybe(0.6)))
        if kind == 'prelu':
            return self.add('follower', x, layer=nn.PReLU(channels))
        if kind == 'rare':
            return self.rare(x)
        return self.convolution(x)

    def rare(self, x: int) -> int:
        '''What must lock channels, and small oddities.'''
        channels = self.shapes[x][0]
        kind = self.choose(
            [
                'layer_norm',
                'channel_mean_gate',
                'view_fixed',
                'split_fixed',
                'flip',
                'flip',
                'linear_last',
                'linear_last',
                'spatial_gate',
            ]
        )
        if kind == 'layer_norm':
            return self.add(kind, x, layer=nn.LayerNorm(channels))
        if kind == 'view_fixed':
            groups = self.divisor(channels)
            return self.add(kind, x, numbers=(groups, channels // groups)) if groups else x
        if kind == 'split_fixed':
            if channels < 3:
                return x
            parts = self.add(kind, x, numbers=(1, channels - 1))
            left = self.add('item', parts, shape=(1, self.shapes[x][1]), numbers=(0,))
            right = self.add('item', parts, shape=(channels - 1, self.shapes[x][1]), numbers=(1,))
            return self.add('cat', right, left, shape=self.shapes[x])
        if kind == 'linear_last':
            out = int(self.choose([2, 4, 5]))
            return self.add(
                kind, x, shape=(out, self.shapes[x][1]), layer=nn.Linear(channels, out, bias=self.maybe(0.5))
            )
        if kind == 'spatial_gate':
            return self.add('gate', x, self.convolution(x, 1, 1))
        return self.add(kind, x)

    def like(self, x: int, y: int) -> int:
        '''A projection of ``y`` to the shape of ``x``, if it needs one.'''
        (channels, rows), (_, other) = self.shapes[x], self.shapes[y]
        while other > rows and -(-other // 2) >= rows:
            y = self.convolution(y, channels, 2)
            other = self.shapes[y][1]
        if other != rows:
            y = self.add('squeeze', y, shape=(self.shapes[y][0], 1))
        if self.shapes[y][0] != channels:
            y = self.convolution(y, channels, 1)
        return y

    def residual(self, x: int) -> int:
        y = self.chain(x)
        if self.maybe(0.5) and self.shapes[y] != self.shapes[x]:
            y = self.convolution(y, self.shapes[x][0])
        kind = self.choose(['add', 'add', 'add', 'add_in_place', 'maximum', 'stack_mean', 'gate'])
        shortcut = self.like(y, x)
        if self.shapes[shortcut] != self.shapes[y] and kind == 'stack_mean':
            kind = 'add'
        return self.add(kind, y, shortcut)

    def branches(self, x: int) -> int:
        outs = [self.chain(x) if self.maybe(0.8) else x for _ in range(self.rng.integers(2, 4))]
        rows = min(self.shapes[out][1] for out in outs)
        matched = []
        for out in outs:
            while self.shapes[out][1] > rows:
                out = (
                    self.convolution(out, stride=2)
                    if -(-self.shapes[out][1] // 2) >= rows
                    else self.add('squeeze', out, shape=(self.shapes[out][0], 1))
                )
            matched.append(out)
        if len({self.shapes[out][1] for out in matched}) > 1:
            matched = [self.add('squeeze', out, shape=(self.shapes[out][0], 1)) for out in matched]
        channels, rows = self.shapes[matched[0]]
        if len({self.shapes[out][0] for out in matched}) == 1 and self.maybe(0.6):
            if self.maybe(0.5):
                return self.add('add', *matched)
            return self.add('squeeze', self.add('cat_rows', *matched), shape=(channels, 1))
        return self.add('cat', *matched, shape=(sum(self.shapes[out][0] for out in matched), rows))

    def chunks(self, x: int) -> int:
        pieces = self.choose([2, 2, 3])
        channels, rows = self.shapes[x]
        if channels % pieces or channels == pieces:
            x = self.convolution(x, 2 * pieces)
            channels, rows = self.shapes[x]
        parts = self.add(self.choose(['chunk', 'halves']), x, numbers=(pieces,))
        items = [self.add('item', parts, shape=(channels // pieces, rows), numbers=(piece,)) for piece in range(pieces)]
        items = [self.single(item) if self.maybe(0.4) else item for item in items]
        items = [items[0], *(self.like(items[0], item) for item in items[1:])]
        if len({self.shapes[item] for item in items}) > 1:
            items = [self.add('squeeze', item, shape=(self.shapes[item][0], 1)) for item in items]
        way = self.choose(['add', 'cat', 'gate'])
        if way == 'cat':
            return self.add(
                'cat', *reversed(items), shape=(sum(self.shapes[item][0] for item in items), self.shapes[items[0]][1])
            )
        if way == 'gate':
            return (
                self.add('gate', *items[:2]) if pieces == 2 else self.add('add', self.add('gate', *items[:2]), items[2])
            )
        return self.add('add', *items)

    def excitation(self, x: int) -> int:
        channels = self.shapes[x][0]
        gate = self.add('squeeze', x, shape=(channels, 1))
        gate = self.add('activation', self.convolution(gate, self.choose([2, 3])), layer=nn.ReLU())
        return self.add('gate', x, self.convolution(gate, channels))

    def option_a(self, x: int) -> int:
        channels, rows = self.shapes[x]
        if rows < 2:
            return self.chain(x)
        before, after = self.choose([(1, 1), (0, 2), (2, 1)])
        wide = (channels + before + after, -(-rows // 2))
        y = self.convolution(self.convolution(x, stride=1), wide[0], 2)
        return self.add('add', y, self.add('pad_channels', x, shape=wide, numbers=(before, after)))

    def twice(self, x: int) -> int:
        '''One layer called twice, on its own output or on two tensors.'''
        channels, _rows = self.shapes[x]
        y = self.convolution(x, channels, 1)
        name = self.steps[-1].module
        if self.maybe(0.5):
            between = self.add('activation', y, layer=nn.SiLU())
            return self._again(name, between)
        other = self.convolution(x, channels, 1)
        return self.add('add', y, self._again(name, other))

    def _again(self, name: str, x: int) -> int:
        output = len(self.steps) + 1
        self.steps.append(Step('convolution', (x,), output, name))
        self.shapes[output] = self.shapes[x]
        return output

    def shuffled(self, x: int) -> int:
        channels, _rows = self.shapes[x]
        groups = self.divisor(channels)
        if groups is None:
            return self.chain(x)
        if self.maybe(0.5):
            x = self.convolution(x, channels, groups=groups)
        return self.add('shuffle', x, numbers=(groups,))

    def resolution(self, x: int) -> int:
        channels, rows = self.shapes[x]
        kinds = ['pad_space', 'upsample'] if rows < 9 else []
        kinds += ['max_pool', 'avg_pool'] if rows > 1 else []
        kinds += ['pixel_unshuffle'] if rows > 1 and rows % 2 == 0 and channels <= 4 else []
        kinds += ['pixel_shuffle'] if channels % 4 == 0 and channels > 4 and rows < 9 else []
        kind = self.choose(kinds or ['squeeze'])
        shape = {
            'pad_space': (channels, rows + 1),
            'upsample': (channels, 2 * rows),
            'max_pool': (channels, -(-rows // 2)),
            'avg_pool': (channels, rows // 2),
            'pixel_unshuffle': (4 * channels, rows // 2),
            'pixel_shuffle': (channels // 4, 2 * rows),
            'squeeze': (channels, 1),
        }[kind]
        return self.add(kind, x, shape=shape)

    def head(self, x: int) -> None:
        channels, rows = self.shapes[x]
        way = self.choose(['mean', 'mean', 'flatten', 'flatten', 'map'])
        if way == 'map':
            self.convolution(self.convolution(x), 3)
            return
        width = channels * rows**2 if way == 'flatten' else channels
        if width > 400:
            way, width = 'mean', channels
        x = self.add(way, x, shape=(width, 1))
        if self.maybe(0.5):
            x = self.add('linear', x, shape=(5, 1), layer=nn.Linear(width, 5, bias=self.maybe(0.5)))
            if self.maybe(0.5):
                x = self.add('follower', x, layer=nn.BatchNorm1d(5))
            x, width = self.add('activation', x, layer=nn.ReLU()), 5
        self.add('linear', x, shape=(4, 1), layer=nn.Linear(width, 4))


def _randomise(model: nn.Module) -> None:
    '''No scale, shift or statistic is left at a value that would hide a mix-up.'''
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.normal_(0, 0.5)
                module.running_var.uniform_(0.5, 2)
            if (
                isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm))
                and module.weight is not None
            ):
                module.weight.normal_(1, 0.5)
                module.bias.normal_(0, 0.5)
            if isinstance(module, nn.PReLU):
                module.weight.uniform_(-0.5, 0.9)

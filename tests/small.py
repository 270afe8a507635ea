'''Small networks, data and guards that several test modules share.'''

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from zennit.composites import COMPOSITES
from zennit.core import Composite, Hook
from zennit.layer import Sum

import zennit_prune as zp


def images(count: int = 4, size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    '''Noise shaped like images, without touching the global random state.'''
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def labels(count: int = 4, classes: int = 4) -> torch.Tensor:
    '''Class indices, every class in turn.'''
    return torch.arange(count) % classes


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    '''Give a network random weights and BatchNorm statistics that are not the identity, and evaluation mode.'''
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if name.endswith('running_var'):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            else:
                scale = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.2
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator) + (tensor.dim() == 1) * 0.1)
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) and module.weight is not None:
                module.weight.add_(1.0)
    return model.eval()


def chain(classes: int = 4) -> nn.Sequential:
    '''Convolutions in a row, without BatchNorm, flattened into two linear layers; for images of 8 by 8.'''
    return seeded(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 5, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(5, 7, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(28, 9),
            nn.ReLU(),
            nn.Linear(9, classes),
        )
    )


class Block(nn.Module):
    '''A residual block as users write it.'''

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return F.relu(y)


class Residual(nn.Module):
    '''A residual network with functional additions and BatchNorm.'''

    def __init__(self, width: int = 6, classes: int = 4):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.block1 = Block(width, 5)
        self.block2 = Block(width, 7)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.stem(x)), inplace=True)
        return self.fc(self.pool(self.block2(self.block1(x))).flatten(1))


class Functional(nn.Module):
    '''A residual network without BatchNorm, written with functions; the pool over space is a module or not.'''

    def __init__(self, pool: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1 = nn.Conv2d(6, 5, 3, padding=1)
        self.conv2 = nn.Conv2d(5, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(6, 7, 3, padding=1)
        self.conv4 = nn.Conv2d(7, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)
        self.pool = pool or nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.conv2(F.relu(self.conv1(x))) + x)
        x = torch.add(x, self.conv4(torch.relu(self.conv3(x)))).relu()
        return self.fc(self.pool(x).flatten(1))


class Modular(Functional):
    '''The same network as :class:`Functional`, written with modules.'''

    def __init__(self) -> None:
        super().__init__()
        self.sums = nn.ModuleList([Sum(), Sum()])
        self.relus = nn.ModuleList([nn.ReLU() for _ in range(5)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        relu = self.relus
        x = relu[0](self.stem(x))
        x = relu[2](self.sums[0](torch.stack([self.conv2(relu[1](self.conv1(x))), x], -1)))
        x = relu[4](self.sums[1](torch.stack([x, self.conv4(relu[3](self.conv3(x)))], -1)))
        return self.fc(self.pool(x).flatten(1))


class Mixed(nn.Module):
    '''Depthwise and grouped convolutions, GroupNorm, a concatenation, a flattened linear layer; for 8 by 8 images.'''

    def __init__(self, classes: int = 4):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 6, 1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.left = nn.Conv2d(6, 5, 3, padding=1)
        self.right = nn.Conv2d(6, 8, 3, padding=1, groups=2)
        self.join = nn.Conv2d(13, 6, 1)
        self.groups = nn.GroupNorm(3, 6)
        self.fc = nn.Linear(96, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.bn(self.point(F.relu(self.depthwise(x)))))
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        return self.fc(F.relu(self.groups(self.join(x))).flatten(1))


def composite(name: str = 'epsilon_plus', canonizers: Any = None, **options: Any) -> Composite:
    '''One of Zennit's composites by name, with the bounds that a box rule needs.'''
    if name == 'epsilon_gamma_box':
        options.update(low=torch.full((1, 3, 1, 1), -4.0), high=torch.full((1, 3, 1, 1), 4.0))
    return COMPOSITES[name](canonizers=canonizers, **options)


class Injected(Exception):
    '''What tests raise where something is to go wrong.'''


class RaisingRule(Hook):
    '''A rule that fails in the backward pass.'''

    def backward(self, module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        raise Injected('the rule raises')


class Tripwire(nn.Module):
    '''Passes its input on, until armed: then it raises where it is run with values, copied, or run at all.'''

    armed = ''

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.armed == 'run' or (self.armed == 'values' and x.device.type != 'meta'):
            raise Injected('the tripwire was run')
        return x

    def __deepcopy__(self, memo: dict[int, Any]) -> Tripwire:
        if self.armed == 'copy':
            raise Injected('the tripwire was copied')
        copy = Tripwire()
        copy.training = self.training
        return copy


def snapshot(model: nn.Module) -> list[Any]:
    '''Everything about a network that no step may change, for :func:`same`.'''
    seen: list[Any] = [torch.get_rng_state()]
    for name, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        seen.append((name, id(module), type(module), module.training, sorted(module.__dict__), list(module._modules)))
        seen.append([(key, id(tensor)) for key, tensor in tensors.items()])
        seen += [tensor if tensor is None else tensor.detach().clone() for tensor in tensors.values()]
        for tensor in tensors.values():
            if tensor is not None:
                seen.append((tensor.requires_grad, tensor.grad_fn, id(tensor.grad), tensor._version))
                seen.append(None if tensor.grad is None else tensor.grad.clone())
        seen += [
            list(hooks.items()) for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        ]
        seen.append(getattr(module, 'eps', None))
    return seen


def contents(model: nn.Module) -> list[Any]:
    '''The same but for which objects hold the parameters: rules of some releases of Zennit swap them.'''
    seen: list[Any] = [torch.get_rng_state()]
    for name, module in model.named_modules():
        seen.append((name, id(module), module.training, sorted(module.__dict__), list(module._modules)))
        seen += [
            None if tensor is None else tensor.detach().clone()
            for tensors in (module._parameters, module._buffers)
            for tensor in tensors.values()
        ]
        seen += [list(hooks.items()) for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        seen.append(getattr(module, 'eps', None))
    return seen


def same(before: list[Any], after: list[Any]) -> bool:
    '''Whether two snapshots are bit-identical.'''
    return len(before) == len(after) and all(
        isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, torch.Tensor)
        else a == b
        for a, b in zip(before, after)
    )


def lived_in(model: nn.Module) -> nn.Module:
    '''A network in the middle of somebody's work: gradients, hooks, frozen parameters, mixed training flags.'''
    model.train()
    model(images(4)).sum().backward()
    for position, module in enumerate(model.modules()):
        module.training = position % 3 > 0
    parameters = list(model.parameters())
    for parameter in parameters[::3]:
        parameter.requires_grad_(False)
    next(iter(model.children())).register_forward_hook(_nothing)
    list(model.children())[-1].register_forward_pre_hook(_nothing)
    return model


def _nothing(*_: Any) -> None:
    return None


def apart(left: torch.Tensor, right: torch.Tensor) -> float:
    '''The largest difference over the largest value.'''
    left, right = left.detach(), right.detach()
    return float((left - right).abs().max() / right.abs().max())


def drawn_of(group: zp.graph.ChannelGroup, random: np.random.Generator, count: int) -> list[int]:
    '''Random channels of a group, at most ``count``, equally many of each of its blocks.'''
    return group.order_by_block(random.random(group.size))[: count // group.step * group.step].tolist()

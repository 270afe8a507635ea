'''The main job on any device: trace, score, look, plan, try, cut, repair, save and load; the results on the CPU.'''
from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zennit_prune as zp

CLASSES, SAMPLES = 4, 32


class Block(nn.Module):
    '''Two convolutions with BatchNorm and a shortcut.'''

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


class Residual(nn.Module):
    '''A small residual network.'''

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.norm(self.stem(x)).relu()).mean((2, 3)))


def network(dtype: torch.dtype = torch.float32) -> Residual:
    '''One with statistics of BatchNorm that are not those it begins with, and predictions of all classes.

    Part of it is frozen.
    '''
    torch.manual_seed(0)
    model = Residual()
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(16, 3, 8, 8))
        model.eval()
        model.head.bias -= model(data()[0]).mean(0)
        model.train()
    model.stem.weight.requires_grad_(False)
    model.blocks[0].eval()
    return model.to(dtype)


def data(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    '''Images and their classes, on the CPU.'''
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SAMPLES, 3, 8, 8, generator=generator).to(dtype), torch.arange(SAMPLES) % CLASSES


def state_of(model: nn.Module) -> dict[str, Any]:
    '''All that nothing may change: values, gradients, flags, and hooks.'''
    parameters = {name: (tensor.requires_grad, tensor.grad) for name, tensor in model.named_parameters()}
    modules = {name: (module.training, len(module._forward_hooks)) for name, module in model.named_modules()}
    values = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    return {'parameters': parameters, 'modules': modules, 'values': values,
            'tensors': [id(tensor) for tensor in (*model.parameters(), *model.buffers())]}


def devices_of(model: nn.Module) -> set[torch.device]:
    '''Where a network is.'''
    return {tensor.device for tensor in (*model.parameters(), *model.buffers())}


def run(model: nn.Module, device: torch.device, folder: Path) -> dict[str, Any]:
    '''Do the job with a network that is on a device already, from images on the CPU.'''
    dtype = next(model.parameters()).dtype
    x, y = data(dtype)
    shown, found = x[:3].to(device), {}
    pruner = zp.Pruner(model, None, shown[:1], progress=False)
    relevance = pruner.collect((x, y), exemplars=2, progress=False)
    plan = pruner.plan(relevance, zp.Budget(flops=0.6))
    found['groups'] = [(group.name, group.size) for group in zp.trace(model, shown[:1], progress=False).groups]
    found['relevance'] = {name: values.clone() for name, values in relevance.items()}
    found['heatmap'] = zp.heatmap(model, None, shown)
    found['removed'] = dict(plan.removed)
    small = plan.apply(model, progress=False)
    masked, repaired = plan.masked(model), zp.repair(model, small, plan, x, progress=False)
    zp.save(repaired, plan, folder / 'small.safetensors')
    loaded = zp.load(model, folder / 'small.safetensors')
    in_place = plan.apply_(deepcopy(model))
    networks = {'masked': masked, 'small': small, 'repaired': repaired, 'loaded': loaded, 'in place': in_place}
    found['outputs'] = {}
    for name, one in {'original': model, **networks}.items():
        assert devices_of(one) == {shown.device}, name
        output = deepcopy(one).eval()(shown)
        assert output.device == shown.device
        found['outputs'][name] = output.detach().cpu()
    found['agreement'] = zp.agreement(model, repaired, None, shown).cosine
    found['error'] = zp.verify(model, small, plan, shown[:1])
    assert not {value.device for value in (*found['relevance'].values(), found['heatmap'])} - {torch.device('cpu')}
    return found

'''What a pruned network has to compute, told from its values alone: the library is not asked.

Weights are random, so that every number in a weight of the pruned network is found again in the original's, and with
it the rows and columns that are left. Where a row stays and a column went, the original is given a zero: nothing reads
what is removed. What brings removed channels forth is left as it is, so that whatever else looks at them shows.
'''

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import nn

import zennit_prune as zp


def reading_dims(model: nn.Module) -> dict[str, int]:
    '''The dimension along which each weight reads, by the type of its module; without one, it is the second.'''
    dims = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if tensor.dim() > 1 and min(tensor.shape[:2]) > 1:
            dims[name] = 1
    for prefix, module in model.named_modules():
        weight = f'{prefix}.weight' if prefix else 'weight'
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            dims[weight] = 0
        elif isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            dims[weight] = 1
    return dims


def left(original: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    '''Which entries of a weight are in the pruned one, which must be made of nothing else.'''
    found = torch.isin(original, pruned)
    assert len(original.unique()) == original.numel(), 'equal numbers in a weight: nothing can be told from them'
    assert int(found.sum()) == pruned.numel(), "a number of the pruned weight is not the original's"
    return found


def silenced(model: nn.Module, pruned: nn.Module, reads: Mapping[str, int] | None = None,
             meeting: Iterable[str] = ()) -> nn.Module:
    '''The original where no weight reads what the pruned network lacks.

    Parameters
    ----------
    model, pruned: torch.nn.Module
        The networks.
    reads: mapping of str to int, optional
        By name, the dimensions along which other parameters are read than :func:`reading_dims` says.
    meeting: iterable of str
        Layers whose outputs are multiplied with others, as queries: no weight reads them, so what they lack of outputs
        is zero.
    '''
    silent = copy.deepcopy(model)
    after = dict(pruned.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, dim in {**reading_dims(model), **(reads or {})}.items():
            weight = dict(silent.named_parameters(remove_duplicate=False))[name]
            original = dict(model.named_parameters(remove_duplicate=False))[name]
            if original.shape == after[name].shape:
                continue
            stays = left(original, after[name])
            weight[stays.any(dim, keepdim=True) & ~stays] = 0  # other rows bring forth what nobody reads
        for name in meeting:
            layer, small = silent.get_submodule(name), pruned.get_submodule(name)
            gone = ~left(model.get_submodule(name).weight, small.weight).flatten(1).any(1)
            for tensor in layer.parameters(recurse=False):
                tensor[gone] = 0
    return silent


def assert_rows(model: nn.Module, pruned: nn.Module, plan: zp.Plan) -> None:
    '''The rows that a layer has lost are those that the plan names, where it names all of them by their own numbers.'''
    layers = dict(model.named_modules())
    for name, positions in plan.removed.items():
        layer = layers.get(name)
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) and not getattr(layer, 'transposed', False):
            rows = left(layer.weight, pruned.get_submodule(name).weight).flatten(1).any(1)
            if plan.graph.group(name).size == len(rows):  # not several rows for each position, and none locked
                assert (~rows).nonzero().flatten().tolist() == list(positions)

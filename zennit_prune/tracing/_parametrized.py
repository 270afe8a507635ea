'''Narrow weights that are computed by ``torch.nn.utils.parametrize``, as by ``parametrizations.weight_norm``.

Channels are removed from the tensors that such a weight is computed from, and the parametrization stays. Slices of them
do not always compute the slice of the weight: with fewer inputs a filter has another norm. The computed weight is
compared with the slice; where they differ, the parametrization's ``right_inverse`` gives the tensors that compute it,
and where there are none, the channels stay.
'''
from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from ..errors import PruneError
from ..util._networks import (
    LISTS,
    OF_HOOKS,
    Indices,
    computed_name,
    modules_by_name,
    narrowed,
    tensors_by_module,
    unique_tensors,
)
from ._labels import Field
from ._tracer import Tracer

REMEDY = ('torch.nn.utils.parametrize.remove_parametrizations makes it a plain parameter, which can be pruned, and '
          'register_parametrization puts it back')


def parametrizations(network: nn.Module) -> dict[str, ParametrizationList]:
    '''Return all parametrizations of a network by name, e.g. ``'conv.parametrizations.weight'``.'''
    return {name: module for name, module in modules_by_name(network) if isinstance(module, ParametrizationList)}


def carriers(tensors: Sequence[torch.Tensor], like: torch.Tensor, dim: int) -> list[torch.Tensor]:
    '''Return those tensors that, by their shape, hold the channels of the weight ``like`` along a dimension.'''
    return [tensor for tensor in tensors if tensor.dim() == like.dim() and tensor.shape[dim] == like.shape[dim] > 1]


def weights_of(layer: nn.Module) -> list[torch.Tensor]:
    '''Return the weight of a layer, or the tensors of its full size that it is computed from.'''
    weight = layer._parameters.get('weight')
    if weight is not None:
        return [weight]
    found = [tensor for name, tensor in tensors_by_module(layer) if computed_name(name) == 'weight']
    largest = max((tensor.numel() for tensor in found), default=0)
    return [tensor for tensor in found if tensor.numel() == largest]


def read(found: ParametrizationList) -> torch.Tensor:
    '''Return the weight as it is computed in evaluation mode.'''
    with torch.no_grad():
        return cast(torch.Tensor, copy.deepcopy(found).eval()()).detach()


def record_computed(tracer: Tracer, name: str, tensors: Sequence[torch.Tensor], weight: torch.Tensor) -> None:
    '''Record that a weight was computed, and give it the labels of the tensors that have its sizes.'''
    if tracer.silent or tracer.is_parameter(weight):
        return
    operation = tracer.begin('parametrization')
    operation.inputs, operation.reads = [*map(tracer.fields_of, tensors)], [*map(tracer.value_of, tensors)]
    operation.active = [False] * len(tensors)
    fields: dict[tuple[int, ...], Field] = {}
    for number in operation.decisions.setdefault('largest first', sorted(
            range(len(tensors)), key=lambda number: -tensors[number].numel())):
        for field in tracer.fields_of(tensors[number]):
            if tensors[number].dim() != weight.dim() or tracer.is_active(weight) or any(
                    tensors[number].shape[dim] != weight.shape[dim] for dim in field.dims):
                operation.locks.append((field.labels, 'a weight is computed from it'))
            elif (0, 1) in fields and field.dims == (1,):  # the groups of a convolution share it
                operation.locks += [(each.labels, 'a weight is computed from it') for each in (field, fields[0, 1])]
            elif field.dims in fields:
                operation.ties.append((fields[field.dims].labels, field.labels))
            else:
                fields[field.dims] = field
    operation.outputs = [[*fields.values()]]  # the very fields of the tensors: nothing that a replay could compare
    operation.flops = tracer.take_silent_flops()
    tracer.place(weight, operation.outputs[0])
    tracer.parameters[id(weight)] = name
    tracer.renew(weight)
    operation.writes = [tracer.value_of(weight)]
    tracer.record(operation)


def restore(small: nn.Module, model: nn.Module, kept: Mapping[str, Mapping[int, Indices]]) -> None:
    '''Let the parametrizations of ``small``, narrowed from ``model``, compute the slices of its weights.

    Raises
    ------
    PruneError
        If a parametrization cannot compute the slice.
    '''
    after = parametrizations(small)
    for name, before in parametrizations(model).items():
        held = {f'{name}.{inner}': tensor for inner, tensor in tensors_by_module(before)}
        if not held.keys() & kept.keys():
            continue
        weight, index = read(before), {}
        for inner, tensor in held.items():
            for dim, at in kept.get(inner, {}).items():
                if carriers([tensor], weight, dim):
                    index[dim] = at
        if not assign(after[name], narrowed(weight, index)):
            raise PruneError(f'{computed_name(f"{name}.original")!r} cannot be narrowed with its parametrization '
                             f'({kinds(before)}): what it computes from the slices is not the slice of the weight. '
                             f'{REMEDY}; or keep its channels.')


def assign(found: ParametrizationList, value: torch.Tensor) -> bool:
    '''Let a parametrization compute ``value`` by changing few of its tensors, and return whether it does.'''
    if _computes(found, value):
        return True
    originals: list[torch.Tensor] = [*found.parameters(recurse=False), *found.buffers(recurse=False)]
    saved = [tensor.detach().clone() for tensor in originals]
    try:
        with torch.no_grad():
            wanted: Any = value
            for module in reversed(list(found)):
                wanted = cast(Any, module).right_inverse(wanted)
            wanted = [wanted] if isinstance(wanted, torch.Tensor) else list(wanted)
    except Exception:  # of users: there is none, or it does not take this
        return False
    names = ['original'] if found.is_tensor else [f'original{number}' for number in range(len(wanted))]
    targets = [getattr(found, name) for name in names]
    if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in targets]:
        return False
    single = sorted(range(len(targets)), key=lambda number: targets[number].numel())
    for chosen in (*([number] for number in single), single):
        with torch.no_grad():
            for number in chosen:
                targets[number].copy_(wanted[number])
        if _computes(found, value):
            return True
        with torch.no_grad():
            for tensor, old in zip(originals, saved):
                tensor.copy_(old)
    return False


def _computes(found: ParametrizationList, value: torch.Tensor) -> bool:
    '''Return whether the weight is ``value`` but for rounding.'''
    try:
        weight = read(found)
    except Exception:  # tensors that do not fit each other
        return False
    if weight.shape != value.shape or weight.dtype != value.dtype:
        return False
    allowed = torch.finfo(value.dtype).eps ** 0.75 * float(value.abs().max() if value.numel() else 0)
    return bool((weight - value).abs().le(allowed).all())


def kinds(found: ParametrizationList) -> str:
    '''Name the classes of a weight's parametrizations.'''
    return ', '.join(type(module).__name__.strip('_') for module in found)


def fixed_dims(model: nn.Module) -> Iterator[tuple[str, int, str]]:
    '''Yield the dimensions that cannot be narrowed, each with the name of the tensor and the reason.

    Every parametrization is tried: a third of the weight's indices are removed along each of its first two dimensions,
    and along both.
    '''
    for name, found in parametrizations(model).items():
        tensors = [(f'{name}.{inner}', tensor) for inner, tensor in tensors_by_module(found)]
        if any(tensor.is_meta for _, tensor in tensors):
            continue
        weight = read(found)
        stuck: set[int] = set()
        for dims in ((0,), (1,), (0, 1)):
            if max(dims) < weight.dim() and not stuck & set(dims) and not _narrows(found, weight, dims):
                stuck |= set(dims)
        reason = f'its parametrization ({kinds(found)}) does not compute the slice of a weight from slices; {REMEDY}'
        for inner, tensor in tensors:
            yield from ((inner, dim, reason) for dim in stuck if carriers([tensor], weight, dim))
    for name, module in modules_by_name(model):
        for hook in module._forward_pre_hooks.values():
            if type(hook).__module__ in OF_HOOKS:
                kind = type(hook).__module__.rpartition('.')[2]
                reason = (f'its weight is computed by a hook of torch.nn.utils.{kind}: remove it '
                          f'(torch.nn.utils.remove_{kind}), or use torch.nn.utils.parametrizations.{kind}')
                for inner, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                    if inner.startswith(f'{cast(Any, hook).name}_'):
                        yield from ((f'{name}.{inner}' if name else inner, dim, reason) for dim in range(tensor.dim()))


def _narrows(found: ParametrizationList, weight: torch.Tensor, dims: Sequence[int]) -> bool:
    index = {dim: Indices(np.arange(weight.shape[dim] - max(1, weight.shape[dim] // 3))) for dim in dims
             if weight.shape[dim] > 1}
    memo: dict[int, Any] = {}
    for _, tensor in tensors_by_module(found):
        there = {dim: at for dim, at in index.items() if carriers([tensor], weight, dim)}
        new = narrowed(tensor, there).clone()
        memo[id(tensor)] = nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new
    return assign(copy.deepcopy(found, memo), narrowed(weight, index))


def plain(network: nn.Module, freely: bool = False) -> nn.Module:
    '''Make the computed weights of a network plain parameters, in place.

    Parameters
    ----------
    network: torch.nn.Module
        A copy that is used here only.
    freely: bool
        Whether only modules are changed whose parametrizations can compute any weight.

    Returns
    -------
    torch.nn.Module
        The network.
    '''
    for _, module in modules_by_name(network):
        lists = module._modules.get(LISTS)
        if not isinstance(lists, nn.ModuleDict):
            continue
        found = {name: cast(ParametrizationList, each) for name, each in lists.items()}
        values = {name: read(each) for name, each in found.items()}
        if freely and not all(assign(copy.deepcopy(each), _another(values[name])) for name, each in found.items()):
            continue
        del module._modules[LISTS]
        module.__class__ = type(module).__bases__[0]  # the class with the properties is shared with other copies
        for name, value in values.items():
            learned = any(isinstance(tensor, nn.Parameter) and tensor.requires_grad for tensor in
                          found[name]._parameters.values())
            module.register_parameter(name, nn.Parameter(value.clone(), requires_grad=learned))
        hooks = module._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if _is_of_parametrizations(hook)]:
            del hooks[key]  # it reads files of plain weights into parametrizations, and cannot be pickled
    return network


def _is_of_parametrizations(hook: Any) -> bool:
    '''Return whether a hook was registered by ``torch.nn.utils.parametrizations``.'''
    return getattr(getattr(hook, 'hook', hook), '__module__', '') == 'torch.nn.utils.parametrizations'


def _another(weight: torch.Tensor) -> torch.Tensor:
    '''Return a weight that obeys no constraint: of the other sign, every entry with a factor of its own.'''
    factors = torch.linspace(0.5, 1.5, weight.numel(), dtype=weight.dtype, device=weight.device)
    return -weight * factors.view(weight.shape)


def copy_values(source: nn.Module, network: nn.Module) -> None:
    '''Give ``network`` the values of ``source``, a :func:`plain` copy of it with new values.

    Raises
    ------
    PruneError
        If a parametrization cannot compute the new value of its weight.
    '''
    values = dict(tensors_by_module(source))
    with torch.no_grad():
        for name, tensor in unique_tensors(network).items():
            if name in values:
                tensor.copy_(values[name])
    for name, found in parametrizations(network).items():
        weight = computed_name(f'{name}.')
        if weight in values and not assign(found, values[weight].to(read(found))):
            raise PruneError(f'{weight!r} has new values that its parametrization ({kinds(found)}) cannot compute. '
                             f'{REMEDY}.')


def computed_tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    '''Return all parameters and buffers by name, with the weight in place of each tensor that holds its channels.'''
    tensors = dict(tensors_by_module(network))
    for name, found in parametrizations(network).items():
        weight = read(found)
        for inner, tensor in tensors_by_module(found):
            if any(carriers([tensor], weight, dim) for dim in range(min(weight.dim(), 2))):
                tensors[f'{name}.{inner}'] = weight
    return tensors

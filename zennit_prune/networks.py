'''Small helpers on whole networks and on nested arguments.'''
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .errors import PruneError


def tensors_in(value: Any) -> list[torch.Tensor]:
    '''All tensors in nested tuples, lists and dicts, in order.'''
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]


def output_tensors(output: Any) -> list[torch.Tensor]:
    '''All tensors a network returned, in nested tuples, lists, dicts and the attributes of objects.'''
    return list(_found(output, set()))


def _found(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif id(value) not in seen and not isinstance(value, (str, bytes, type, nn.Module)):
        seen.add(id(value))
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list, set)) else \
            vars(value).values() if hasattr(value, '__dict__') else [
                getattr(value, name) for kind in type(value).__mro__ for name in getattr(kind, '__slots__', ()) if hasattr(value, name)]
        for part in parts:
            yield from _found(part, seen)


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    '''Apply a function to all tensors in nested tuples, lists and dicts.'''
    return tree_map_only(torch.Tensor, function, value)


def tensors_by_module(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    '''Every parameter and buffer under each of its names.'''
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def unique_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    '''Every parameter and buffer once, under its first name.'''
    names: dict[int, str] = {}
    return {name: tensor for name, tensor in tensors_by_module(model) if names.setdefault(id(tensor), name) == name}


def unwrapped(model: nn.Module) -> nn.Module:
    '''The network inside ``DataParallel``, ``DistributedDataParallel`` or ``torch.compile``.

    Raises
    ------
    PruneError
        For what is not an ordinary module: scripted, exported or quantized networks, or no module at all.
    '''
    if not isinstance(model, nn.Module):
        raise PruneError(f'a torch.nn.Module is needed, not a {type(model).__name__}.')
    while True:
        if hasattr(model, '_orig_mod'):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            break
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise PruneError(f'module {name!r} is scripted ({type(module).__name__}): its code cannot be narrowed. Prune the '
                             'network before torch.jit.script or torch.jit.trace.')
        if '.quantized' in type(module).__module__:
            raise PruneError(f'module {name!r} is quantized ({type(module).__name__}): prune the network in floating point, '
                             'then quantize it.')
    return model


def structural_copy(model: nn.Module, device: str = 'meta') -> nn.Module:
    '''A copy of a network: on ``'meta'`` without data; ``forward`` may write what it likes into it.'''
    memo: dict[int, Any] = {}
    if device == 'meta':
        for _, tensor in tensors_by_module(model):
            empty = torch.empty_like(tensor, device='meta', requires_grad=False)
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
        for module in model.modules():
            for value in module.__dict__.values():
                if isinstance(value, torch.Tensor):  # what forward cached
                    memo[id(value)] = torch.empty_like(value, device='meta', requires_grad=False)
    return copied(model, memo)


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    '''``copy.deepcopy`` with an error that says what to do.'''
    try:
        return copy.deepcopy(model, memo or {})
    except Exception as error:
        raise PruneError(f'a {type(model).__name__} cannot be copied ({error}). Remove what cannot: tensors with a gradient '
                         'history kept as attributes, open files, locks.') from error

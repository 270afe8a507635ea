'''Small helpers on whole networks and on nested arguments.'''
from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .errors import PruneError

ATOMIC = (int, float, bool, str, type(None))
EMPTY = (dict, OrderedDict, list, set)
COPY_PROTOCOL = ('__deepcopy__', '__reduce__', '__reduce_ex__', '__getstate__', '__setstate__', '__getnewargs_ex__',
                 '__getnewargs__')


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    '''Traces make a hundred thousand objects that stay; a search for garbage takes longer than the trace.'''
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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
        for part in _parts(value):
            yield from _found(part, seen)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (tuple, list, set)):
        return value
    if hasattr(value, '__dict__'):
        return vars(value).values()
    names = [name for kind in type(value).__mro__ for name in getattr(kind, '__slots__', ())]
    return [getattr(value, name) for name in names if hasattr(value, name)]


def device_of(model: nn.Module) -> torch.device:
    '''Where a network is.'''
    return next((parameter.device for parameter in model.parameters()), torch.device('cpu'))


def check_finite(inputs: Iterable[torch.Tensor]) -> None:
    '''Refuse inputs that are not finite.'''
    for tensor in inputs:
        if not torch.isfinite(tensor).all():
            raise PruneError(f'an input of shape {tuple(tensor.shape)} holds values that are not finite (NaN or '
                             'infinite): check the data.')


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    '''Apply a function to all tensors in nested tuples, lists and dicts.'''
    return tree_map_only(torch.Tensor, function, value)


def tensors_by_module(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    '''Every parameter and buffer under each of its names.'''
    parameters: list[tuple[str, torch.Tensor]] = []
    buffers: list[tuple[str, torch.Tensor]] = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        for found, tensors in ((parameters, module._parameters), (buffers, module._buffers)):
            found += [(f'{prefix}.{name}' if prefix else name, tensor)
                      for name, tensor in tensors.items() if tensor is not None]
    return parameters + buffers


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
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            break
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise PruneError(f'module {name!r} is scripted ({type(module).__name__}): its code cannot be narrowed. '
                             'Prune the network before torch.jit.script or torch.jit.trace.')
        if '.quantized' in type(module).__module__:
            raise PruneError(f'module {name!r} is quantized ({type(module).__name__}): prune the network in floating '
                             'point, then quantize it.')
    return model


def structural_copy(model: nn.Module, device: str = 'meta') -> nn.Module:
    '''A copy of a network: on ``'meta'`` without data; ``forward`` may write what it likes into it.'''
    memo: dict[int, Any] = {}
    if device == 'meta':
        for _, tensor in tensors_by_module(model):
            empty = torch.empty_like(tensor, device='meta', requires_grad=False)
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
        share_hooks(model, memo)
        for module in model.modules():
            for value in module.__dict__.values():
                if isinstance(value, torch.Tensor):  # what forward cached
                    memo[id(value)] = torch.empty_like(value, device='meta', requires_grad=False)
    return copied(model, memo)


def share_hooks(model: nn.Module, memo: dict[int, Any]) -> None:
    '''Let a copy that is run once and thrown away share the dozen empty dicts for hooks of every module.'''
    for module in model.modules():
        memo.update((id(value), value) for key, value in module.__dict__.items() if 'hooks' in key and not value)


def _copied_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    '''What ``copy.deepcopy`` does to modules, five times as fast: it would copy every key and number they hold.'''
    kind = type(module)
    if id(module) in memo or any(getattr(kind, name, None) is not getattr(nn.Module, name, None)
                                 for name in COPY_PROTOCOL):
        return copy.deepcopy(module, memo)
    new = kind.__new__(kind)
    memo[id(module)] = new
    attributes = {}
    for key, value in vars(module).items():
        if type(value) in ATOMIC or (type(value) is tuple and all(type(item) in ATOMIC for item in value)):
            attributes[key] = value
        elif type(value) in EMPTY and not value and id(value) not in memo:
            attributes[key] = memo[id(value)] = type(value)()
        elif key == '_modules' and id(value) not in memo:
            attributes[key] = type(value)((name, child if child is None else _copied_module(child, memo))
                                          for name, child in value.items())
        else:
            attributes[key] = copy.deepcopy(value, memo)
    new.__dict__.update(attributes)
    return new


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    '''``copy.deepcopy`` with an error that says what to do.'''
    try:
        return _copied_module(model, {} if memo is None else memo)
    except Exception as error:
        raise PruneError(f'a {type(model).__name__} cannot be copied ({error}). Remove what cannot: tensors with a '
                         'gradient history kept as attributes, open files, locks.') from error

'''Small helpers on whole networks and on nested arguments.

They name modules and tensors, copy a network without its data, slice tensors, and find tensors in tuples, lists and
dicts.
'''
from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NewType, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..errors import PruneError
from ._display import some

Indices = NewType('Indices', npt.NDArray[np.int64])  # along a dimension of a tensor; see ``tracing/_labels.py``
ATOMIC = frozenset((int, float, bool, str, type(None)))
EMPTY = (dict, OrderedDict, list, set)
CONTENTS = ('_parameters', '_buffers', '_modules')
HOOKS = frozenset(key for key in vars(nn.Module()) if 'hooks' in key)
OF_HOOKS = ('torch.nn.utils.weight_norm', 'torch.nn.utils.spectral_norm', 'torch.nn.utils.prune')  # before each call
LISTS = 'parametrizations'  # where torch.nn.utils.parametrize keeps what a weight is computed from
COMPILED = '_compiled_call_impl'  # of module.compile(): it calls the module it was made for, not a copy of that
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
MASKING = ('torch.nn.utils.prune', 'BasePruningMethod')  # a class, which is a hook of the modules that it masks
REMOVE_MASKS = ('[torch.nn.utils.prune.remove(module, hook._tensor_name) for module in {}.modules() '
                'for hook in list(module._forward_pre_hooks.values()) '
                'if isinstance(hook, torch.nn.utils.prune.BasePruningMethod)]')
QUANTIZING = ('torch.ao.quantization.fake_quantize', 'torch.ao.quantization._learnable_fake_quantize',
              'torch.ao.quantization.observer', 'torch.ao.nn.qat', 'torch.ao.nn.intrinsic.qat',
              'torch.ao.nn.quantized', 'torch.ao.nn.intrinsic.quantized', 'torchao.')
FLOAT = ('FloatFunctional', 'FXFloatFunctional')  # of torch.ao.nn.quantized: they add in floating point
MANY = 3  # names that an error lists
COPY_PROTOCOL = ('__deepcopy__', '__reduce__', '__reduce_ex__', '__getstate__', '__setstate__', '__getnewargs_ex__',
                 '__getnewargs__')


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    '''Suspend garbage collection: among the many lasting objects of a trace, it takes longer than the trace.'''
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def tensors_in(value: Any) -> list[torch.Tensor]:
    '''Return all tensors in nested tuples, lists and dicts, in order.'''
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    found: list[torch.Tensor] = []
    for item in value:
        if type(item) in ATOMIC:
            continue
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list, dict)):
            found += tensors_in(item)
    return found


def output_tensors(output: Any) -> list[torch.Tensor]:
    '''Return all tensors a network returned, in nested tuples, lists, dicts and the attributes of objects.'''
    return [output] if isinstance(output, torch.Tensor) else list(_found(output, set()))


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
    '''Return the device of a network.'''
    return next((parameter.device for parameter in model.parameters()), torch.device('cpu'))


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    '''Apply a function to all tensors in nested tuples, lists and dicts.'''
    return tree_map_only(torch.Tensor, function, value)


def modules_by_name(model: nn.Module, name: str = '') -> list[tuple[str, nn.Module]]:
    '''Return ``named_modules(remove_duplicate=False)``, faster: without a chain of generators for deep networks.'''
    found = [(name, model)]
    for key, child in model._modules.items():
        if child is not None:
            found += modules_by_name(child, f'{name}.{key}' if name else key)
    return found


def set_mode(network: nn.Module, training: bool) -> None:
    '''Do ``network.train(training)``, without the detour over ``Module.__setattr__`` where no module has its own.'''
    modules = [module for _, module in modules_by_name(network)]
    if any(type(module).train is not nn.Module.train for module in modules):
        network.train(training)
    else:
        for module in modules:
            module.__dict__['training'] = training


def tensors_by_module(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    '''Return every parameter and buffer under each of its names.'''
    parameters: list[tuple[str, torch.Tensor]] = []
    buffers: list[tuple[str, torch.Tensor]] = []
    for prefix, module in modules_by_name(model):
        for found, tensors in ((parameters, module._parameters), (buffers, module._buffers)):
            if tensors:
                found += [(f'{prefix}.{name}' if prefix else name, tensor)
                          for name, tensor in tensors.items() if tensor is not None]
    return parameters + buffers


def unique_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    '''Return every parameter and buffer once, under its first name.'''
    names: dict[int, str] = {}
    return {name: tensor for name, tensor in tensors_by_module(model) if names.setdefault(id(tensor), name) == name}


def computed_name(name: str) -> str:
    '''Return the name of the weight that a parametrization computes from the tensor ``name``; other names stay.'''
    parts = name.split('.')
    at = parts.index(LISTS) if LISTS in parts[:-2] else len(parts)
    return '.'.join((*parts[:at], *parts[at + 1:at + 2]))


def unwrapped(model: nn.Module) -> nn.Module:
    '''Return the network inside ``DataParallel``, ``DistributedDataParallel``, ``AveragedModel`` or ``torch.compile``.

    Raises
    ------
    PruneError
        For what is not an ordinary module: scripted, exported or quantized networks, lazy ones that have not run, or no
        module at all.
    '''
    if not isinstance(model, nn.Module):
        raise PruneError(f'a torch.nn.Module is needed, not a {type(model).__name__}.')
    *_, (model, _) = _within(model)
    for name, module in modules_by_name(model):
        if isinstance(module, torch.jit.ScriptModule):
            raise PruneError(f'module {name!r} is scripted ({type(module).__name__}): its code cannot be narrowed. '
                             'Prune the network before torch.jit.script or torch.jit.trace.')
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
            raise PruneError(f'module {name!r} has no sizes yet ({type(module).__name__}): run the network once on an '
                             'example, which makes its weights.')
        if '.quantized' in type(module).__module__ and type(module).__name__ not in FLOAT:
            raise PruneError(f'module {name!r} is quantized ({type(module).__name__}): prune the network in floating '
                             'point, then quantize it.')
    return model


def _within(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    '''Yield a module and what it wraps, outermost first, each with the expression for it.'''
    path = 'model'
    while True:
        yield model, path
        inner = '_orig_mod' if hasattr(model, '_orig_mod') else 'module' if isinstance(model, WRAPPERS) else ''
        if not inner:
            return
        model, path = cast(nn.Module, getattr(model, inner)), f'{path}.{inner}'


def prunable(model: nn.Module) -> nn.Module:
    '''Return the network inside a module, as :func:`unwrapped`, after a check that its weights can be narrowed.

    Raises
    ------
    PruneError
        For a network with masks of ``torch.nn.utils.prune``, one that is prepared for quantization, and what is not an
        ordinary module.
    '''
    network = unwrapped(model)
    _check_masks(*list(_within(model))[-1])
    _check_floating(network)
    return network


def _check_masks(model: nn.Module, path: str) -> None:
    '''Refuse a network with masks of ``torch.nn.utils.prune``, which compute a weight before every call.'''
    masks = [(name, module._get_name(), tensor) for name, module in model.named_modules()
             for tensor in _masked(module)]
    if not masks:
        return
    paths = [f'{path}.get_submodule({name!r})' if name else path for name, _, _ in masks]
    removals = [f'torch.nn.utils.prune.remove({layer}, {tensor!r})' for layer, (_, _, tensor) in zip(paths, masks)]
    remedy = '; '.join(removals)
    if len(masks) > MANY:
        remedy = f'{removals[0]}, or all at once: {REMOVE_MASKS.format(path)}'
    found = [f'{f"{name}.{tensor}" if name else tensor!r} ({kind})' for name, kind, tensor in masks]
    raise PruneError(f'the network has masks of torch.nn.utils.prune, which compute {len(masks)} of its tensors anew '
                     f'at every call: {some(found, MANY)}. Make the masked values permanent first (zeros stay zeros): '
                     f'{remedy}')


def _masked(module: nn.Module) -> list[str]:
    '''Return the tensors of a module that a mask of ``torch.nn.utils.prune`` computes.'''
    hooks = [hook for hook in module._forward_pre_hooks.values()
             if any((kind.__module__, kind.__name__) == MASKING for kind in type(hook).__mro__)]
    return [str(getattr(hook, '_tensor_name', 'weight')) for hook in hooks]


def _check_floating(model: nn.Module) -> None:
    '''Refuse a network that is prepared for quantization: fake quantization and observers see whole tensors.'''
    found: dict[str, str] = {}
    for name, module in modules_by_name(model):
        kind, inside = type(module), any(name.startswith(f'{outer}.' if outer else '') for outer in found)
        if (not inside and kind.__name__ not in FLOAT
                and any(base.__module__.startswith(QUANTIZING) for base in kind.__mro__)):
            found[name] = kind.__name__
    found |= {name: type(tensor).__name__ for name, tensor in tensors_by_module(model)
              if type(tensor).__module__.startswith(QUANTIZING)}
    if found:
        names = [f'{name!r} ({kind})' if name else f'itself ({kind})' for name, kind in found.items()]
        raise PruneError(f'the network is prepared for quantization: {some(names, MANY)}. Prune the network in '
                         'floating point first, then call torch.ao.quantization.prepare_qat, or what prepared it, on '
                         'the pruned one.')


def structural_copy(model: nn.Module, device: str = 'meta') -> nn.Module:
    '''Copy a network, without data on ``'meta'``; ``forward`` may write into the copy.'''
    if device != 'meta':
        return copied(model)
    memo: dict[int, Any] = {}
    for _, tensor in tensors_by_module(model):
        empty = without_data(tensor)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copied(model, memo, for_trace=True)


def without_data(tensor: torch.Tensor) -> torch.Tensor:
    '''Return a tensor of the same size, strides and type on ``'meta'``.'''
    if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.is_contiguous():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device='meta')  # a tenth of the time
    return torch.empty_like(tensor, device='meta', requires_grad=False)


class _Copier:
    '''A replacement of ``copy.deepcopy`` for modules, ten times as fast: keys and numbers are not copied.

    Parameters
    ----------
    memo: dict of int to object
        The memo of ``copy.deepcopy``.
    for_trace: bool
        The copy is run once and thrown away: it shares empty dicts for hooks, a dozen in every module, and tensors that
        ``forward`` cached are copied without data.
    '''

    def __init__(self, memo: dict[int, Any], for_trace: bool):
        self.memo, self.for_trace = memo, for_trace
        self._regular: dict[type, bool] = {}

    def module(self, module: nn.Module) -> nn.Module:
        kind, memo = type(module), self.memo
        if kind not in self._regular:
            self._regular[kind] = _copies_as_usual(kind)
        if id(module) in memo or not self._regular[kind]:
            return copy.deepcopy(module, memo)
        new = kind.__new__(kind)
        memo[id(module)] = new
        attributes = vars(module).copy()
        attributes.pop(COMPILED, None)
        for key, value in attributes.items():
            kind_of_value = type(value)
            if kind_of_value in ATOMIC or (self.for_trace and key in HOOKS and not value):
                continue
            if id(value) in memo:
                attributes[key] = memo[id(value)]
            elif kind_of_value in EMPTY and not value:
                attributes[key] = memo[id(value)] = kind_of_value()
            elif kind_of_value is tuple and ATOMIC.issuperset(map(type, value)):
                continue
            elif key in CONTENTS and kind_of_value in (dict, OrderedDict):
                attributes[key] = contents = kind_of_value()
                for name, item in value.items():
                    contents[name] = self.content(item)
            elif self.for_trace and isinstance(value, torch.Tensor):
                attributes[key] = memo[id(value)] = without_data(value)
            else:
                attributes[key] = copy.deepcopy(value, memo)
        new.__dict__.update(attributes)
        return new

    def content(self, value: Any) -> Any:
        '''Return a parameter, buffer or module within a module.'''
        if value is None or id(value) in self.memo:
            return None if value is None else self.memo[id(value)]
        return self.module(value) if isinstance(value, nn.Module) else copy.deepcopy(value, self.memo)


def _copies_as_usual(kind: type) -> bool:
    '''Return whether a class of modules leaves copying as it is; torch's own ``__setstate__`` complete old files.'''
    for name in COPY_PROTOCOL:
        method = getattr(kind, name, None)
        of_torch = name == '__setstate__' and str(getattr(method, '__module__', '')).startswith('torch.nn.modules.')
        if method is not getattr(nn.Module, name, None) and not of_torch:
            return False
    return True


def copied(model: nn.Module, memo: dict[int, Any] | None = None, for_trace: bool = False) -> nn.Module:
    '''Copy a network as ``copy.deepcopy`` does, faster, with an error that says what to do; see :class:`_Copier`.'''
    memo = {} if memo is None else memo
    for _, module in modules_by_name(model):
        for hook in module._forward_pre_hooks.values():
            name = getattr(hook, 'name', getattr(hook, '_tensor_name', ''))
            value = module.__dict__.get(name) if type(hook).__module__ in OF_HOOKS else None
            if isinstance(value, torch.Tensor):  # it has a history, and is computed anew when the copy runs
                memo[id(value)] = without_data(value) if for_trace else value.detach().clone()
    try:
        return _Copier(memo, for_trace).module(model)
    except Exception as error:
        raise PruneError(f'a {type(model).__name__} cannot be copied ({error}). Remove what cannot: tensors with a '
                         'gradient history kept as attributes, open files, locks.') from error


def narrowed(tensor: torch.Tensor, kept: Mapping[int, Indices], device: str | None = None) -> torch.Tensor:
    '''Keep the given indices of each dimension; on ``'meta'``, without data.

    Indices of shape (kept, blocks) differ from block to block of dimension 0, which lose equally many indices: the
    input channels of a grouped convolution, the output channels of a transposed one.
    '''
    order = None if tensor.is_contiguous() else sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    if device == 'meta':
        shape = [len(kept[dim]) if dim in kept else size for dim, size in enumerate(tensor.shape)]
        return _laid_out(torch.empty(shape, dtype=tensor.dtype, device='meta'), order)
    with torch.no_grad():
        for dim, index in sorted(kept.items()):
            at = torch.as_tensor(index, device=tensor.device)
            if at.dim() == 1:
                tensor = tensor.index_select(dim, at)
            else:
                blocks = tensor.chunk(at.shape[1])
                tensor = torch.cat([block.index_select(dim, rows) for block, rows in zip(blocks, at.unbind(1))])
    return _laid_out(tensor.detach(), order)


def _laid_out(tensor: torch.Tensor, order: list[int] | None) -> torch.Tensor:
    '''Return equal values with the dimensions in this order in memory, so that ``torch.channels_last`` stays.'''
    if order is None:
        return tensor
    return tensor.permute(order).contiguous().permute(sorted(range(len(order)), key=order.__getitem__))

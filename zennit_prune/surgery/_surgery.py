'''Narrow a network: slice parameters, buffers, the attributes that state their sizes, and optimizer state.

In place, tensors are exchanged wherever a network keeps them: besides its parameters and buffers, in lists, dicts and
objects. The protocols describe the graph of channels, which belongs to a room above, as far as it is needed here.
'''
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MethodType, ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..errors import PruneError
from ..tracing._attributes import Attribute, set_attributes
from ..tracing._labels import Array, Channels, Labels
from ..tracing._trace import Recording
from ..util._networks import ATOMIC, Indices, computed_name, copied, modules_by_name, narrowed, tensors_by_module

Mask = npt.NDArray[np.bool_]
LEAVES = (torch.Tensor, str, bytes, type, ModuleType)
New = Mapping[int, torch.Tensor]


class Solved(Protocol):
    '''The assignment of labels to channels.'''

    @property
    def component(self) -> Labels:
        '''For each label, the smallest label that is tied to it.'''

    @property
    def channel(self) -> Channels:
        '''For each label, the number of its channel, or -1 where it must stay.'''

    @property
    def group(self) -> Array:
        '''For each channel, the number of its group.'''

    @property
    def locked(self) -> Mask:
        '''For each label, whether it must stay.'''


class Reading(Protocol):
    '''The roles of the indices of parameters.'''

    @property
    def consumes(self) -> Mask:
        '''For each label, whether a weight reads channels there.'''


class RemovableChannels(Protocol):
    '''The removable channels of a traced network.'''

    @property
    def _recording(self) -> Recording:
        '''The trace.'''

    @property
    def _solution(self) -> Solved:
        '''The assignment of labels to channels.'''

    @property
    def _roles(self) -> Reading:
        '''The roles of the indices of parameters.'''

    def _removed_labels(self, removed: Mapping[str, Sequence[int]]) -> Mask:
        '''Return, for each label, whether it is removed with the channels at these positions of these groups.'''


def held_by(model: nn.Module) -> list[Any]:
    '''Return all objects that a network's attributes lead to and that may hold a tensor.'''
    found: dict[int, Any] = {}
    waiting: list[Any] = [model]
    while waiting:
        value = waiting.pop()
        if type(value) not in ATOMIC and id(value) not in found and not isinstance(value, LEAVES):
            found[id(value)] = value
            waiting += _parts(value)
    return list(found.values())


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return value
    if isinstance(value, partial):
        return (_state(value),)
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    if isinstance(value, MethodType):
        return (value.__self__,)
    if isinstance(value, torch.optim.Optimizer):  # whose state is more than an exchange
        return ()
    attributes = getattr(value, '__dict__', None)
    return (*([attributes] if type(attributes) is dict else ()), *(held for _, held in _slots(value)))


def _state(value: partial[Any]) -> Any:
    return value.__reduce__()[2]  # type: ignore[index]


def _slots(value: Any) -> Iterator[tuple[str, Any]]:
    for kind in type(value).__mro__:
        names = kind.__dict__.get('__slots__', ())
        for name in (names,) if isinstance(names, str) else names:
            if hasattr(value, name):
                yield name, getattr(value, name)


def exchange(held: Iterable[Any], new: New) -> None:
    '''Put new tensors in the place of those with these ids; only values that change are written.'''
    for value in held:
        if isinstance(value, dict):
            if any(_exchanged(key, new) is not key for key in value):
                items = [(_exchanged(key, new), item) for key, item in value.items()]
                value.clear()
                for key, item in items:
                    value[key] = item
            _write(list(value.items()), value.__setitem__, new)
        elif isinstance(value, (list, deque)):
            _write(list(enumerate(value)), value.__setitem__, new)
        elif isinstance(value, set):
            old = [item for item in value if _exchanged(item, new) is not item]
            value.difference_update(old)
            value.update(_exchanged(item, new) for item in old)
        elif isinstance(value, partial):
            value.__setstate__(_exchanged(_state(value), new))  # type: ignore[attr-defined]
        else:
            _write(list(_slots(value)), partial(object.__setattr__, value), new)


def _write(items: Iterable[tuple[Any, Any]], write: Callable[[Any, Any], object], new: New) -> None:
    for key, item in items:
        if _exchanged(item, new) is not item:
            write(key, _exchanged(item, new))


def _exchanged(value: Any, new: New) -> Any:
    '''Return the successor of a tensor, or a tuple with successors; any other value as it is.'''
    if isinstance(value, torch.Tensor):
        return new.get(id(value), value)
    if isinstance(value, (tuple, frozenset)):
        items = [_exchanged(item, new) for item in value]
        if any(item is not old for item, old in zip(items, value)):
            return getattr(type(value), '_make', type(value))(items)
    return value


Kept = Mapping[str, Mapping[int, Indices]]


def _parameter_like(tensor: nn.Parameter, new: torch.Tensor) -> nn.Parameter:
    if type(tensor) is nn.Parameter or nn.Parameter not in type(tensor).__mro__:
        return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return torch.Tensor._make_subclass(type(tensor), new, tensor.requires_grad)  # whatever else its class asks for


def narrowed_copy(model: nn.Module, kept: Kept, group_sizes: Mapping[str, int], sizes: Mapping[Attribute, int],
                  device: str | None = None) -> nn.Module:
    '''Return a narrowed copy of a network.

    Parameters
    ----------
    model: torch.nn.Module
        The original; it is not touched.
    kept: mapping of str to mapping of int to numpy.ndarray
        The indices to keep, by parameter or buffer name and dimension, as for :func:`narrowed`.
    group_sizes: mapping of str to int
        Weights whose module has one group for so many of their first dimension (depthwise convolutions, GroupNorm).
    sizes: mapping of Attribute to int
        What attributes become that ``forward`` makes shapes from.
    device: ``'meta'`` or None
        ``'meta'`` makes a copy without data, for a trace.
    '''
    memo: dict[int, Any] = {}
    for name, tensor in tensors_by_module(model):
        if id(tensor) in memo or (name not in kept and device is None):
            continue
        new = narrowed(tensor, kept.get(name, {}), device)
        if isinstance(tensor, nn.Parameter):
            new = _parameter_like(tensor, new)
        memo[id(tensor)] = new
    small = copied(model, memo, for_trace=device == 'meta')
    fix_attributes(small, kept, group_sizes, sizes)
    return small


def fix_attributes(model: nn.Module, kept: Kept, group_sizes: Mapping[str, int],
                   sizes: Mapping[Attribute, int]) -> None:
    '''Update the attributes of every narrowed module that state its sizes.'''
    set_attributes(model, sizes)
    touched = {computed_name(name).rpartition('.')[0] for name in kept}
    for name, module in modules_by_name(model):
        if name in touched:
            group_size = group_sizes.get(f'{name}.weight' if name else 'weight')
            for kind, attributes in ATTRIBUTES.items():
                if isinstance(module, kind):
                    for attribute, value in attributes(module, group_size).items():
                        setattr(module, attribute, value)


def _convolution(module: Any, group_size: int | None) -> dict[str, Any]:
    first, second = module.weight.shape[:2]
    groups = first // group_size if group_size else module.groups
    sizes = (first, second * groups)
    inputs, outputs = sizes if module.transposed else sizes[::-1]
    return {'groups': groups, 'in_channels': inputs, 'out_channels': outputs}


def _group_norm(module: Any, group_size: int | None) -> dict[str, Any]:
    channels = module.weight.shape[0]
    return {'num_channels': channels, 'num_groups': channels // group_size if group_size else module.num_groups}


def _batch_norm(module: Any, group_size: int | None) -> dict[str, Any]:
    return {'num_features': (module.weight if module.weight is not None else module.running_mean).shape[0]}


ATTRIBUTES: dict[type, Callable[[Any, int | None], dict[str, Any]]] = {
    nn.modules.conv._ConvNd: _convolution,
    nn.GroupNorm: _group_norm,
    nn.modules.batchnorm._NormBase: _batch_norm,
    nn.Linear: lambda module, _: dict(zip(('out_features', 'in_features'), module.weight.shape)),
    nn.LayerNorm: lambda module, _: {'normalized_shape': tuple(module.weight.shape)},
    nn.Embedding: lambda module, _: dict(zip(('num_embeddings', 'embedding_dim'), module.weight.shape)),
    nn.PReLU: lambda module, _: {'num_parameters': module.weight.shape[0]},
}


def transplant(model: nn.Module, small: nn.Module, kept: Kept, group_sizes: Mapping[str, int],
               sizes: Mapping[Attribute, int], optimizer: torch.optim.Optimizer | None = None) -> None:
    '''Give ``model`` the parameters and buffers of ``small``, its narrowed copy, and the optimizer the matching state.

    New ``Parameter`` objects replace the narrowed ones, so that an autograd graph still alive keeps its tensors. The
    optimizer's groups point to them, and every state tensor of a parameter's shape (momentum, Adam moments) is narrowed
    along.

    Raises
    ------
    PruneError
        If the optimizer holds none of the network's parameters, or factored state, or if there is another one, or a
        parameter has hooks; nothing is changed then.
    '''
    old = dict(model.named_parameters(remove_duplicate=False))
    computed = set(map(computed_name, kept))  # all that such a weight is computed from may have new values
    kept = {**{name: {} for name, _ in tensors_by_module(model) if computed_name(name) in computed}, **kept}
    replaced = {id(old[name]): (old[name], parameter, kept.get(name, {}))
                for name, parameter in small.named_parameters() if name in kept}
    for name, parameter in old.items():
        hooks = parameter._backward_hooks or getattr(parameter, '_post_accumulate_grad_hooks', None)
        if id(parameter) in replaced and hooks:
            raise PruneError(f'{name!r} has hooks, which its narrowed successor would lose: remove them first.')
    if optimizer is not None:
        _check_optimizer(optimizer, old, replaced)
    held = held_by(model)
    for other in (value for value in held if isinstance(value, torch.optim.Optimizer) and value is not optimizer):
        if _parameters_of(other) & replaced.keys():
            raise PruneError(f'the network keeps an optimizer ({type(other).__name__}), which would be left with the '
                             'old parameters: pass it as the optimizer of apply_.')
    new: dict[int, torch.Tensor] = {key: after for key, (_, after, _) in replaced.items()}
    buffers = dict(small.named_buffers(remove_duplicate=False))
    new.update({id(buffer): buffers[name] for name, buffer in model.named_buffers() if name in kept})
    exchange(held, new)
    fix_attributes(model, kept, group_sizes, sizes)
    for before, after, indices in replaced.values():
        after.__dict__.update(before.__dict__)
        if before.grad is not None:
            after.grad = narrowed(before.grad, indices)
    if optimizer is not None:
        for group in optimizer.param_groups:
            group['params'] = [replaced[id(parameter)][1] if id(parameter) in replaced else parameter
                               for parameter in group['params']]
        for before, after, indices in replaced.values():
            if before in optimizer.state:
                optimizer.state[after] = {
                    key: narrowed(value, indices)
                    if isinstance(value, torch.Tensor) and value.shape == before.shape else value
                    for key, value in optimizer.state.pop(before).items()}


def _parameters_of(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group['params']}


def _check_optimizer(optimizer: torch.optim.Optimizer, old: Mapping[str, nn.Parameter],
                     replaced: Mapping[int, Any]) -> None:
    '''Refuse an optimizer that cannot follow its parameters.'''
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise PruneError(f'a torch.optim.Optimizer is needed, not {optimizer!r}.')
    if not _parameters_of(optimizer) & {id(parameter) for parameter in old.values()}:
        raise PruneError('the optimizer holds no parameter of this network: pass the one that trains it, or None.')
    kind = type(optimizer).__name__
    for name, value in vars(optimizer).items():
        if isinstance(value, list) and any(id(item) in replaced for item in value):
            raise PruneError(f'{kind} keeps parameters of its own ({name}), which cannot be exchanged: prune without '
                             'it, and make a new optimizer for the pruned network.')
    for before, _, _ in replaced.values():
        for key, value in optimizer.state.get(before, {}).items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != before.shape:
                raise PruneError(f'{kind} keeps {key!r} of shape {tuple(value.shape)} for a parameter of shape '
                                 f'{tuple(before.shape)}, which cannot be narrowed along: prune without it, and make a '
                                 'new optimizer for the pruned network.')

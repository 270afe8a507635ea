'''Exchange tensors wherever a network keeps them: in lists, dicts and objects, besides its parameters and buffers.'''
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from .networks import ATOMIC

LEAVES = (torch.Tensor, str, bytes, type, ModuleType)
New = Mapping[int, torch.Tensor]


def held_by(model: nn.Module) -> list[Any]:
    '''All that a network's attributes lead to and that may hold a tensor.'''
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
    '''Put other tensors in the place of those with these ids; only what changes is written.'''
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
    '''The successor of a tensor, or a tuple with successors.'''
    if isinstance(value, torch.Tensor):
        return new.get(id(value), value)
    if isinstance(value, (tuple, frozenset)):
        items = [_exchanged(item, new) for item in value]
        if any(item is not old for item, old in zip(items, value)):
            return getattr(type(value), '_make', type(value))(items)
    return value

'''A device that a machine does not have: tensors on it are computed on the CPU, and refuse to be mixed with others.

What forgets to move a tensor fails on such a device as it does on a GPU. Its name is that of one of torch's devices
which nothing else uses here, and whose gradients are computed in the thread that asks for them.
'''
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Thread
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device('lazy', 0)
MIXING = {'aten::_to_copy', 'aten::copy_', 'aten::index', 'aten::index_put', 'aten::index_put_'}  # may, on a GPU too


class Pretended(torch.Tensor):
    '''A tensor that says it is elsewhere; its values are in ``inner``.'''

    __slots__ = ('inner',)  # not among the attributes, which a narrowed parameter takes over

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretended:
        found = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=DEVICE)
        found.inner = inner
        return found

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    '''What an operation returns, on the device where a GPU would return it.'''
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    others = [tensor for tensor in tensors if not isinstance(tensor, Pretended) and tensor.dim()]
    if there and others and func._schema.name not in MIXING:
        raise RuntimeError(f'expected all tensors to be on the same device, but {func} got {DEVICE} and '
                           f'{others[0].device}')
    asked = kwargs.get('device')
    on_device = torch.device(asked).type == DEVICE.type if asked is not None else bool(there)
    if asked is not None and on_device:
        kwargs = {**kwargs, 'device': torch.device('cpu')}
    args, kwargs = tree_map_only(Pretended, lambda tensor: tensor.inner, (args, kwargs))
    result = func(*args, **kwargs)
    if not on_device:
        return result
    known = {id(tensor.inner): tensor for tensor in there}  # an operation in place returns what it was given
    return tree_map_only(torch.Tensor, lambda tensor: known[id(tensor)] if id(tensor) in known else Pretended(tensor),
                         result)


class Operations(TorchDispatchMode):
    '''Makes tensors on the device where these are asked for.'''

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    '''What torch does before any operation is called: with lists of numbers, and where ``data`` is given another.'''

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and torch.device(kwargs.get('device') or 'cpu').type == DEVICE.type:
            return func(*args, **{**kwargs, 'device': 'cpu'}).to(kwargs['device'])
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], Pretended):
            index = tuple(torch.tensor(part, device='cpu') if isinstance(part, list) else part
                          for part in (args[1] if isinstance(args[1], tuple) else (args[1],)))
            args = (args[0], index, *args[2:])
        if func == torch.Tensor.data.__set__ and isinstance(args[0], Pretended):
            args[0].inner = args[1].inner
        return func(*args, **kwargs)


@contextmanager
def pretending() -> Iterator[torch.device]:
    '''Inside, tensors and networks can be moved to the device, in threads as well.'''
    autocast, run = torch.autocast, Thread.run

    def without(kind: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if kind == DEVICE.type else autocast(kind, *args, **kwargs)

    def inside(thread: Thread) -> None:
        with Operations(), Functions():
            run(thread)

    with (mock.patch.object(torch, 'autocast', without), mock.patch.object(Thread, 'run', inside), Operations(),
          Functions()):
        yield DEVICE

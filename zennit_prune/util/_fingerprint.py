'''Compute short digests that identify a network, rules, a function or a batch across processes.'''
from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from zennit.core import Composite

ATOMIC = (type(None), bool, int, float, complex, str, bytes)
BY_NAME = (type, BuiltinFunctionType, ModuleType)


def fingerprint(*values: Any) -> str:
    '''Return a text that is equal for equal contents: tensors, containers, functions with closures, any objects.'''
    digest = hashlib.blake2b(digest_size=8)
    for part in _parts(values, {}):
        digest.update(part)
    return digest.hexdigest()


def described(value: Any) -> Any:
    '''Return a name or number as it is; a function, class or object by its name and fingerprint.'''
    if isinstance(value, ATOMIC):
        return value
    if isinstance(value, Composite):  # its handles say where it is in use, its canonizers hold networks
        state = {key: item for key, item in vars(value).items() if key not in ('handles', 'hook_refs', 'canonizers')}
        digest = fingerprint(state, [type(canonizer) for canonizer in value.canonizers])
    else:
        digest = fingerprint(value)
    return f'{named(value)} ({digest})'


def named(value: Any) -> str:
    '''Return the name of a function or class, or that of the class of an object.'''
    if isinstance(value, partial):
        return named(value.func)
    return value if isinstance(value, str) else str(getattr(value, '__name__', type(value).__name__))


def _parts(value: Any, seen: dict[int, Any]) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield f'{value.dtype}{tuple(value.shape)}'.encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    elif isinstance(value, np.ndarray):
        yield f'{value.dtype}{value.shape}'.encode() + value.tobytes()
    elif isinstance(value, ATOMIC):
        yield f'{type(value).__name__}:{value!r};'.encode()
    elif isinstance(value, BY_NAME):
        yield f'{getattr(value, "__module__", "")}.{value.__name__};'.encode()
    else:
        yield f'{type(value).__name__}('.encode()
        if id(value) not in seen:  # else it holds itself, or was met before
            seen[id(value)] = value  # kept, so that no other gets its number
            for item in _held(value):
                yield from _parts(item, seen)
        yield b')'


def _held(value: Any) -> Iterator[Any]:
    '''Yield the values that tell an object from others of its class.'''
    if isinstance(value, (tuple, list)):
        yield from value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from pair
    elif isinstance(value, FunctionType):
        yield from (value.__code__, value.__defaults__, value.__kwdefaults__)
        yield from (cell.cell_contents for cell in value.__closure__ or ())
    elif isinstance(value, CodeType):
        yield from (value.co_code, value.co_names, value.co_consts)
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    else:
        yield from _held(getattr(value, '__dict__', {}))

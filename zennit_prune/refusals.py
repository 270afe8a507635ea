'''Networks that a trace cannot follow, or of which it would prove one path only.'''
from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from .errors import PruneError

if TYPE_CHECKING:
    from .tracer import Tracer

TORCHSCRIPT = 'TorchScript interpreter'


def refuse_values(tracer: Tracer, how: str, tensors: Sequence[torch.Tensor]) -> None:
    '''Refuse a network that uses values of its input in Python.'''
    if any(map(tracer.is_active, tensors)):
        hook = running_hook()
        remedy = ('Replace the branch by tensor operations (torch.where), or prune a submodule without it.'
                  if hook is None else 'Remove the hook while the network is traced and pruned.')
        raise PruneError(
            f'the network cannot be traced: {hook or f"module {tracer.calls.site.module!r}"} uses a value of its input '
            f'in Python ({how}: an if, int(), float(), item() or tolist() on a tensor), so only one of its paths would '
            f'be proven. {remedy}')


def running_hook() -> str | None:
    '''The hook of a module that is running now, if one is, rather than its ``forward``.'''
    called, frame = sys._getframe(), sys._getframe().f_back
    while frame is not None and frame.f_code.co_filename != nn.Module.__call__.__code__.co_filename:
        called, frame = frame, frame.f_back
    values = {} if frame is None else frame.f_locals
    hook = values.get('hook')
    if not callable(hook) or getattr(hook, '__code__', None) is not called.f_code:
        return None
    return f'the hook {called.f_code.co_name!r} of a {type(values.get("self")).__name__}'


def refuse_counts(tracer: Tracer, how: str, tensors: Sequence[torch.Tensor]) -> None:
    '''Refuse a network in which sizes depend on values of its input.'''
    if any(map(tracer.is_active, tensors)):
        where = f'module {tracer.calls.site.module!r}' if tracer.calls.site.module else 'the network itself'
        raise PruneError(
            f'the network cannot be traced: in {where} the size of a tensor depends on '
            f'values of the input ({how}), as when boxes are selected, so no other network can be held against it. '
            "Prune the part before that, a module that returns tensors of fixed size: a detector's backbone and "
            'heads.')


class OriginalUsed(PruneError):
    '''A copy of a network uses a parameter of the network itself.'''


def refuse_original(name: str) -> None:
    '''Refuse a network whose copies use a parameter of the network itself.'''
    module = name.rpartition('.')[0]
    raise OriginalUsed(
        f'the network cannot be pruned: {name!r} is used by its copies too, since a function that it keeps (a lambda, '
        f'a closure, a hook) holds {f"the module {module!r}" if module else "the network"} itself, not its copy. Make '
        'the function a method, or give it what it uses as an argument.')


class ForwardError(Exception):
    '''``forward`` raised.'''

    def __init__(self, module: str, index: int, error: Exception):
        super().__init__(f'{type(error).__name__}: {_said(str(error))}')
        self.module, self.index = module, index


def _said(text: str) -> str:
    '''The first line of an error; of one from compiled code, in which function it was and the last line, too.'''
    first, *others = text.strip().splitlines() or ['']
    if TORCHSCRIPT not in text:
        return first
    where = [line.strip() for line in others if line.strip().startswith('File ')]
    return f'{first} ' + ': '.join([*where[-1:], *others[-1:]])

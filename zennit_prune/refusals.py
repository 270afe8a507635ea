'''Networks of which a trace would prove one path only.'''
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .errors import PruneError

if TYPE_CHECKING:
    from .tracer import Tracer


def refuse_values(tracer: Tracer, how: str, tensors: Sequence[torch.Tensor]) -> None:
    '''Refuse a network that uses values of its input in Python.'''
    if any(map(tracer.is_active, tensors)):
        raise PruneError(
            f'the network cannot be traced: module {tracer.calls.site.module!r} uses a value of its input in Python '
            f'({how}: an if, int(), float(), item() or tolist() on a tensor), so only one of its paths would be '
            'proven. Replace the branch by tensor operations (torch.where), or prune a submodule without it.')


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

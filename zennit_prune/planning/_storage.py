'''One file for a pruned network: tensors, and the plan as JSON; no code.'''
from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import PruneError
from ..surgery._surgery import narrowed_copy
from ..tracing._attributes import Attribute, keeps
from ..util._files import read_tensors, write_tensors
from ..util._networks import Indices, modules_by_name, unique_tensors, unwrapped
from ._plan import Plan

FORMAT = 'zennit_prune network'


def save(small: nn.Module, plan: Plan, path: str | os.PathLike[str]) -> None:
    '''Write a pruned network.

    Parameters
    ----------
    small: torch.nn.Module
        What ``plan.apply`` returned, trained further or not.
    plan: Plan
        The plan it was pruned by.
    path: path-like
        A safetensors file. It appears when it is complete.

    Raises
    ------
    PruneError
        If ``small`` is not what ``plan`` makes of the original, or the extra state of a module is not made of numbers,
        texts, lists and dicts.
    '''
    small = unwrapped(small)
    tensors = unique_tensors(small)
    kept = plan.graph._kept(plan.removed)
    shapes = {name: list(size.shape) for name, size in plan.graph._recording.sizes.items()}
    for name, shape in shapes.items():
        expected = [len(kept.get(name, {}).get(dim, range(size))) for dim, size in enumerate(shape)]
        if name not in tensors or list(tensors[name].shape) != expected:
            has = list(tensors[name].shape) if name in tensors else 'missing'
            raise PruneError(f'this network was not made by this plan: {name!r} is {has}, but the plan makes it '
                             f'{expected}.')
    metadata = {'plan': json.dumps(plan.to_dict()), 'shapes': json.dumps(shapes),
                'group_sizes': json.dumps(plan.graph._group_sizes),
                'attributes': json.dumps([[*item] for item in plan.graph._attributes(plan.removed).items()]),
                'extra_states': json.dumps(_extra_states(small))}
    write_tensors(path, tensors, metadata, FORMAT)


def _keeps_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _extra_states(small: nn.Module) -> dict[str, Any]:
    '''What ``get_extra_state`` of modules returns, by their names.'''
    found: dict[str, Any] = {}
    for name, module in modules_by_name(small):
        if _keeps_extra_state(module):
            found[name] = state = module.get_extra_state()
            try:
                lossless = json.loads(json.dumps(state)) == state
            except (TypeError, ValueError):
                lossless = False
            if not lossless:
                raise PruneError(f'the extra state of module {name!r} cannot be saved: a file holds tensors, JSON and '
                                 f'no code, but get_extra_state() returns {state!r:.80}. Return numbers, texts, lists '
                                 'and dicts with texts as keys there, and register tensors as buffers.')
    return found


@torch.inference_mode(False)
def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    '''Narrow a copy of a freshly built original and fill it with what :func:`save` wrote.

    Parameters
    ----------
    model: torch.nn.Module
        The unpruned network, built anew; its values do not matter. It is not changed.
    path: path-like
        The file.

    Returns
    -------
    torch.nn.Module
        The pruned network, on the device of ``model``, with the types of the file.

    Raises
    ------
    PruneError
        If the file is something else, or was saved from a network of another architecture.
    '''
    model = unwrapped(model)
    data, metadata = read_tensors(path, FORMAT)
    try:
        shapes = {name: tuple(shape) for name, shape in json.loads(metadata['shapes']).items()}
        group_sizes = json.loads(metadata['group_sizes'])
        sizes = {Attribute(*attribute): size for attribute, size in json.loads(metadata.get('attributes', '[]'))}
        extra_states = dict(json.loads(metadata.get('extra_states', '{}')))
    except (KeyError, ValueError, TypeError) as error:
        raise PruneError(f'{os.fspath(path)!r} is no {FORMAT}: its metadata are damaged ({error!r}).') from error
    fresh = unique_tensors(model)
    for name in (*shapes, *fresh):
        found = tuple(fresh[name].shape) if name in fresh else None
        smaller = name in data and all(new <= old for new, old in zip(data[name].shape, shapes.get(name, ())))
        if found != shapes.get(name) or not smaller or data[name].dim() != len(shapes[name]):
            raise PruneError(f'{os.fspath(path)!r} was saved from another network: {name!r} was '
                             f'{shapes.get(name, "absent")} before pruning, but is '
                             f'{"absent" if found is None else found} in the {type(model).__name__} given.')
    for attribute in sizes:
        if not keeps(model, attribute):
            raise PruneError(f'{os.fspath(path)!r} was saved from another network: {attribute.name!r} of module '
                             f'{attribute.module!r} is no whole number in the {type(model).__name__} given.')
    keeping = {name for name, module in modules_by_name(model) if _keeps_extra_state(module)}
    for name in keeping ^ extra_states.keys():
        raise PruneError(f'{os.fspath(path)!r} was saved from another network: module {name!r} has '
                         f'{"an" if name in extra_states else "no"} extra state there, but '
                         f'{"an" if name in keeping else "no"} in the {type(model).__name__} given.')
    kept = {name: {dim: Indices(np.arange(size)) for dim, size in enumerate(tensor.shape) if size != shapes[name][dim]}
            for name, tensor in data.items()}
    kept = {name: dims for name, dims in kept.items() if dims}
    small = narrowed_copy(model, kept, group_sizes, sizes)
    with torch.no_grad():
        for name, tensor in unique_tensors(small).items():
            tensor.data = data[name].to(tensor.device)
    modules = dict(modules_by_name(small))
    for name, state in extra_states.items():
        modules[name].set_extra_state(state)
    return small

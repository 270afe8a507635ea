'''Save and load a pruned network: one file with tensors and the plan as JSON, and no code.'''
from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import PruneError, names_options
from ..surgery._surgery import narrowed_copy
from ..tracing._attributes import Attribute, keeps
from ..util._files import check_path, read_tensors, write_tensors
from ..util._networks import Indices, modules_by_name, unique_tensors, unwrapped
from ._plan import Plan, checked_plan

FORMAT = 'zennit_prune network'


@names_options()
def save(small: nn.Module, plan: Plan, path: str | os.PathLike[str]) -> None:
    '''Write a pruned network to a file.

    Parameters
    ----------
    small: torch.nn.Module
        The network that ``plan.apply`` returned, trained further or not.
    plan: Plan
        The plan by which it was pruned.
    path: path-like
        A safetensors file; it appears when it is complete.

    Raises
    ------
    PruneError
        If ``small`` is not what ``plan`` makes of the original, or the extra state of a module is not made of numbers,
        texts, lists and dicts.

    Examples
    --------
    >>> import os, tempfile
    >>> import torch
    >>> import zennit_prune as zp
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> plan = zp.Plan(zp.trace(model, torch.ones(2, 3)), {'0': [1, 2]})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     zp.save(plan.apply(model), plan, f'{folder}/small.safetensors')
    ...     os.listdir(folder)
    ['small.safetensors']
    '''
    checked_plan('save(small, plan, path)', plan)
    small = unwrapped(small)
    check_path(path, 'save(small, plan, path)')
    tensors = unique_tensors(small)
    shapes = {name: list(size.shape) for name, size in plan.graph._recording.sizes.items()}
    tied = (f'{name!r} is shared with another module' for name in shapes if name not in tensors)
    misfit = plan._misfit(small) or next(tied, '')
    if misfit:
        raise PruneError(f'this network was not made by this plan: {misfit}. Give what plan.apply(model) returned.')
    metadata = {'plan': json.dumps(plan.to_dict()), 'shapes': json.dumps(shapes),
                'group_sizes': json.dumps(plan.graph._group_sizes),
                'attributes': json.dumps([[*item] for item in plan.graph._attributes(plan.removed).items()]),
                'extra_states': json.dumps(_extra_states(small))}
    write_tensors(path, tensors, metadata, FORMAT)


def _keeps_extra_state(module: nn.Module) -> bool:
    '''Return whether a module has an extra state.'''
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _extra_states(small: nn.Module) -> dict[str, Any]:
    '''Return the extra states of modules (``get_extra_state``) by their names, after a check that JSON holds them.'''
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


@names_options()
@torch.inference_mode(False)
def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    '''Read a pruned network that :func:`save` wrote.

    Parameters
    ----------
    model: torch.nn.Module
        The unpruned network, built anew; its values do not matter. It is left as it is: a copy is narrowed and filled.
    path: path-like
        The file.

    Returns
    -------
    torch.nn.Module
        The pruned network, on the device of ``model``, with the floating-point types of the file.

    Raises
    ------
    PruneError
        If the file is something else, or was saved from a network of another architecture.

    Examples
    --------
    >>> import tempfile
    >>> import torch
    >>> import zennit_prune as zp
    >>> def build():
    ...     return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> model, x = build(), torch.ones(2, 3)
    >>> plan = zp.Plan(zp.trace(model, x), {'0': [1, 2]})
    >>> small = plan.apply(model)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     zp.save(small, plan, f'{folder}/small.safetensors')
    ...     loaded = zp.load(build(), f'{folder}/small.safetensors')
    >>> torch.equal(loaded(x), small(x))
    True
    '''
    check_path(path, 'load(model, path)')
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

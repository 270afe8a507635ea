'''One file for a pruned network: tensors, and the plan as JSON; no code.'''
from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .errors import PruneError
from .networks import unique_tensors, unwrapped
from .plan import Plan
from .surgery import narrowed_copy

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
        If ``small`` is not what ``plan`` makes of the original.
    '''
    tensors = unique_tensors(unwrapped(small))
    kept = plan.graph.kept(plan.removed)
    shapes = {name: list(size.shape) for name, size in plan.graph.recording.sizes.items()}
    for name, shape in shapes.items():
        expected = [len(kept.get(name, {}).get(dim, range(size))) for dim, size in enumerate(shape)]
        if name not in tensors or list(tensors[name].shape) != expected:
            has = list(tensors[name].shape) if name in tensors else 'missing'
            raise PruneError(f'this network was not made by this plan: {name!r} is {has}, but the plan makes it '
                             f'{expected}.')
    metadata = {'format': FORMAT, 'version': '1', 'plan': json.dumps(plan.to_dict()), 'shapes': json.dumps(shapes),
                'group_sizes': json.dumps(plan.graph.group_sizes), 'class': type(small).__name__}
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    unfinished = f'{os.fspath(path)}.unfinished'
    try:
        save_file(data, unfinished, metadata)
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


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
    metadata, data = _read(os.fspath(path))
    shapes = {name: tuple(shape) for name, shape in json.loads(metadata['shapes']).items()}
    fresh = unique_tensors(model)
    for name in (*shapes, *fresh):
        found = tuple(fresh[name].shape) if name in fresh else None
        if found != shapes.get(name) or name not in data:
            raise PruneError(f'{os.fspath(path)!r} was saved from another network: {name!r} was '
                             f'{shapes.get(name, "absent")} before pruning, but is '
                             f'{"absent" if found is None else found} in the {type(model).__name__} given.')
    kept = {name: {dim: np.arange(size) for dim, size in enumerate(tensor.shape) if size != shapes[name][dim]}
            for name, tensor in data.items()}
    kept = {name: dims for name, dims in kept.items() if dims}
    small = narrowed_copy(model, kept, json.loads(metadata['group_sizes']))
    with torch.no_grad():
        for name, tensor in unique_tensors(small).items():
            tensor.data = data[name].to(tensor.device)
    return small


def _read(path: str) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        with safe_open(path, 'pt') as file:
            metadata = file.metadata() or {}
            data = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise PruneError(f'{path!r} is no saved network: {error}.') from error
    if metadata.get('format') != FORMAT:
        raise PruneError(f'{path!r} holds no pruned network: its metadata lack "format": "{FORMAT}".')
    if metadata.get('version') != '1':
        raise PruneError(f'{path!r} has version {metadata.get("version")!r}; this release reads version 1.')
    return metadata, data

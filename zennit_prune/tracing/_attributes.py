'''Find the attributes of modules that ``forward`` makes shapes from, such as ``num_heads`` and ``hidden_dim``.

While a copy of the network is traced, its whole numbers know which attribute they are. Where one is the size of a
dimension that carries labels, as in ``x.reshape(n, t, self.num_heads, -1)``, the attribute states a number of channels,
and the narrowed network gets a new number. Where an attribute states the sizes of several dimensions, their channels
are removed together. The replay proves that all other uses of the attribute agree with the new number.
'''
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..util._networks import modules_by_name
from ._labels import Field, Labels, narrowed_to

SHAPED = {'reshape': ('shape',), 'view': ('size',), 'expand': ('size',), 'unflatten': ('dim', 'sizes'),
          'layer_norm': ('normalized_shape',)}


class Attribute(NamedTuple):
    '''A whole number that a module keeps under a name, or at ``position`` in a tuple of that name (-1 for none).'''

    module: str
    name: str
    position: int = -1


class Claim(NamedTuple):
    '''The statement that an attribute is the size of a dimension of a tensor with these fields.'''

    attribute: Attribute
    fields: list[Field]
    dim: int
    size: int


class Known(int):
    '''A whole number that knows which attribute it is; results computed from it are ordinary numbers.'''

    attribute: Attribute

    def __new__(cls, value: int, attribute: Attribute) -> Known:
        '''Make a number of this value.'''
        known = super().__new__(cls, value)
        known.attribute = attribute
        return known


def mark_attributes(network: nn.Module) -> None:
    '''Replace the whole numbers that modules of a structural copy keep by numbers that know their attribute.'''
    for module_name, module in modules_by_name(network):
        for name, value in module.__dict__.items():
            kind = type(value)
            if kind is int and value > 1:
                module.__dict__[name] = Known(value, Attribute(module_name, name))
            elif kind is tuple and value and all(type(item) is int for item in value):
                module.__dict__[name] = tuple(Known(item, Attribute(module_name, name, position))
                                              for position, item in enumerate(value))


def stated_sizes(function: str, args: Sequence[Any], kwargs: dict[str, Any],
                 result: Any) -> Iterable[tuple[Attribute, int]]:
    '''Yield the attributes that a call was given as sizes of its result, each with the dimension.'''
    if function not in SHAPED or not isinstance(result, torch.Tensor):
        return
    given = (*args[1:], *(kwargs[name] for name in SHAPED[function] if name in kwargs))
    start = 0
    if function == 'unflatten':
        start, given = int(given[0]) % args[0].dim(), given[1:]
    sizes = given[0] if isinstance(given[0], (tuple, list)) else given
    if function == 'layer_norm':
        start = result.dim() - len(sizes)
    for dim, size in enumerate(sizes, start):
        if isinstance(size, Known):
            yield size.attribute, dim


def norm_claims(model: nn.Module, outputs: Mapping[tuple[str, int], Sequence[list[Field]]]) -> Iterable[Claim]:
    '''Yield the claims of batch and instance norms without parameters, which only their outputs show.

    Parameters
    ----------
    model: torch.nn.Module
        The network.
    outputs: mapping
        The fields of every tensor that a call of a module returned.

    Yields
    ------
    Claim
        The statement that ``num_features`` is the size of a dimension.
    '''
    modules = dict(modules_by_name(model))
    for (name, _), tensors in outputs.items():
        module = modules.get(name)
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.weight is module.running_mean is None:
            size = module.num_features
            for dim in {dim for field in tensors[0] for dim in field.dims if field.labels.shape[dim] == size}:
                yield Claim(Attribute(name, 'num_features'), tensors[0], dim, size)


def new_sizes(claims: Sequence[Claim], gone: npt.NDArray[np.bool_]) -> dict[Attribute, int]:
    '''Return the new values of attributes once labels are removed.

    Parameters
    ----------
    claims: sequence of Claim
        The claims that the trace found.
    gone: numpy.ndarray
        For each label, whether it is removed.

    Returns
    -------
    dict of Attribute to int
        The new value of each attribute that changes; one whose dimensions would get different sizes is left out.
    '''
    sizes = {(claim.attribute, claim.size) for claim in claims}
    return {attribute: min(new) for attribute, new in _sizes_left(claims, gone).items()
            if len(new) == 1 and (attribute, min(new)) not in sizes}


def stating_several(claims: Sequence[Claim], gone: npt.NDArray[np.bool_]) -> dict[Attribute, Labels]:
    '''Return, for each attribute that states several dimensions which all shrink, a row of labels for each dimension.

    An attribute that also states a dimension which keeps its size is left out: it has to stay.
    '''
    found: dict[Attribute, Labels] = {}
    for attribute, new in _sizes_left(claims, gone).items():
        stated = [claim for claim in claims if claim.attribute == attribute]
        if len(stated) > 1 and max(new) < stated[0].size:
            found[attribute] = Labels(np.stack([narrowed_to(field.labels, (claim.dim,)).reshape(-1) for claim in stated
                                         for field in claim.fields if claim.dim in field.dims]))
    return found


def _sizes_left(claims: Sequence[Claim], gone: npt.NDArray[np.bool_]) -> dict[Attribute, set[int]]:
    found: dict[Attribute, set[int]] = {}
    for attribute, fields, dim, size in claims:
        stays = np.ones(size, bool)
        for field in fields:
            if dim in field.dims:
                others = tuple(other for other in range(field.labels.ndim) if other != dim)
                stays &= ~gone[field.labels].all(axis=others)
        found.setdefault(attribute, set()).add(int(stays.sum()))
    return found


def keeps(network: nn.Module, attribute: Attribute) -> bool:
    '''Return whether a network has this attribute and it is a whole number.'''
    module = dict(network.named_modules()).get(attribute.module)
    value = None if module is None else module.__dict__.get(attribute.name)
    if attribute.position >= 0:
        value = value[attribute.position] if isinstance(value, tuple) and len(value) > attribute.position else None
    return type(value) is int


def set_attributes(network: nn.Module, sizes: Mapping[Attribute, int]) -> None:
    '''Write new sizes into the attributes of modules.'''
    for attribute, size in sizes.items():
        module = network.get_submodule(attribute.module)
        value = getattr(module, attribute.name)
        setattr(module, attribute.name, size if attribute.position < 0 else
                (*value[:attribute.position], size, *value[attribute.position + 1:]))

'''Work out once for each case what operations return on meta tensors.

A meta tensor has a shape, strides and a type, and no data; what an operation returns follows from these alone. Torch
finds it in Python for most operations, which takes nine tenths of a pass through a network. The layers of a network,
its two modes, and the networks narrowed from it ask for the same cases again and again.
'''
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..util._networks import ATOMIC, tensors_in

META = torch.device('meta')
IN_PLACE = 'the first argument itself'


def _new(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, device='meta')


def _are_regular(*tensors: torch.Tensor | None) -> bool:
    '''Return whether tensors are contiguous, of one floating-point type, and not empty.'''
    found = [tensor for tensor in tensors if tensor is not None]
    return found[0].is_floating_point() and all(
        tensor.dtype == found[0].dtype and tensor.is_contiguous() and tensor.numel() for tensor in found)


def _batch_norm(func: Any, x: torch.Tensor, *args: Any) -> Any:
    if any(tensor.shape != x.shape[1:2] for tensor in args[:4] if tensor is not None):
        return func(x, *args)
    channels = [x.shape[1] if args[4] else 0]
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device='meta'), _new(channels, x), _new(channels, x)


def _layer_norm(func: Any, x: torch.Tensor, normalised: Any, *args: Any) -> Any:
    lead = x.dim() - len(normalised)
    shape = x.shape[lead:] if lead >= 0 else ()
    if (tuple(normalised) != tuple(shape) or not _are_regular(x, *args[:2]) or x.dtype.itemsize < 4
            or any(tensor.shape != shape for tensor in args[:2] if tensor is not None)):
        return func(x, normalised, *args)
    statistics = [*x.shape[:lead], *(1 for _ in shape)]
    return _new(x.shape, x), _new(statistics, x), _new(statistics, x)


def _convolution(func: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *args: Any) -> Any:
    stride, padding, dilation, transposed, _, groups = args
    rank = x.dim() - 2
    if (not transposed and _are_regular(x, weight, bias) and x.dim() == weight.dim() > 2
            and x.shape[1] == weight.shape[1] * groups and not weight.shape[0] % groups
            and (bias is None or bias.shape == weight.shape[:1])
            and len(stride) == len(padding) == len(dilation) == rank and min(*stride, *dilation) > 0 <= min(padding)):
        sizes = [(size + 2 * pad - by * (kernel - 1) - 1) // step + 1 for size, pad, by, kernel, step
                 in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride)]
        if min(sizes) > 0:
            return _new([x.shape[0], weight.shape[0], *sizes], x)
    return func(x, weight, bias, *args)


def _addmm(func: Any, bias: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *args: Any) -> Any:
    fits = left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0] and bias.shape == right.shape[1:]
    if args or not fits or not _are_regular(bias, left) or right.dtype != left.dtype:  # the weight is transposed
        return func(bias, left, right, *args)
    return _new([left.shape[0], right.shape[1]], left)


def _mean(func: Any, x: torch.Tensor, *args: Any) -> Any:
    dims, keepdim = args[0] if args else None, args[1:] == (True,)
    if not dims or not _are_regular(x) or not all(-x.dim() <= dim < x.dim() for dim in dims):
        return func(x, *args)
    over = {dim % x.dim() for dim in dims}
    if len(over) < len(dims):
        return func(x, *args)
    return _new([1 if dim in over else size for dim, size in enumerate(x.shape) if keepdim or dim not in over], x)


def _cat(func: Any, tensors: Sequence[torch.Tensor], dim: int = 0) -> Any:
    ndim = tensors[0].dim() if tensors else 0
    if not ndim or not -ndim <= dim < ndim or not _are_regular(*tensors):
        return func(tensors, dim)
    shapes = [list(tensor.shape) for tensor in tensors]
    sizes = [shape.pop(dim) for shape in shapes if len(shape) == ndim]
    if len(sizes) < len(shapes) or any(shape != shapes[0] for shape in shapes):
        return func(tensors, dim)
    shape = list(tensors[0].shape)
    shape[dim] = sum(sizes)
    return _new(shape, tensors[0])


def _elementwise(func: Any, *args: Any) -> Any:
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    whole, in_place = max(tensors, key=torch.Tensor.numel), func._opname.endswith('_')
    fits = [tensor.dim() == whole.dim() and all(size in (1, full) for size, full in zip(tensor.shape, whole.shape))
            for tensor in tensors]
    if (not all(fits) or not _are_regular(*tensors) or (in_place and args[0].shape != whole.shape)
            or not all(isinstance(value, (torch.Tensor, int, float)) for value in args)):
        return func(*args)
    return args[0] if in_place else _new(whole.shape, whole)


ELEMENTWISE = ('add', 'sub', 'mul', 'div', 'relu', 'gelu', 'silu', 'sigmoid', 'tanh', 'hardtanh', 'hardswish',
               'hardsigmoid')
# what torch takes most of the time for, where the arguments are regular
FORMULAS: dict[str, Callable[..., Any]] = {
    'native_batch_norm': _batch_norm, 'native_layer_norm': _layer_norm, 'convolution': _convolution,
    'addmm': _addmm, 'mean': _mean, 'cat': _cat,
    **{name + mark: _elementwise for name in ELEMENTWISE for mark in ('', '_')}}


class Case:
    '''The sizes, strides and types of the tensors that an operation returns.'''

    __slots__ = ('kind', 'likes', 'one')

    def __init__(self, outputs: Sequence[torch.Tensor], kind: type):
        self.likes = [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in outputs]
        self.kind, self.one = kind, self.likes[0] if kind is torch.Tensor else None

    def made(self) -> Any:
        if self.one is not None:
            shape, strides, dtype = self.one
            return torch.empty_strided(shape, strides, dtype=dtype, device=META)
        return self.kind(torch.empty_strided(shape, strides, dtype=dtype, device=META)
                         for shape, strides, dtype in self.likes)


class Shapes:
    '''A memory of the results of operations on meta tensors, which runs each case once.

    An operation is run at every call where a tensor is not an ordinary meta tensor, where the result is a view, or
    where arguments may change their shape.
    '''

    def __init__(self) -> None:
        self._cases: dict[Any, Case | str] = {}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], key: Any) -> Any:
        '''Return the result of a call.

        Parameters
        ----------
        func: torch._ops.OpOverload
            A function for which :func:`is_regular` holds.
        args: tuple
            Its positional arguments.
        kwargs: dict
            Its keyword arguments.
        key: object
            The description of the call by :func:`described_call`.

        Returns
        -------
        object
            New tensors, or the first argument where the function writes into it.
        '''
        if key is None:
            return func(*args, **kwargs)
        case = self._cases.get(key)
        if case is not None:
            return args[0] if case is IN_PLACE else case.made()  # type: ignore[union-attr]
        formula = FORMULAS.get(func._opname) if func.namespace == 'aten' else None
        result = formula(func, *args) if formula and not kwargs else func(*args, **kwargs)
        if args and result is args[0]:
            self._cases[key] = IN_PLACE
        elif isinstance(result, torch.Tensor):
            if is_plain(result):
                self._cases[key] = Case([result], torch.Tensor)
        elif type(result) in (tuple, list) and all(isinstance(item, torch.Tensor) and is_plain(item)
                                                   for item in result):
            self._cases[key] = Case(result, type(result))
        return result


class Irregular(Exception):
    '''Raised where an argument is a tensor of another kind or cannot be compared.'''


def described_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
    '''Describe a call, equally for calls that return tensors of equal shapes, strides and types; else return None.

    The tensors among the arguments are added to ``tensors``.
    '''
    try:
        return id(func), described(args, tensors), described(kwargs.items(), tensors) if kwargs else None
    except Irregular:
        tensors[:] = tensors_in(args) + tensors_in(kwargs)
        return None


def is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_meta and tensor.layout is torch.strided and not tensor.is_complex()


def described(arguments: Iterable[Any], tensors: list[torch.Tensor]) -> tuple[Any, ...]:
    '''Describe what a result depends on, and add the tensors among the arguments to ``tensors``.'''
    parts: list[Any] = []
    for value in arguments:
        kind = type(value)
        if kind in ATOMIC:
            parts += kind, value  # 1, 1.0 and True are equal, and give results of other types
        elif isinstance(value, torch.Tensor):
            if not value.is_meta or value.layout is not torch.strided or value.is_complex():
                raise Irregular
            tensors.append(value)
            parts += value.shape, value.stride(), value.dtype
        elif kind is list and ATOMIC.issuperset(kinds := tuple(map(type, value))):
            parts += kinds, tuple(value)
        elif isinstance(value, (tuple, list)):
            parts.append(described(value, tensors))
        elif kind.__hash__ is None:
            raise Irregular
        else:
            parts += kind, value
    return tuple(parts)


def is_regular(func: Any, in_place: bool, constant: bool = False) -> bool:
    '''Return whether an operation returns new tensors, or with ``in_place`` only writes into its first argument.

    An operation without tensors among its arguments may make a tensor on any device; with ``constant`` it does nothing
    else, and is regular.
    '''
    schema = func._schema
    if not constant and not any('Tensor' in str(argument.type) for argument in schema.arguments):
        return False
    aliases = [argument.alias_info for argument in schema.arguments]
    if any(aliases):
        return in_place and aliases[0] is not None and aliases[0].is_write and not any(aliases[1:])
    return not any(value.alias_info for value in schema.returns)

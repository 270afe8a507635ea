'''The arguments that a network is called with, made of whatever stands for them, and the call itself.

Examples, batches and single inputs become arguments by one rule, which :func:`arguments_for` states. A call that fails
says what the inputs were, what the network takes, and how to convert them.
'''
from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from ..errors import BY_POSITION, PruneError, shown
from ._display import some
from ._networks import map_tensors, tensors_in
from ._samples import sample_list

LABELS = ('label', 'labels', 'target', 'targets', 'label_ids')  # keys of the target among the inputs
SHOWN = 3  # items of a list that errors show
CONVERSIONS = {torch.float32: 'float', torch.float64: 'double', torch.float16: 'half', torch.bfloat16: 'bfloat16'}
IMAGES = 4  # dimensions of a batch of images


@dataclass(frozen=True)
class Forward:
    '''The parameters of a network's ``forward``.

    Attributes
    ----------
    names: tuple of str
        The parameters that can be given by name.
    positional: tuple of str
        The parameters that can be given by position.
    required: tuple of str
        The parameters without a default.
    any_number, any_name: bool
        Whether it has ``*args``, and ``**kwargs``.
    takes_list: bool
        Whether the annotation of the first parameter says that it is a list or a sequence.
    text: str
        The parameters, as errors show them.
    '''

    names: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    any_number: bool = True
    any_name: bool = True
    takes_list: bool = False
    text: str = '(...)'

    @classmethod
    def of(cls, network: nn.Module | None) -> Forward:
        '''Return the parameters of a network's ``forward``; any number of any name where they are not known.'''
        if network is None:
            return cls()
        forward = vars(network).get('forward')
        known = _known.get(network)
        if known is None or known[0] is not forward:
            known = _known[network] = forward, cls._read(_parameters(network))
        return known[1]

    @classmethod
    def _read(cls, parameters: list[inspect.Parameter]) -> Forward:
        if not parameters:
            return cls()
        kinds = [parameter.kind for parameter in parameters]
        named = [parameter for parameter in parameters
                 if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)]
        required = [parameter for parameter in parameters if parameter.default is parameter.empty
                    and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)]
        positional = [parameter for parameter in parameters if parameter.kind in BY_POSITION]
        plain_names = [str(parameter.replace(annotation=parameter.empty, default=parameter.empty))
                       for parameter in parameters]
        return cls(tuple(parameter.name for parameter in named), tuple(parameter.name for parameter in positional),
                   tuple(parameter.name for parameter in required), inspect.Parameter.VAR_POSITIONAL in kinds,
                   inspect.Parameter.VAR_KEYWORD in kinds, bool(positional) and _is_list(positional[0].annotation),
                   f'({", ".join(plain_names)})')

    def takes(self, name: Any) -> bool:
        '''Return whether an argument of this name can be given.'''
        return name in self.names or (self.any_name and isinstance(name, str))

    @property
    def inputs(self) -> tuple[str, ...]:
        '''The parameters by position without labels that may be left out.'''
        return tuple(name for name in self.positional if name in self.required or name not in LABELS)

    def takes_by_position(self, count: int) -> bool:
        '''Return whether so many arguments can be given by position.'''
        return self.any_number or count <= len(self.positional)


_known: WeakKeyDictionary[nn.Module, tuple[Any, Forward]] = WeakKeyDictionary()  # reading a signature takes long


def _parameters(network: nn.Module) -> list[inspect.Parameter]:
    '''Return the parameters of ``forward``, of the class where a wrapper of it on the network says nothing of them.'''
    found: list[inspect.Parameter] = []
    for forward, first in ((network.forward, 0), (type(network).forward, 1)):
        try:
            found = list(inspect.signature(forward).parameters.values())[first:]
        except (TypeError, ValueError):
            continue
        if any(parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in found):
            break
    return found


def _is_list(annotation: Any) -> bool:
    '''Return whether an annotation stands for a list or another sequence of samples.'''
    text = str(getattr(annotation, '__name__', annotation) if isinstance(annotation, type) else annotation).lower()
    return text.removeprefix('typing.').startswith(('list', 'sequence', 'collections.abc.sequence'))


def plain(value: Any) -> Any:
    '''Return a value with plain dicts in place of mappings of any kind, and tensors in place of arrays of numbers.'''
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    if isinstance(value, tuple) and hasattr(value, '_fields') and not isinstance(value, PackedSequence):
        return type(value)(*map(plain, value))
    if isinstance(value, np.ndarray) and value.dtype.kind in 'biufc':  # numbers
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder('='), order='C')).to('cpu')
    return value


def arguments_for(network: nn.Module | None, inputs: Any, labels: int | None = None) -> Any:
    '''Return the arguments that inputs stand for: a tensor, a tuple, a dict, or a list of samples.

    - A tensor is the only argument, and so is anything else that is not mentioned here.
    - A dict (any mapping) holds keyword arguments. If it has a single entry, and ``forward`` has no parameter of that
      name, the entry is the only argument, given by position. Labels that ``forward`` does not take are left out.
    - A list of dicts is the only argument: a list of samples.
    - Any other tuple or list holds positional arguments if ``forward`` needs as many as it has items, and is a list of
      samples, the only argument, if it has more items than ``forward`` can take. Where both are possible, because
      parameters are optional or the list has a single item, it is a list of samples if there is one label for each
      item or the first parameter is annotated as a list, and holds arguments if there is one label for each entry along
      the first dimension of its tensors. Without labels, a tuple holds arguments, and a list is a list of samples.

    Applied to what it returned, it changes nothing.

    Parameters
    ----------
    network: torch.nn.Module, optional
        The network; without one, ``forward`` is assumed to take anything.
    inputs: object
        An example, the inputs of a batch, or arguments.
    labels: int, optional
        The number of labels that belong to the inputs.

    Returns
    -------
    torch.Tensor, tuple, dict or list
        A list is the only argument.

    Raises
    ------
    PruneError
        For keys that are not among the parameters of ``forward``.
    '''
    forward, inputs = Forward.of(network), plain(inputs)
    if isinstance(inputs, dict):
        return _named(inputs, forward)
    if isinstance(inputs, PackedSequence) or not isinstance(inputs, (tuple, list)):
        return inputs
    if len(inputs) == 1 and isinstance(inputs[0], list):  # of samples, whichever way the outer one is read
        return inputs[0]
    return tuple(inputs) if _are_arguments(inputs, forward, labels) else list(inputs)


def _named(inputs: dict[Any, Any], forward: Forward) -> Any:
    '''Return keyword arguments, or the only entry if it is to be given by position.'''
    inputs = {key: value for key, value in inputs.items() if key not in LABELS or forward.takes(key)}
    if len(inputs) == 1 and forward.takes_by_position(1):
        (key, value), = inputs.items()
        if isinstance(value, (list, tuple)) and (key in forward.positional[:1] or not forward.takes(key)):
            return list(value)
        if not forward.takes(key):
            return value if isinstance(value, torch.Tensor) else (value,)
    for key in inputs:
        if not forward.takes(key):
            raise unknown_keys(inputs, forward, f'give what it takes, e.g. {taken_from("batch", inputs, forward)}')
    return inputs


def unknown_keys(keys: Iterable[Any], forward: Forward, remedy: str) -> PruneError:
    '''Return the error for a dict with keys that ``forward`` does not take.'''
    return PruneError(f'the inputs are a dict with the keys {", ".join(map(repr, keys))}, and forward takes '
                      f'{forward.text}: {remedy}.')


def taken_from(name: str, inputs: Mapping[Any, Any], forward: Forward) -> str:
    '''Return code that takes from a dict what ``forward`` takes: the entries of its names, or the likeliest one.'''
    taken = [key for key in inputs if key in forward.names]
    if taken:
        return f'{{{", ".join(f"{key!r}: {name}[{key!r}]" for key in taken)}}}'
    tensors = [key for key, value in inputs.items() if isinstance(value, torch.Tensor)]
    floating = [key for key in tensors if inputs[key].is_floating_point()]
    return f'{name}[{[*floating, *tensors, *inputs][0]!r}]'


def _are_arguments(parts: Sequence[Any], forward: Forward, labels: int | None) -> bool:
    '''Return whether the items of a tuple or list are arguments, rather than samples; see :func:`arguments_for`.'''
    count, least = len(parts), len([name for name in forward.required if name in forward.positional])
    if isinstance(parts, list) and count and all(isinstance(part, dict) for part in parts):
        return False
    if not forward.takes_by_position(count):
        return not forward.takes_by_position(1)
    if least == count > 1:
        return True
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    if len(tensors) == count and count:
        if forward.takes_list and (isinstance(parts, list) or max(tensor.dim() for tensor in tensors) < IMAGES):
            return False
        if labels is not None and all(tensor.dim() and len(tensor) == labels for tensor in tensors):
            return True
        if labels == count:
            return False
    return isinstance(parts, tuple)


def spread(arguments: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    '''Return positional and keyword arguments of what :func:`arguments_for` returned.'''
    if isinstance(arguments, dict):
        return (), arguments
    return (arguments if type(arguments) is tuple else (arguments,)), {}


class Traced(Protocol):
    '''The arguments that a network was traced with.'''

    @property
    def args(self) -> tuple[Any, ...]:
        '''The positional arguments.'''

    @property
    def kwargs(self) -> dict[str, Any]:
        '''The keyword arguments.'''


def call_network(network: nn.Module, inputs: Any, traced: Traced | None = None) -> Any:
    '''Call a network with inputs, see :func:`arguments_for`.

    Parameters
    ----------
    network: torch.nn.Module
        The network.
    inputs: torch.Tensor, tuple, dict or list
        Inputs; those that require gradients are copied, for ``forward`` may write into them.
    traced: Traced, optional
        The arguments that the network was traced with, which an error shows.

    Raises
    ------
    PruneError
        If it does not run, with what it was given, what it takes, and how to convert the inputs.
    '''
    inputs = map_tensors(lambda tensor: tensor.clone() if tensor.requires_grad else tensor, inputs)  # may be written to
    arguments = arguments_for(network, inputs)
    args, kwargs = spread(arguments)
    try:
        return network(*args, **kwargs)
    except PruneError:
        raise
    except Exception as error:
        shapes = some([str(tuple(tensor.shape)) for tensor in tensors_in(arguments)])
        found = f'The inputs are {described(arguments)}'
        found += f', and it was traced with {_shown_arguments(traced)}.' if traced else '.'
        raise PruneError(f'the network does not run with inputs of shape [{shapes}]: {type(error).__name__}: '
                         f'{str(error).rstrip(". ")}. {found}{advice(network, arguments, error, traced)}') from error


def _shown_arguments(traced: Traced) -> str:
    '''Return the arguments of a trace, as errors show them.'''
    return described(traced.kwargs or (traced.args[0] if len(traced.args) == 1 else traced.args))


def described(value: Any) -> str:
    '''Return shapes, types and keys of nested inputs, as errors show them.'''
    if isinstance(value, torch.Tensor):
        return f'{str(value.dtype).removeprefix("torch.")} {tuple(value.shape)}'
    if isinstance(value, Mapping):
        return '{' + ', '.join(f'{key!r}: {described(part)}' for key, part in value.items()) + '}'
    if isinstance(value, (tuple, list)):
        parts = [described(part) for part in value[:SHOWN]]
        more = f', ... ({len(value)} in all)' if len(value) > SHOWN else ''
        inside = f'{", ".join(parts)}{more}'
        return f'[{inside}]' if isinstance(value, list) else f'({inside})'
    return shown(value)


def advice(network: nn.Module, arguments: Any, error: Exception, traced: Traced | None = None) -> str:
    '''Return what to do about inputs that a network does not run with, or an empty text.'''
    samples = arguments if isinstance(arguments, list) else ()
    if samples and all(isinstance(sample, dict) for sample in samples) and not (traced and sample_list(traced.args)):
        return (' The inputs are a list of dicts, one for each sample: where the network takes tensors of many '
                'samples, collate them, e.g. loader = map(torch.utils.data.default_collate, loader).')
    if samples and all(isinstance(sample, torch.Tensor) for sample in samples) and not (
            traced and sample_list(traced.args)):
        return (' The inputs are a list of tensors: where the network takes one tensor, stack them, e.g. '
                f'{wrapped("torch.stack(tuple(x))")}, or collate images of one size.')
    tensors = tensors_in(arguments)
    before = tensors_in((traced.args, traced.kwargs)) if traced else []
    found = [*_wrong_types(network, tensors), *_wrong_shapes(network, tensors, before)]
    if isinstance(error, TypeError) and 'argument' in str(error):
        found.append(f'forward takes {Forward.of(network).text}.')
    return ''.join(f' {text[0].upper() if not text.startswith("forward") else text[0]}{text[1:]}' for text in found)


def _wrong_types(network: nn.Module, tensors: Iterable[torch.Tensor]) -> list[str]:
    '''Return advice on inputs of another type than the network's parameters.'''
    dtype = next((parameter.dtype for parameter in network.parameters() if parameter.is_floating_point()), None)
    if dtype not in CONVERSIONS:
        return []
    method, name = CONVERSIONS[dtype], str(dtype).removeprefix('torch.')
    for tensor in tensors:
        kind = str(tensor.dtype).removeprefix('torch.')
        if tensor.is_floating_point() and tensor.dtype != dtype:
            return [f'the parameters are {name} and an input is {kind}: convert the inputs, e.g. '
                    f'{wrapped(f"x.{method}()")}, or the network.']
        if tensor.dtype == torch.uint8 and tensor.dim() >= IMAGES - 1:
            return [f'the parameters are {name} and an input is uint8, an image in bytes: convert the images, e.g. '
                    f'{wrapped(f"x.{method}() / 255")}, and normalize them as in training.']
    return []


def _wrong_shapes(network: nn.Module, tensors: Iterable[torch.Tensor], traced: Sequence[torch.Tensor]) -> list[str]:
    '''Return advice on images with channels last, and on a single image without batch dimension.'''
    first = next((module for module in network.modules() if isinstance(module, nn.modules.conv._ConvNd)), None)
    channels = traced[0].shape[1] if traced and traced[0].dim() == IMAGES else \
        first.in_channels if isinstance(first, nn.Conv2d) else None
    for tensor in tensors if channels is not None else ():
        if tensor.dim() == IMAGES and tensor.shape[-1] == channels != tensor.shape[1]:
            return [f'channels are the last dimension of an input, of shape {tuple(tensor.shape)}: move them, e.g. '
                    f'{wrapped("x.permute(0, 3, 1, 2)")}.']
        if tensor.dim() == IMAGES - 1 and channels in (tensor.shape[0], tensor.shape[-1]):
            return [f'an input of shape {tuple(tensor.shape)} is a single image without a batch dimension: give '
                    'batches, of a torch.utils.data.DataLoader or e.g. '
                    f'{wrapped("x[None]" if channels == tensor.shape[0] else "x.permute(2, 0, 1)[None]")}.']
    return []


def wrapped(x: str) -> str:
    '''Return the line of code that converts the inputs of every batch.'''
    return f'loader = (({x}, y) for x, y in loader)'

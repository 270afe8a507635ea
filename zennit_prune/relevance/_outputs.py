'''The output that relevance starts from: one of the tensors that a network returns, and where it has its classes.'''
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..errors import PruneError, nearest, shown
from ..util._networks import output_tensors, tensors_in

Output = int | str | Callable[[Any], Any] | None
COLOURS = (1, 3, 4)  # channels of an image
IMAGES = 4  # dimensions of a batch of images, at least
SCORES = ('logit', 'cls', 'class', 'score', 'pred')  # in names of outputs that are likely to be meant
NAMED = ('logits', 'out')  # where Hugging Face's networks and torchvision's segmentation networks return scores


def check_output(output: object) -> None:
    '''Refuse what cannot name an output.'''
    if output is not None and (isinstance(output, bool) or not (isinstance(output, (int, str)) or callable(output))):
        raise PruneError(f'output={shown(output)} names no output of a network: give its index, key or attribute, or a '
                         'function of what the network returns.')


def chosen_output(returned: Any, output: Output = None) -> torch.Tensor:
    '''Return the tensor that relevance starts from.

    Parameters
    ----------
    returned: object
        What a network returned.
    output: int, str or callable, optional
        The index of a part, its key or attribute, or a function of ``returned``. By default, the only tensor of real
        numbers that has a dimension; of several, the one that is called ``'logits'`` or ``'out'``.

    Raises
    ------
    PruneError
        If there is no such part, or several tensors that it may be; with those that there are.
    '''
    part = returned if output is None else _part(returned, output)
    if isinstance(part, torch.Tensor):
        chosen = [part]
    else:
        named = [_named(part, name) for name in NAMED]
        named = [tensor for tensor in named if isinstance(tensor, torch.Tensor) and _can_start(tensor)]
        every = {id(tensor): tensor for tensor in output_tensors(part) if _can_start(tensor)}
        chosen = named[:1] or list(every.values())
    if len(chosen) == 1 and _can_start(chosen[0]):
        return chosen[0]
    if len(chosen) > 1:
        if callable(output):
            raise PruneError(f'the function given as output= returns several tensors: {_listed(part)}. Let it return '
                             'one, e.g. join them with torch.cat.')
        raise PruneError(f'the network returns several outputs: {_listed(part)}. Name the one that counts with '
                         f'output=, e.g. output={_example(part)}, or give a function of what the network returns.')
    raise PruneError(f'{_listed(part) or shown(part)} is no output to start from: it takes real numbers with a row for '
                     'each sample. Name another with output=, or give a function of what the network returns.')


def _can_start(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() > 0


def _named(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)


def _part(returned: Any, output: Output) -> Any:
    '''Return the part of what a network returned that has an index, key or attribute, or the result of a function.'''
    if callable(output):
        try:
            return output(returned)
        except Exception as error:
            raise PruneError(f'the function given as output= fails on what the network returns, {_listed(returned)}: '
                             f'{type(error).__name__}: {error}') from error
    if isinstance(returned, Mapping) and output in returned:
        return returned[output]
    if isinstance(output, int):
        if isinstance(returned, (tuple, list)) and -len(returned) <= output < len(returned):
            return returned[output]
    elif output is not None and not isinstance(returned, torch.Tensor) and hasattr(returned, output):
        return getattr(returned, output)
    hint = nearest(output, _names(returned)) if isinstance(output, str) else ''
    raise PruneError(f'output={output!r} is none of the outputs of the network, which returns {_listed(returned)}'
                     f'{hint or "."}')


def _names(part: Any) -> list[str]:
    if isinstance(part, Mapping):
        return [key for key in part if isinstance(key, str)]
    fields = getattr(part, '_fields', None)
    slots = [name for kind in type(part).__mro__ for name in getattr(kind, '__slots__', ()) if hasattr(part, name)]
    return list(fields if fields is not None else [*getattr(part, '__dict__', ()), *slots])


def _entries(part: Any) -> Iterator[tuple[str, Any]]:
    '''Yield the parts of what a network returned, each as ``output=`` names it.'''
    if isinstance(part, Mapping):
        yield from ((repr(key), value) for key, value in part.items())
    elif isinstance(part, (tuple, list)):
        yield from ((str(number), value) for number, value in enumerate(part))
    else:
        yield from ((repr(name), getattr(part, name)) for name in _names(part))


def _listed(part: Any) -> str:
    '''List the parts of what a network returned with their shapes.'''
    if isinstance(part, torch.Tensor):
        return f'a tensor of shape {tuple(part.shape)} and type {part.dtype}'
    entries = [f'{name} (shape {tuple(value.shape)})' if isinstance(value, torch.Tensor) else
               f'{name} ({type(value).__name__})' for name, value in _entries(part) if value is not None]
    return ', '.join(entries[:8]) + (f' and {len(entries) - 8} more' if len(entries) > 8 else '')


def _example(part: Any) -> str:
    '''Return a value of ``output=`` that names one of several tensors.'''
    found = [name for name, value in _entries(part) if isinstance(value, torch.Tensor) and _can_start(value)]
    if found:
        return next((name for name in found if any(word in name.lower() for word in SCORES)), found[0])
    return next((name for name, value in _entries(part) if output_tensors(value)), 'lambda returned: returned[0]')


# --- the dimension of the classes
def class_dimension(output: torch.Tensor, target: Any, inputs: Any = None, labels: Any = None,
                    given: bool = False) -> int | None:
    '''Find the dimension of an output that holds the classes; None where it has none, as it is one column.

    Parameters
    ----------
    output: torch.Tensor
        Shape (batch, ...).
    target: object
        Labels, whose shape tells; or ``'predicted'``, which is never taken along a dimension that nothing tells.
    inputs: object, optional
        Inputs of the network: an output with a row for each of their positions has classes in the other dimension.
    labels: torch.Tensor, optional
        Labels that tell in place of ``'predicted'``.
    given: bool
        A function of the user returned the output; where labels fit several dimensions, classes are in dimension 1.

    Raises
    ------
    PruneError
        If several dimensions may hold them.
    '''
    if output.dim() < 3:
        return 1 if output.dim() == 2 else None
    told = next((value for value in (target, labels) if isinstance(value, torch.Tensor) and value.dim()), None)
    by_inputs = _by_positions(output, inputs, told is not None)
    found: list[int | None] = []
    shape = output.shape
    if told is not None and told.shape[1:] == shape[1:]:
        found = _of_rows(told, by_inputs)
    elif told is not None and told.shape[1:] == (1, *shape[1:]):
        return None
    elif told is not None and told.shape[1:] == (1, *shape[2:]):
        return 1
    elif told is not None:
        found = [dim for dim in range(1, output.dim()) if told.shape[1:] == shape[1:dim] + shape[dim + 1:]]
        if not found:  # said where labels are read
            return 1
    elif target != 'predicted':
        return 1
    found = found or list(by_inputs) or [1] * (told is None and all(size == 1 for size in shape[2:]))
    both = [dim for dim in found if dim in by_inputs]
    if len(found) == 1 or len(both) == 1:
        return found[0] if len(found) == 1 else both[0]
    if told is not None and (given or output.dim() > 3) and 1 in found:
        return 1
    if told is not None:
        raise PruneError(
            f'the output has shape {tuple(output.shape)}, and the labels fit several of its dimensions: let output= '
            'return a tensor with the classes in dimension 1, e.g. output=lambda out: out if they are there already, '
            f'or output=lambda out: out.movedim({output.dim() - 1}, 1) if they are in the last one.')
    raise PruneError(
        f'the output has shape {tuple(output.shape)}, and which of its dimensions holds scores of classes, if any '
        'does, cannot be told: give labels, or say where relevance starts with initial=, a function of the output. For '
        'boxes, zennit_prune.relevance.detections(...) makes one; for the largest of the scores in dimension 1, it is '
        'initial=lambda out: torch.zeros_like(out).scatter_(1, out.argmax(1, keepdim=True), 1).')


def _of_rows(rows: torch.Tensor, by_inputs: list[int | None]) -> list[int | None]:
    '''Return the dimensions that may hold classes for rows of 0 and 1 that are shaped as the output.'''
    if None in by_inputs:
        return [None]
    last = rows.dim() - 1
    column: list[int | None] = []
    if 1 in (rows.shape[1], rows.shape[last] if last == 2 else 0):
        column.append(1 if rows.shape[1] == 1 else last)
    once = [dim for dim in range(1, rows.dim()) if rows.shape[dim] > 1 and bool((rows.sum(dim) == 1).all())]
    if column:  # of signs, or rows of a single position
        return column + [dim for dim in once if last == 2]
    return list(once if len(once) == 1 else by_inputs or [1])


def _by_positions(output: torch.Tensor, inputs: Any, labelled: bool) -> list[int | None]:
    '''Return the dimensions that may hold classes where others equal those of an input: pixels, or tokens.

    Without labels, real numbers have to be images of a few colours: maps of features may have boxes at every position.
    '''
    shape, last = output.shape, output.dim() - 1
    for tensor in tensors_in(inputs):
        if not tensor.is_floating_point():
            if output.dim() == 3 and tensor.dim() == 2 and tensor.shape in (shape[:2], shape[::2]):
                return [dim for dim in (1, last) if tensor.shape == shape[:dim] + shape[dim + 1:]]
            continue
        colours = [dim for dim in (1, last) if tensor.dim() > dim and tensor.shape[dim] in COLOURS]
        if not labelled and (tensor.dim() < IMAGES or not colours):
            continue
        if tensor.dim() == output.dim() + 1 and tensor.shape[2:] == shape[1:]:
            return [None]
        if tensor.dim() == output.dim() and len(tensor) == len(output):
            found: list[int | None] = [1] if tensor.shape[2:] == shape[2:] else []
            found += [last] if tensor.shape[1:-1] == shape[1:-1] else []
            return [colours[0]] if len(found) > 1 and tensor.dim() >= IMAGES and colours else found
    return []


MOVES = ('View', 'Unsafe', 'Reshape', 'Squeeze', 'Unsqueeze', 'Select', 'Slice', 'Clone', 'Alias', 'Transpose',
         'Permute', 'Expand', 'Identity', 'Clamp', 'ToCopy', 'Carried', 'TBackward', 'AsStrided')  # nodes of graphs


def ends_in_sigmoid(output: torch.Tensor) -> bool:
    '''Return whether an output with gradient history is that of a sigmoid: 0.5, and not 0, parts its two classes.'''
    node = output.grad_fn
    while node is not None and type(node).__name__.startswith(MOVES):
        node = node.next_functions[0][0] if node.next_functions else None
    return type(node).__name__.startswith(('Sigmoid', 'Hardsigmoid'))


def classes_second(output: torch.Tensor, dim: int | None) -> torch.Tensor:
    '''Return the output with its classes in dimension 1.'''
    return output.unsqueeze(1) if dim is None else output.movedim(dim, 1)


def classes_back(values: torch.Tensor, dim: int | None) -> torch.Tensor:
    '''Undo :func:`classes_second`.'''
    return values.squeeze(1) if dim is None else values.movedim(1, dim)

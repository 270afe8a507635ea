'''Inputs and target of what a loader yields: pairs, dicts, lists of samples, with labels of any kind.

What is not understood is refused with what was found and the line of code that wraps the loader.
'''
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import PruneError, shown
from ._arguments import LABELS, Forward, described, plain, taken_from, unknown_keys

UNLESS_TAKEN = ('y', 'cls', 'class_id', 'class_ids', 'class_label', 'class_labels')  # labels unless forward has them
NUMBERS = (bool, int, float, np.bool_, np.number)
FORMS = '(inputs, labels), inputs alone, a dict with the inputs and the labels, or a list of dicts'


class Found(NamedTuple):
    '''The inputs and the target of a batch, and the key of the target among the inputs.'''

    inputs: Any
    target: Any = None
    label: str = ''


def parts_of(value: Any, forward: Forward) -> Found:
    '''Return the inputs and the target of what a loader yielded.

    Parameters
    ----------
    value: object
        One of

        - a tuple or list of inputs and target, of which the target may be None; or of inputs alone;
        - such a pair and a third part that numbers the samples, which is dropped: whole numbers, no two of them equal;
        - a tensor or an array: inputs alone;
        - a dict, or any mapping, with one of the keys label, labels, target, targets or label_ids (or y, cls, class_id
          or class_label, unless ``forward`` has a parameter of that name): the inputs and their target;
        - a list of dicts with common keys: samples without target.
    forward: Forward
        The parameters of the network.

    Raises
    ------
    PruneError
        If it is something else, with the line of code that wraps the loader.
    '''
    if isinstance(value, Mapping):
        return _from_dict(value, forward)
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return Found(value)
    if not isinstance(value, (tuple, list)):
        raise _not_understood(value)
    if _names_arguments(value, forward):
        return _from_dict(value._asdict(), forward)  # type: ignore[union-attr]
    if _are_samples(value, forward):
        return Found(list(value))
    if len(value) == 3 and _numbers_samples(value, forward):
        value = value[:2]
    if len(value) not in (1, 2):
        raise _too_many_parts(value, forward)
    inputs, target = value if len(value) == 2 else (value[0], None)
    if isinstance(inputs, Mapping):
        return _from_dict(inputs, forward, target)
    return Found(inputs, as_target(target))


def _names_arguments(value: Sequence[Any], forward: Forward) -> bool:
    '''Return whether a namedtuple holds arguments of ``forward`` by their names.'''
    fields = getattr(value, '_fields', ())
    return bool(fields) and all(name in forward.names for name in fields)


def _are_samples(value: Sequence[Any], forward: Forward) -> bool:
    '''Return whether there are the dicts of single samples, rather than the dicts of a pair or of a whole batch.'''
    dicts = bool(value) and all(isinstance(part, Mapping) for part in value)
    if not dicts or (isinstance(value, tuple) and len(value) < 3):
        return False
    if len(value) == 1:
        batched = any(_is_label(key, forward) and getattr(part, 'ndim', 0) for key, part in value[0].items())
        return not batched and not (forward.names and all(key in (*forward.names, *LABELS) for key in value[0]))
    return bool(set.intersection(*map(set, value)))


def _from_dict(value: Mapping[Any, Any], forward: Forward, target: Any = None) -> Found:
    '''Return the target among the inputs in a dict, and the others; ``target`` is that of a pair.'''
    inputs = plain(value)
    keys = [key for key in inputs if _is_label(key, forward)]
    if target is not None:
        kept = [key for key in keys if not forward.takes(key)]
        if kept:
            raise PruneError(f'there are labels beside the inputs and, as {kept[0]!r}, among them: say which are the '
                             'target, e.g. loader = (inputs for inputs, y in loader), or loader = (({key: value for '
                             f'key, value in inputs.items() if key != {kept[0]!r}}}, y) for inputs, y in loader).')
        return _checked(Found(inputs, as_target(target)), forward)
    if len(keys) > 1:
        others = [key for key in inputs if key not in keys]
        first = others[0] if others else 'image'
        raise PruneError(f'the inputs hold {" and ".join(map(repr, keys))}, and any of them may be the target: say '
                         f'which it is, e.g. loader = ((batch[{first!r}], batch[{keys[0]!r}]) for batch in loader).')
    if keys and len(inputs) == 1:
        raise PruneError(f'a batch holds {keys[0]!r} only: there are no inputs.')
    label = keys[0] if keys else ''
    found = as_target(inputs.pop(label)) if keys else None
    return _checked(Found(inputs, found, label), forward)


def _checked(found: Found, forward: Forward) -> Found:
    '''Refuse keys that ``forward`` does not take, unless there is one entry, which is given by position.'''
    by_name = len(found.inputs) > 1 or not forward.takes_by_position(1)
    if by_name and not all(forward.takes(key) or key in LABELS for key in found.inputs):
        remedy = f'wrap the loader, so that it yields what forward takes, e.g. {_line_for(found, forward)}'
        raise unknown_keys([*found.inputs, *([found.label] if found.label else [])], forward, remedy)
    return found


def _line_for(found: Found, forward: Forward) -> str:
    '''Return the line of code that chooses from a dict what ``forward`` takes, and the target.'''
    if found.target is not None and not found.label:
        return f'loader = (({taken_from("inputs", found.inputs, forward)}, y) for inputs, y in loader)'
    chosen = taken_from('batch', found.inputs, forward)
    labels = [found.label] if found.label else [key for key, value in found.inputs.items()
                                                if isinstance(value, torch.Tensor) and repr(key) not in chosen]
    if labels:
        return f'loader = (({chosen}, batch[{labels[0]!r}]) for batch in loader)'
    return f'loader = ({chosen} for batch in loader)'


def _is_label(key: Any, forward: Forward) -> bool:
    '''Return whether a key of the inputs is that of the target.'''
    if key in LABELS:
        return key not in forward.required
    return key in UNLESS_TAKEN and not forward.takes(key)


def _numbers_samples(value: Sequence[Any], forward: Forward) -> bool:
    '''Return whether the third part of a batch numbers its samples, rather than being labels or weights.'''
    first = next((part for part in _tensors(value[0])), None)
    index, second = plain(value[2]), plain(value[1])
    if isinstance(index, (list, tuple)):
        index = as_target(index)
    if first is None or not isinstance(index, torch.Tensor) or index.dim() != 1 or index.is_floating_point():
        return False
    if index.dtype == torch.bool or index.is_complex() or len(index.unique()) < len(index):
        return False
    sizes = {len(first) if first.dim() else 1, *([len(value[0])] if isinstance(value[0], (list, tuple)) else [])}
    return len(index) in sizes and not _alike(first, second) and len(forward.inputs) < 2


def _alike(first: Any, second: Any) -> bool:
    '''Return whether two parts of a batch have the same shape, as several inputs have, token numbers and a mask.'''
    shapes = [tuple(getattr(part, 'shape', ())) for part in (first, second)]
    return shapes[0] == shapes[1] and len(shapes[0]) > 1


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    '''Yield the tensors in inputs of any kind.'''
    value = plain(value)
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _too_many_parts(value: Sequence[Any], forward: Forward) -> PruneError:
    '''Return the error for a batch of several parts, with the line that leaves out some of them.'''
    if not value:
        return _not_understood(value)
    also = ''
    if isinstance(value, list) and all(isinstance(part, torch.Tensor) for part in value):
        also = ' Where the parts are images: loader = ((images, None) for images in loader).'
    return PruneError(f'a batch is {FORMS}; the loader yields a {type(value).__name__} of {len(value)} parts: '
                      f'{described(value)}. Only a third part that numbers the samples is left out: wrap the loader, '
                      f'e.g. loader = {_pair_from(value, forward)}.{also}')


def _pair_from(value: Sequence[Any], forward: Forward) -> str:
    '''Return the code that makes pairs of batches of several parts.'''
    names, most = getattr(value, '_fields', ()), len(value) - 1
    if names:
        label = next((name for name in names if _is_label(name, forward)), names[1])
        return f'((batch.{next(name for name in names if name != label)}, batch.{label}) for batch in loader)'
    if all(isinstance(part, (tuple, list)) for part in value):  # samples
        return 'map(torch.utils.data.default_collate, loader)'
    if all(isinstance(part, int) for part in value[1:]):
        return '(batch for batch, *_ in loader)'
    needed = [name for name in forward.required if name in forward.positional]
    if len(forward.positional) >= most and (len(needed) == most or _alike(*value[:2])):
        inputs = ', '.join(forward.positional[:most])
        return f'((({inputs}), y) for {inputs}, y in loader)'
    return f'((x, y) for x, y, {"_" if most == 2 else "*_"} in loader)'


def _not_understood(value: Any) -> PruneError:
    '''Return the error for what is no batch.'''
    held = [name for name, part in getattr(value, '__dict__', {}).items() if isinstance(part, torch.Tensor)]
    x, y = (f'batch.{name}' for name in (*held, 'x', 'y')[:2]) if len(held) > 1 else ('batch.x', 'batch.y')
    remedy = f' Wrap the loader, e.g. loader = (({x}, {y}) for batch in loader).' if hasattr(value, '__dict__') else ''
    return PruneError(f'a batch is {FORMS}; {described(value)} (a {type(value).__name__}) is not.{remedy}')


def as_target(target: Any) -> Any:
    '''Return a target in plain containers: labels in a list, a tuple or an array as a tensor, mappings as dicts.

    A tuple with a dict, a list, a text or a tensor of its own length for each sample becomes a list. Anything else
    stays as it is.
    '''
    target = plain(target)
    if not isinstance(target, (tuple, list)) or not target:
        return target
    if all(map(_is_number, target)) or all(isinstance(part, list) and _is_table(part) for part in target):
        try:
            return torch.as_tensor(target, device='cpu')
        except (TypeError, ValueError, RuntimeError):  # rows of different lengths, say
            return target
    lengths = {len(part) if isinstance(part, torch.Tensor) and part.dim() else -1 for part in target}
    differ = len(lengths) > 1 and -1 not in lengths  # boxes of each image, say
    return list(target) if differ or all(isinstance(part, (dict, list, str)) for part in target) else target


def _is_number(part: Any) -> bool:
    return isinstance(part, NUMBERS) or (isinstance(part, torch.Tensor) and part.dim() == 0)


def _is_table(part: list[Any]) -> bool:
    return bool(part) and all(_is_number(item) or (isinstance(item, list) and _is_table(item)) for item in part)


def as_labels(target: Any) -> torch.Tensor:
    '''Return labels as a tensor: a tensor stays on its device, anything else becomes one on the CPU.

    Whole numbers of any type become int64; bool and floating point stay.

    Raises
    ------
    PruneError
        If they are no numbers, with what they are and what to write.
    '''
    labels = as_target(target)
    if isinstance(labels, NUMBERS):
        labels = torch.as_tensor(labels, device='cpu')
    if not isinstance(labels, torch.Tensor):
        raise PruneError(f'the target is {described(labels)}, which is no tensor of labels: {_remedy(labels)}')
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    return labels.long() if whole else labels


def _remedy(target: Any) -> str:
    '''Return what to write where a target is no tensor of labels.'''
    parts = list(target) if isinstance(target, (tuple, list, np.ndarray)) else []
    if parts and all(isinstance(part, str) for part in parts):
        return ('give class indices, e.g. loader = ((x, torch.tensor([names.index(name) for name in y])) for x, y in '
                'loader), where names lists the classes in the order of the outputs.')
    if len(parts) == 3 and isinstance(parts[2], NUMBERS):
        return ('of mixed samples, give a weight for each class, e.g. loader = ((x, lam * one_hot(a, classes) + '
                '(1 - lam) * one_hot(b, classes)) for x, (a, b, lam) in loader), with torch.nn.functional.one_hot and '
                "initial='weights'.")
    if isinstance(target, torch.Tensor) or not isinstance(target, (dict, list, tuple)):
        return f'{shown(target)} stands in the place of class indices, of shape (N,).'
    if isinstance(target, dict) and target:
        key = next((key for key in target if key in LABELS), next(iter(target)))
        return (f'choose the labels, e.g. loader = ((x, y[{key!r}]) for x, y in loader); or start from something else '
                "with target='predicted' or initial=, a function of the output (for boxes, "
                'zennit_prune.relevance.detections makes it).')
    return ("start from something else with target='predicted' or initial=, a function of the output (for boxes, "
            'zennit_prune.relevance.detections makes it), or give class indices, of shape (N,).')

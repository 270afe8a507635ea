'''Inputs and target of what loaders yield; the lines of code in errors run as they are written.'''
from __future__ import annotations

import re
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from small import images
from torch import nn
from torch.utils.data import default_collate

import zennit_prune as zp
from zennit_prune.util._loaders import Batch, as_loader, many_times
from zennit_prune.util._yielded import as_labels, as_target

X, Y = images(), torch.tensor([3, 1, 2, 0])
Pair = namedtuple('Pair', 'image label')
Triple = namedtuple('Triple', 'image label weight')
Tokens = namedtuple('Tokens', 'ids mask')


class One(nn.Module):
    def forward(self, x: Any) -> Any:
        return x


class Two(nn.Module):
    def forward(self, ids: Any, mask: Any = None) -> Any:
        return ids


class NeedsTarget(nn.Module):
    def forward(self, x: Any, target: Any) -> Any:
        return x


class WithLabels(nn.Module):
    def forward(self, ids: Any, labels: Any = None, y: Any = None) -> Any:
        return ids


@dataclass
class Object:
    '''A batch as some libraries have them.'''

    pixels: Any
    classes: Any


@pytest.mark.parametrize('key', ['label', 'labels', 'target', 'targets', 'label_ids', 'y', 'cls'])
@pytest.mark.parametrize('kind', [dict, UserDict, OrderedDict])
def test_a_label_among_the_inputs_is_the_target(kind: Any, key: str) -> None:
    for value in (kind({'image': X, key: Y}), (kind({'image': X, key: Y}),), (kind({'image': X, key: Y}), None),
                  [kind({'image': X, key: Y})]):
        batch = Batch.of(value, One())
        assert batch.inputs is X and batch.target is Y and batch.size == 4


def test_labels_that_forward_takes() -> None:
    batch = Batch.of({'ids': X, 'labels': Y}, WithLabels())  # of a loss that is computed inside
    assert batch.inputs == {'ids': X} and batch.target is Y
    batch = Batch.of({'ids': X, 'y': Y}, WithLabels())
    assert set(batch.inputs) == {'ids', 'y'} and batch.target is None
    batch = Batch.of({'x': X, 'target': Y}, NeedsTarget())
    assert set(batch.inputs) == {'x', 'target'} and batch.target is None
    batch = Batch.of({'ids': X, 'mask': Y}, Two())  # a mask is an input
    assert set(batch.inputs) == {'ids', 'mask'} and batch.target is None
    batch = Batch.of(Tokens(X, Y), Two())
    assert set(batch.inputs) == {'ids', 'mask'} and batch.target is None


def test_two_labels() -> None:
    with pytest.raises(zp.PruneError, match=r"'label' and 'y', .*\(\(batch\['image'\], batch\['label'\]\) for batch"):
        Batch.of({'image': X, 'label': Y, 'y': Y}, One())
    with pytest.raises(zp.PruneError, match="labels beside the inputs and, as 'label', among them"):
        Batch.of(({'image': X, 'label': Y}, Y), One())
    with pytest.raises(zp.PruneError, match="'label' only"):
        Batch.of({'label': Y}, One())


LABELS: dict[str, Any] = {
    'array': Y.numpy(), 'list': Y.tolist(), 'tuple': tuple(Y.tolist()), 'numpy numbers': list(Y.numpy()),
    '0-d tensors': list(Y), 'int32': Y.int(), 'uint8': Y.byte(), 'int16 array': Y.numpy().astype('int16'),
    'uint16 array': Y.numpy().astype('uint16'), 'big-endian': Y.numpy().astype('>i8'),
}


@pytest.mark.parametrize('kind', LABELS)
def test_labels_of_any_kind(kind: str) -> None:
    assert torch.equal(as_labels(LABELS[kind]), Y)
    batch = Batch.of((X, LABELS[kind]), One())
    assert isinstance(batch.target, torch.Tensor) and torch.equal(as_labels(batch.target), Y)


def test_labels_that_stay_as_they_are() -> None:
    assert as_labels([True, False]).dtype == torch.bool and as_labels([0.5, 1]).dtype == torch.float32
    assert as_labels(3).item() == 3 and as_labels([[0, 1], [1, 2]]).shape == (2, 2)
    assert as_labels(Y) is Y and as_labels(Y[:, None]).shape == (4, 1)
    assert as_target('predicted') == 'predicted' and as_target(None) is None and as_target(torch.sigmoid)


NO_LABELS: dict[str, tuple[Any, str]] = {
    'texts': (['a', 'b'], r"\['a', 'b'\].*names.index\(name\) for name in y.*order of the outputs"),
    'array of texts': (np.array(['a', 'b']), 'names.index'),
    'a dict': ({'boxes': X}, r"'boxes': float32 \(4, 3, 8, 8\).*target='predicted' or initial="),
    'a list of dicts': ([{'boxes': X}], "target='predicted' or initial="),
    'mixed samples': ((Y, Y.flip(0), 0.3), r'weight for each class.*lam \* one_hot'),
    'an object': (Object(X, Y), 'an Object stands in the place of class indices'),
    'rows of different lengths': ([[1], [1, 2]], 'class indices'),
}


@pytest.mark.parametrize('kind', NO_LABELS)
def test_what_is_no_label(kind: str) -> None:
    target, message = NO_LABELS[kind]
    with pytest.raises(zp.PruneError, match=message):
        as_labels(target)
    assert Batch.of((X, target), One()).target is not None  # it travels on, for starts that need no labels


# --- third parts
INDICES: dict[str, Any] = {'tensor': torch.tensor([7, 5, 0, 9]), 'array': np.array([7, 5, 0, 9]), 'list': [7, 5, 0, 9],
                           'tuple': (7, 5, 0, 9), 'int32': torch.tensor([7, 5, 0, 9], dtype=torch.int32)}


@pytest.mark.parametrize('kind', INDICES)
def test_numbers_of_samples_are_left_out(kind: str) -> None:
    batch = Batch.of((X, Y, INDICES[kind]), One())
    assert batch.inputs is X and batch.target is Y
    assert Batch.of([{'image': X}, Y, INDICES[kind]], One()).target is Y


def line_in(error: str) -> str:
    '''The line of code in an error.'''
    found = re.search(r'loader = .*?(?=, or loader|\.$|\. | \(|, where)', error)
    assert found
    return found.group()


WRAPPED: dict[str, tuple[Any, Any, Any, Any]] = {
    'weights': (One, (X, Y, torch.rand(4)), X, Y),
    'repeated numbers': (One, (X, Y, torch.zeros(4, dtype=torch.int64)), X, Y),
    'texts': (One, (X, Y, ['a', 'b', 'c', 'd']), X, Y),
    'numbers of another length': (One, (X, Y, torch.arange(3)), X, Y),
    'a mask': (One, (X, Y, torch.ones(4, dtype=torch.bool)), X, Y),
    'four parts': (One, (X, Y, torch.arange(4), torch.rand(4)), X, Y),
    'names': (One, Triple(X, Y, torch.rand(4)), X, Y),
    'numbers of the batch and the loader': (One, ((X, Y), 0, 0), X, Y),
    'token numbers and a mask': (Two, (X, X, Y), (X, X), Y),
    'two inputs that are needed': (NeedsTarget, (X, Y, Y), (X, Y), Y),
    'samples, not collated': (One, list(zip(X, Y)), X, Y),
    'an object': (One, Object(X, Y), X, Y),
    'a dict with more': (One, {'image': X, 'label': Y, 'path': ['a'] * 4, 'meta': {'affine': X}}, X, Y),
    'a dict without a key of labels': (One, {'image': X, 'mask': Y, 'bounds': [1, 2]}, X, Y),
    'a dict with more, for two': (Two, {'ids': X, 'mask': X, 'label': Y, 'type': X}, {'ids': X, 'mask': X}, Y),
    'a dict without labels': (Two, {'image': X, 'path': ['a']}, X, None),
    'a pair with a dict with more': (One, ({'image': X, 'path': ['a'] * 4}, Y), X, Y),
    'a dict of pairs': (One, {'a': [X, Y], 'b': [X, Y]}, X, Y),
    'two labels': (One, {'image': X, 'label': Y, 'target': X}, X, Y),
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one is other or torch.equal(one, other)


@pytest.mark.parametrize('kind', WRAPPED)
def test_what_is_refused_names_the_line_that_wraps_the_loader(kind: str) -> None:
    network, value, inputs, target = WRAPPED[kind]
    with pytest.raises(zp.PruneError) as error:
        Batch.of(value, network())
    scope: dict[str, Any] = {'loader': [value, value], 'torch': torch}
    exec(line_in(str(error.value)), scope)
    found = [Batch.of(each, network()) for each in scope['loader']]
    assert len(found) == 2 and all(same(batch.inputs, inputs) and same(batch.target, target) for batch in found)


def test_lines_for_lists_of_images() -> None:
    with pytest.raises(zp.PruneError, match=r'loader = \(\(images, None\) for images in loader\)'):
        Batch.of([X[0], X[1], X[2]], One())
    assert len(Batch.of(([X[0], X[1], X[2]], None), One()).inputs) == 3


SAMPLES = [{'image': image, 'height': 8} for image in X]
LISTS: dict[str, tuple[Any, Any]] = {
    'dicts': (SAMPLES, None), 'two dicts': (SAMPLES[:2], None), 'one dict': (SAMPLES[:1], None),
    'dicts and labels': ((SAMPLES, Y), Y), 'a tuple with the dicts, and labels': (((SAMPLES,), Y), Y),
    'a tuple of dicts': (tuple(SAMPLES), None), 'images': ((list(X), Y), Y),
    'a tuple of images and one of dicts': ((tuple(X), tuple({'boxes': X} for _ in X)), None),
    'images without labels': ((list(X), None), None),
}


@pytest.mark.parametrize('kind', LISTS)
def test_lists_of_samples(kind: str) -> None:
    value, target = LISTS[kind]
    batch = Batch.of(value, One())
    assert isinstance(batch.inputs, list) and batch.size == len(batch.inputs) and (target is None or batch.target is Y)


def test_default_collate() -> None:
    samples = [((x, x), int(y)) for x, y in zip(X, Y)]
    inputs, target = Batch.of(default_collate(samples), Two())
    assert isinstance(inputs, tuple) and len(inputs) == 2 and target.tolist() == Y.tolist()
    inputs, target = Batch.of(default_collate([({'ids': x}, {'boxes': x}) for x in X]), Two())
    assert set(inputs) == {'ids'} and set(target) == {'boxes'}
    assert Batch.of(default_collate([(x,) for x in X]), One()).inputs.shape == X.shape
    assert Batch.of(default_collate([({'ids': x, 'mask': x},) for x in X]), Two()).inputs['ids'].shape == X.shape


# --- whole data sets
@pytest.mark.parametrize('loader', [(X, Y), (X.numpy(), Y.numpy()), (X, Y.tolist()), (X.numpy(), Y)], ids=str)
def test_whole_data_sets(loader: Any) -> None:
    for read in (as_loader, many_times):
        read_again: Iterable[Any] = read(loader)
        (x, y), = read_again
        assert x.shape == X.shape and sorted(y.tolist()) == [0, 1, 2, 3]
    assert torch.equal(next(iter(as_loader(X.numpy()))), X)
    with pytest.raises(zp.PruneError, match='4 inputs and 3 labels'):
        as_loader((X, [0, 1, 2]))
    with pytest.raises(zp.PruneError, match=r'UserDict does not.*Put it into a list'):
        as_loader(UserDict(image=X))

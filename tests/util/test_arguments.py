'''Examples, batches and inputs become arguments by one rule; calls that fail say what was found and what to write.'''
from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from small import chain, images
from torch import nn

import zennit_prune as zp
from zennit_prune.util._arguments import Forward, arguments_for, call_network, described, plain, spread

X, Y = images(), torch.arange(4)
ONE = X[0]
Sizes = namedtuple('Sizes', 'high wide')


class One(nn.Module):
    def forward(self, x: Any) -> Any:
        return x


class Two(nn.Module):
    def forward(self, a: Any, b: Any) -> Any:
        return a, b


class Optional(nn.Module):
    def forward(self, a: Any, b: Any = None) -> Any:
        return a, b


class Many(nn.Module):
    def forward(self, *parts: Any) -> Any:
        return parts


class Named(nn.Module):
    def forward(self, **parts: Any) -> Any:
        return parts


class Detector(nn.Module):
    def forward(self, images: Any, targets: Any = None) -> Any:
        return images


class Annotated(nn.Module):
    def forward(self, images: list[torch.Tensor], sizes: Any = None) -> Any:
        return images


class Typed(nn.Module):
    def forward(self, images: Sequence[torch.Tensor], sizes: Any = None) -> Any:
        return images


SAMPLES = [{'image': ONE, 'height': 480}, {'image': X[1, :, 1:], 'height': 400}]
RULE: dict[str, tuple[type[nn.Module], Any, int | None, Any]] = {
    'a tensor': (One, X, None, X),
    'an array': (One, X.numpy(), None, X),
    'a tuple of arguments': (Two, (X, X), None, (X, X)),
    'a list of arguments, of default_collate': (Two, [X, X], 4, (X, X)),
    'a tuple with one argument': (One, (X,), None, (X,)),
    'a list with one argument': (One, [X], 4, (X,)),
    'a list with one sample': (One, [ONE], 1, [ONE]),
    'a list, without labels': (One, [ONE], None, [ONE]),
    'more than forward takes': (One, (ONE, X[1]), 2, [ONE, X[1]]),
    'images for a detector': (Detector, (ONE, X[1]), 2, [ONE, X[1]]),
    'inputs and labels by position': (Detector, (X, torch.arange(4)), None, (X, torch.arange(4))),
    'images for a detector, without labels': (Detector, [ONE, X[1]], None, [ONE, X[1]]),
    'images and targets for a detector': (Detector, ([ONE, X[1]], [{'boxes': X}]), None, ([ONE, X[1]], [{'boxes': X}])),
    'one image for a detector': (Annotated, (ONE,), None, [ONE]),
    'images as annotated': (Annotated, [ONE, X[1]], 3, [ONE, X[1]]),
    'images as annotated, a sequence': (Typed, (ONE, X[1]), 3, [ONE, X[1]]),
    'optional, one label each': (Optional, (ONE, X[1]), 2, [ONE, X[1]]),
    'optional, a label for each entry': (Optional, [X, X], 4, (X, X)),
    'optional, a tuple': (Optional, (X, X), None, (X, X)),
    'optional, a list': (Optional, [X, X], None, [X, X]),
    'any number': (Many, [X, X], 4, (X, X)),
    'a list of dicts': (One, SAMPLES, None, SAMPLES),
    'a list of two dicts for two parameters': (Optional, SAMPLES, None, SAMPLES),
    'a tuple of a list': (One, (SAMPLES,), None, SAMPLES),
    'a dict': (Two, {'a': X, 'b': X}, None, {'a': X, 'b': X}),
    'any mapping': (Two, UserDict(a=X, b=OrderedDict(c=X.numpy())), None, {'a': X, 'b': {'c': X}}),
    'a dict with one entry': (One, {'image': X}, None, X),
    'a dict with one entry of that name': (One, {'x': X}, None, {'x': X}),
    'a dict with a list of images': (One, {'x': (ONE, X[1])}, None, [ONE, X[1]]),
    'a dict with one entry for any name': (Named, {'image': X}, None, {'image': X}),
    'a dict with labels that are not taken': (One, {'image': X, 'labels': X}, None, X),
    'a dict with labels that are taken': (Detector, {'images': X, 'targets': X}, None, {'images': X, 'targets': X}),
}


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return type(other) is dict and one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@pytest.mark.parametrize('kind', RULE)
def test_the_rule(kind: str) -> None:
    network, inputs, labels, wanted = RULE[kind]
    found = arguments_for(network(), inputs, labels)
    assert equal(wanted, found)
    assert equal(found, arguments_for(network(), found))  # applied again, it changes nothing
    args, kwargs = spread(found)
    assert equal(network()(*args, **kwargs), call_network(network(), found))


def test_without_a_network_anything_can_be_given() -> None:
    assert Forward.of(None).takes('x') and equal(arguments_for(None, {'x': X, 'y': X}), {'x': X, 'y': X})
    assert equal(arguments_for(None, (X, X)), (X, X)) and equal(arguments_for(None, [ONE, X[1]], 2), [ONE, X[1]])


def test_keys_that_forward_does_not_take() -> None:
    with pytest.raises(zp.PruneError, match=r"keys 'a', 'path', and forward takes \(a, b\): .*\{'a': batch\['a'\]\}"):
        arguments_for(Two(), {'a': X, 'path': 'x.png'})
    with pytest.raises(zp.PruneError, match=r"keys 'ids', 'image', .*batch\['image'\]"):
        arguments_for(One(), {'ids': torch.arange(4), 'image': X})


def test_plain_containers() -> None:
    value = plain(UserDict(a=[np.arange(3)], b=Sizes(np.float32([1, 2]), 'x'), c=np.array(['x'], object)))
    assert type(value) is dict and torch.equal(value['a'][0], torch.arange(3)) and isinstance(value['c'], np.ndarray)
    assert isinstance(value['b'], Sizes) and torch.equal(value['b'].high, torch.tensor([1.0, 2.0]))
    turned = np.arange(6, dtype='>i4').reshape(2, 3)[::-1]
    turned.flags.writeable = False
    assert plain(turned).tolist() == turned.tolist()


def test_inputs_as_errors_show_them() -> None:
    assert described({'a': [Y] * 5, 'b': (1, 'x', None)}) == (
        "{'a': [int64 (4,), int64 (4,), int64 (4,), ... (5 in all)], 'b': (1, 'x', None)}")


# --- what does not run
WRONG: dict[str, tuple[Any, str]] = {
    'float64': (X.double(), r'float32 and an input is float64.*\(\(x.float\(\), y\) for x, y in loader\)'),
    'bytes': ((X * 9).byte(), r'uint8, an image in bytes.*x.float\(\) / 255.*normalize'),
    'channels last': (X.permute(0, 2, 3, 1), r'last dimension of an input, of shape \(4, 8, 8, 3\).*x.permute\(0, 3'),
    'a single image': (X[0], r'single image without a batch dimension.*DataLoader.*x\[None\]'),
    'a single image with channels last': (X[0].permute(1, 2, 0), r'single image.*x.permute\(2, 0, 1\)\[None\]'),
    'a list of images': ([X[0], X[1]], r'list of tensors.*torch.stack\(tuple\(x\)\)'),
}


@pytest.mark.parametrize('kind', WRONG)
def test_what_does_not_run(kind: str) -> None:
    inputs, message = WRONG[kind]
    with pytest.raises(zp.PruneError, match=message):
        call_network(chain(), inputs)
    with pytest.raises(zp.PruneError, match=rf'it was traced with float32 \(1, 3, 8, 8\)\..*{message}'):
        zp.Pruner(chain(), None, X[:1], progress=False).collect([(inputs, torch.arange(4))], target='predicted')
    if kind != 'a list of images':
        with pytest.raises(zp.PruneError, match=message):
            zp.prune(chain(), None, [(inputs, torch.arange(4))], zp.Budget(flops=0.7), progress=False)


def test_arguments_that_are_missing() -> None:
    with pytest.raises(zp.PruneError, match=r'missing 1 required.*forward takes \(a, b\)'):
        call_network(Two(), X)


def test_half_precision() -> None:
    with pytest.raises(zp.PruneError, match=r'bfloat16 and an input is float32.*x.bfloat16\(\)'):
        call_network(chain().bfloat16(), X)


# --- examples
def test_examples_follow_the_rule() -> None:
    groups = [group.name for group in zp.trace(chain(), X).groups]
    for example in ({'image': X}, UserDict(image=X, label=torch.arange(4)), X.numpy(), (X,)):
        assert [group.name for group in zp.trace(chain(), example).groups] == groups
        assert zp.cost(chain(), example) == zp.cost(chain(), X)
    plan = zp.Plan(zp.trace(chain(), X), {'0': [1]})
    assert zp.verify(chain(), plan.apply(chain()), plan, {'image': X, 'label': torch.arange(4)}) < 1e-4

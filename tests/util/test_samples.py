'''Samples lie along the first dimension of tensors, or are the items of a list.'''
from __future__ import annotations

from typing import Any

import pytest
import torch
from small import images

from zennit_prune.util._loaders import Batch
from zennit_prune.util._samples import batch_size, by_samples, only

X = images(3)
NAN = float('nan')


def dicts(count: int = 4) -> list[dict[str, Any]]:
    return [{'image': images(1, 6 + number)[0], 'height': number} for number in range(count)]


SIZES: dict[str, tuple[Any, int | None, int]] = {
    'a tensor': (images(5), None, 5), 'arguments': ((images(5), torch.ones(7)), None, 5),
    'a list of dicts': (dicts(), None, 4), 'a list as argument': ((dicts(),), None, 4),
    'a list of images': ([X[0], X[1]], None, 2), 'a list of three images': ([X[0], X[1], X[2]], None, 3),
    'by name': ({'images': dicts(2), 'flag': True}, None, 2),
    'images of different sizes by name': ({'images': [X[0, :, 1:], X[1, :1]], 'flag': True}, None, 2),
    'images of one size by name': ({'images': [X[0], X[1]], 'sizes': torch.ones(2, 2)}, 2, 2),
    'tensors of all samples by name': ({'parts': [images(5), images(5)]}, 5, 5),
    'nothing': ((), None, 1), 'a number': (torch.tensor(3.0), None, 1), 'no sample': (images(2)[:0], None, 0),
}


@pytest.mark.parametrize('kind', SIZES)
def test_the_number_of_samples(kind: str) -> None:
    inputs, labels, size = SIZES[kind]
    assert batch_size(inputs, labels) == size


def test_parts_that_hold_samples() -> None:
    assert by_samples(torch.ones(2, 3), 2) and not by_samples(torch.ones(3, 2), 2) and not by_samples(torch.ones(()), 1)
    assert by_samples(dicts(2), 2) and not by_samples(dicts(2), 3) and not by_samples([], 0)
    assert not by_samples([16, 16], 2) and not by_samples([images(2), images(2)], 2)  # numbers; all samples
    assert by_samples(list(X), 3)  # three images with three channels


@pytest.mark.parametrize('samples', [slice(1, 3), torch.tensor([1, 2]), torch.tensor([False, True, True])])
def test_some_of_the_samples(samples: Any) -> None:
    for inputs in (list(X), (list(X),), {'images': dicts(3), 'sizes': torch.arange(3)}, X, (X, torch.ones(7))):
        found = only(inputs, 3, samples)
        wanted = only(inputs, 3, slice(1, 3))
        assert type(found) is type(inputs) and str(found) == str(wanted) and batch_size(found) == 2
    assert torch.equal(only(list(X), 3, samples)[0], X[1])


def test_batches_of_lists() -> None:
    batch = Batch.of((dicts(), [3, 1, 2, 0]))
    assert batch.size == 4 and batch.finite.all()
    part = batch.only(torch.tensor([False, True, True, False]))
    assert [item['height'] for item in part.inputs] == [1, 2] and part.target.tolist() == [1, 2] and part.size == 2
    batch.inputs[2]['image'][0, 0, 0] = NAN
    broken = Batch.of((batch.inputs, batch.target))
    assert broken.finite.tolist() == [True, True, False, True] and not broken.zeroed().inputs[2]['image'].any()
    assert broken.zeroed().inputs[1]['image'] is broken.inputs[1]['image'] and broken.zeroed().finite.all()
    both = broken.joined([part])
    assert [item['height'] for item in both.inputs] == [0, 1, 2, 3, 1, 2] and both.size == 6 and both.target is None
    assert both.finite.tolist() == [True, True, False, True, True, True] or not both.finite[5]
    assert batch.to(torch.device('cpu')) is batch and batch.to(torch.device('meta')).inputs[0]['image'].is_meta


def test_targets_are_selected_with_their_samples() -> None:
    boxes = [{'boxes': torch.rand(number, 4)} for number in range(4)]
    for target in (boxes, tuple(boxes)):
        part = Batch.of((images(4), target)).only(slice(1, 3))
        assert [len(each['boxes']) for each in part.target] == [1, 2]
    part = Batch.of((images(4), tuple(each['boxes'] for each in boxes))).only(slice(1, 3))
    assert [len(each) for each in part.target] == [1, 2]
    by_name = Batch.of((images(4), {'boxes': [each['boxes'] for each in boxes], 'image_id': torch.arange(4)}))
    part = by_name.only(torch.tensor([3, 0]))
    assert [len(each) for each in part.target['boxes']] == [3, 0] and part.target['image_id'].tolist() == [3, 0]
    assert Batch.of((images(4), ('a', 'b', 'c', 'd'))).only(slice(1, 3)).target == ['b', 'c']
    mixed = Batch.of((images(4), (torch.arange(4), torch.arange(4), 0.3))).only(slice(2)).target
    assert mixed[0].tolist() == mixed[1].tolist() == [0, 1] and mixed[2] == 0.3

'''The start of relevance for detectors, against boxes that are written out.'''
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import images, seeded
from torch import nn

import zennit_prune as zp
from zennit_prune.relevance import detections


def test_boxes_behind_one_another() -> None:
    '''YOLO: numbers last, four coordinates, an objectness and classes, as logits.'''
    output = torch.full((1, 3, 8), -9.0)
    output[..., :4] = 100.0
    output[0, 0, 4], output[0, 0, 6] = 4.0, 3.0
    output[0, 1, 4], output[0, 1, 7] = 4.0, 5.0
    output[0, 2, 4], output[0, 2, 5] = -4.0, 9.0
    start = detections(slice(5, None), objectness=4, boxes=2)(output)
    assert start.nonzero().tolist() == [[0, 0, 4], [0, 0, 6], [0, 1, 4], [0, 1, 7]] and start.sum() == 4
    assert detections(slice(4, None), objectness=4, boxes=2)(output).equal(start)  # objectness is no class


def test_numbers_before_boxes() -> None:
    '''YOLO without objectness: (batch, 4 + classes, boxes), as probabilities.'''
    output = torch.rand(2, 6, 7)
    start = detections(slice(4, None), 1, boxes=1)(output)
    for sample in range(2):
        best = output[sample, 4:].flatten().argmax()
        assert start[sample].sum() == 1 and start[sample, 4:].flatten()[best] == 1


def test_anchors_in_one_dimension() -> None:
    '''(batch, anchors * numbers, H, W) equals the same boxes one after the other.'''
    rows = torch.randn(2, 3, 7, 4, 5)
    options: dict[str, Any] = {'objectness': 4, 'boxes': 6}
    start = detections(slice(5, None), 1, anchors=3, **options)(rows.flatten(1, 2))
    boxes = rows.permute(0, 3, 4, 1, 2).reshape(2, 60, 7)
    expected = detections(slice(5, None), **options)(boxes)
    assert torch.equal(start.reshape(2, 3, 7, 4, 5).permute(0, 3, 4, 1, 2).reshape(2, 60, 7), expected)
    assert start.sum() == 2 * 6 * 2


def test_coordinates_of_the_chosen_boxes_share_what_starts_there() -> None:
    output = torch.tensor([[[3.0, -1.0, 0.0, 4.0, 5.0, 9.0, 1.0], [7.0, 7.0, 7.0, 7.0, 2.0, 0.0, 1.0]]])
    start = detections(slice(5, None), objectness=4, coordinates=slice(4), boxes=1)(output)
    assert start.tolist() == [[[0.375, -0.125, 0, 0.5, 1, 1, 0], [0] * 7]]
    assert detections(coordinates=slice(4), objectness=4, boxes=1)(output.half()).float().equal(start)
    assert start[..., 4:].equal(detections(slice(5, None), objectness=4, boxes=1)(output)[..., 4:])


def test_queries_with_a_last_class_for_nothing() -> None:
    output = torch.tensor([[[1.0, 2.0, 9.0], [3.0, 0.0, -1.0]]])
    assert detections(slice(0, -1), boxes=1)(output).tolist() == [[[0, 0, 0], [1, 0, 0]]]
    assert detections(slice(0, -1), boxes=99)(output).tolist() == [[[0, 1, 0], [1, 0, 0]]]


@pytest.mark.parametrize('options,shape,message', [
    ({'scores': 3}, None, 'scores=3 is no slice'), ({'anchors': 0}, None, 'anchors=0: give a whole number from 1 on'),
    ({'coordinates': 4}, None, 'coordinates=4 is no slice'),
    ({'boxes': 1.5}, None, 'boxes=1.5 is no whole number'), ({'dim': None}, None, 'dim=None is no whole number'),
    ({'objectness': True}, None, 'objectness=True'), ({'dim': 0}, (2, 3, 4), r'dim=0 holds no boxes.*\(2, 3, 4\)'),
    ({}, (2, 3), 'holds no boxes'), ({'dim': 4}, (2, 3, 4), 'dim=4 holds no boxes'),
    ({'anchors': 3, 'dim': 1}, (2, 4, 5, 5), 'anchors=3 does not divide dimension 1'),
    ({'scores': slice(5, None)}, (2, 3, 4), r'scores=slice\(5, None, None\) is not among the 4 numbers'),
    ({'coordinates': slice(20, 24)}, (2, 3, 4), r'coordinates=slice\(20, 24, None\) is not among'),
    ({'scores': slice(1), 'coordinates': slice(4)}, (2, 3, 7), r'scores=slice\(None, 1, None\) is not among'),
    ({'objectness': 4}, (2, 3, 4), 'objectness=4 is not among the 4')])
def test_what_does_not_fit_is_refused(options: dict[str, Any], shape: Any, message: str) -> None:
    with pytest.raises(zp.PruneError, match=message):
        detections(**options)(torch.zeros(shape))


def test_scales_are_joined_as_the_docs_say() -> None:
    classes, levels = 3, [torch.randn(2, 3 * 8, side, side) for side in (4, 2)]
    page = (Path(__file__).resolve().parents[2] / 'docs' / 'starts.md').read_text()
    line = next(line for line in page.splitlines() if 'unflatten' in line)
    joined = eval(line.strip().removeprefix('output='), {'torch': torch, 'C': classes})(levels)
    assert joined.shape == (2, 3 * (16 + 4), 5 + classes)
    assert torch.equal(joined[1, 16 + 5], levels[0][1, 8:16, 1, 1])  # the second anchor
    assert torch.equal(joined[0, 48], levels[1][0, :8, 0, 0])


def test_a_detector_is_pruned_without_labels() -> None:
    '''Relevance starts at scores; targets of any form are passed by; settings tell starts apart in checkpoints.'''
    model = seeded(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(8, 14, 1)))
    pruner = zp.Pruner(model, None, images(2), progress=False)
    start = detections(slice(5, None), 1, objectness=4, anchors=2, boxes=2)
    found = pruner.collect([images(4)], initial=start)
    loader = [(images(4), [{'boxes': torch.zeros(1, 4), 'labels': torch.zeros(1)} for _ in range(4)])]
    assert torch.equal(found['0'], pruner.collect(loader, initial=start)['0'])
    assert found.info['initial'] == 'detections'
    with pytest.raises(zp.PruneError, match='cannot be told'):
        pruner.collect([images(4)], target='predicted')
    settings = [pruner.collector(initial=detections(slice(5, None), 1, boxes=boxes)).settings() for boxes in (1, 1, 2)]
    assert settings[0] == settings[1] != settings[2]
    assert pruner.prune(loader, zp.Budget(channels=0.5), initial=start).model[0].out_channels == 4

'''``detections``: the start of relevance for detectors, at the class scores of the boxes that they are surest of.'''
from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from ..errors import PruneError, shown


def detections(scores: slice = slice(None), dim: int = -1, *, objectness: int | None = None,
               coordinates: slice | None = None, anchors: int = 1, boxes: int = 10
               ) -> Callable[[torch.Tensor], torch.Tensor]:
    '''Make a start of relevance for detectors, to be given as ``initial=``.

    Relevance starts at the class scores of the boxes that the network is surest of: 1 at the largest score of each, and
    at its objectness where there is one. With ``coordinates``, it starts at the coordinates of these boxes as well, at
    their values, which are scaled so that their absolute values sum to 1 for each box: without, channels that only
    place boxes get none, and are removed first. No labels are needed. Where a network returns several tensors,
    ``output=`` names the one that holds the scores, or joins them.

    Parameters
    ----------
    scores: slice
        The class scores among the numbers of a box, e.g. ``slice(5, None)`` behind four coordinates and an objectness,
        or ``slice(0, -1)`` before a last class that means no object.
    dim: int
        The dimension of the output that holds the numbers of a box; all others but the first, the batch, count boxes.
    objectness: int, optional
        The position of the objectness among the numbers of a box.
    coordinates: slice, optional
        The coordinates among the numbers of a box, e.g. ``slice(4)``.
    anchors: int
        The number of boxes whose numbers lie one after the other in ``dim``, as in (batch, anchors * numbers, H, W).
    boxes: int
        The number of boxes of each sample at which relevance starts, those of the largest score (times objectness).
        Values within 0 and 1 are read as probabilities, others as logits.

    Returns
    -------
    callable
        A function from the output to the relevance there, of the same shape.

    Raises
    ------
    PruneError
        For arguments of a wrong kind; when it is called, for an output that does not have such boxes.

    Examples
    --------
    Two boxes of four coordinates, an objectness and two classes; the second one is the surest:

    >>> import torch
    >>> from zennit_prune.relevance import detections
    >>> start = detections(slice(5, None), objectness=4, boxes=1)
    >>> start(torch.tensor([[[9., 9., 9., 9., -3., 5., 1.], [9., 9., 9., 9., 2., 0., 1.]]]))
    tensor([[[0., 0., 0., 0., 0., 0., 0.],
             [0., 0., 0., 0., 1., 0., 1.]]])
    '''
    if not isinstance(scores, slice):
        raise PruneError(f'scores={shown(scores)} is no slice: give e.g. slice(5, None), the class scores of a box.')
    if not (coordinates is None or isinstance(coordinates, slice)):
        raise PruneError(f'coordinates={shown(coordinates)} is no slice: give e.g. slice(4), or leave it out.')
    for name, value, least in (('anchors', anchors, 1), ('boxes', boxes, 1), ('dim', dim, None),
                               *([] if objectness is None else [('objectness', objectness, None)])):
        _check_number(name, value, least)
    return _Detections(scores, dim, objectness, coordinates, anchors, boxes)


def _check_number(name: str, value: Any, least: int | None) -> None:
    try:
        number = operator.index(value)
    except TypeError:
        raise PruneError(f'{name}={shown(value)} is no whole number.') from None
    if isinstance(value, bool) or (least is not None and number < least):
        raise PruneError(f'{name}={value!r}: give a whole number{"." if least is None else f" from {least} on."}')


class _Detections:
    '''A function from the output of a detector to the relevance there; its settings tell it from others.'''

    def __init__(self, scores: slice, dim: int, objectness: int | None, coordinates: slice | None, anchors: int,
                 boxes: int):
        self.scores, self.dim, self.objectness, self.coordinates = scores, dim, objectness, coordinates
        self.anchors, self.boxes = anchors, boxes
        self.__name__ = 'detections'

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        output = output.detach()
        dim = self._dimension(output)
        rows = output.movedim(dim, -1).unflatten(-1, (self.anchors, -1))
        start = torch.zeros_like(rows)
        flat, begun = rows.flatten(1, -2), start.flatten(1, -2)  # (batch, boxes, numbers)
        classes = self._positions(flat.shape[-1])
        values, best = _probabilities(flat[..., classes]).max(-1)
        if self.objectness is not None:
            values = values * _probabilities(flat[..., self.objectness])
        chosen = values.topk(min(self.boxes, values.shape[1]), 1).indices
        sample = torch.arange(len(chosen), device=chosen.device).unsqueeze(1)
        if self.coordinates is not None:
            corners = flat[sample, chosen, self.coordinates].float()
            share = corners / corners.abs().sum(-1, keepdim=True).clamp(min=1e-12)
            begun[sample, chosen, self.coordinates] = share.to(flat)
        begun[sample, chosen, classes.to(best.device)[best[sample, chosen]]] = 1
        if self.objectness is not None:
            begun[sample, chosen, self.objectness] = 1
        return begun.reshape(start.shape).flatten(-2).movedim(-1, dim)

    def _dimension(self, output: torch.Tensor) -> int:
        '''Return the dimension that holds the numbers of a box, counted from the first.'''
        dim = self.dim + output.dim() if self.dim < 0 else self.dim
        if not 0 < dim < output.dim() or output.dim() < 3 - (self.anchors > 1):
            raise PruneError(f'dim={self.dim} holds no boxes of an output of shape {tuple(output.shape)}: the first '
                             'dimension is the batch, one holds the numbers of a box, and the others count boxes.')
        if output.shape[dim] % self.anchors:
            raise PruneError(f'anchors={self.anchors} does not divide dimension {dim} of an output of shape '
                             f'{tuple(output.shape)}.')
        return dim

    def _positions(self, numbers: int) -> torch.Tensor:
        '''Return the positions of the class scores among the numbers of a box.'''
        others = set(range(numbers)[self.coordinates or slice(0)])
        if self.objectness is not None and -numbers <= self.objectness < numbers:
            others.add(self.objectness % numbers)
        found = [number for number in range(numbers)[self.scores] if number not in others]
        wrong = '' if found else f'scores={self.scores}'
        if self.objectness is not None and not -numbers <= self.objectness < numbers:
            wrong = f'objectness={self.objectness}'
        if self.coordinates is not None and not range(numbers)[self.coordinates]:
            wrong = f'coordinates={self.coordinates}'
        if wrong:
            raise PruneError(f'{wrong} is not among the {numbers} numbers of a box, beside the others. Name another '
                             'output with output=, or change dim= or anchors=.')
        return torch.tensor(found, dtype=torch.int64, device='cpu')


def _probabilities(values: torch.Tensor) -> torch.Tensor:
    return values if bool(((values >= 0) & (values <= 1)).all()) else values.sigmoid()

'''How far a pruned network explains its answers as the original does, image by image.'''
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from zennit.core import Composite

from ..errors import PruneError
from ..relevance._initial import Initial, initial_relevance
from ..relevance._relevance import spearman
from ..util._display import table
from ._heatmap import explained


@dataclass(frozen=True, eq=False)
class Agreement:
    '''Heatmaps of N images before and after, and how they compare; print it for a table. Tensors are on the CPU.

    Attributes
    ----------
    cosine: torch.Tensor
        float64, shape (N,): the cosine of the angle between the two heatmaps; 1 where they are equal, 0 where only one
        is zero.
    rank: torch.Tensor
        float64, shape (N,): Spearman's rank correlation of their pixels.
    same: torch.Tensor
        bool, shape (N,): whether both networks predict the same class; where there is one for each position
        (segmentation), at all of them; always, where the output is a single number.
    predicted: tuple of torch.Tensor
        int64, shape (N,) or (N, ...): the class of the largest output, before and after.
    moved: torch.Tensor
        float64, shape (N,), from 0 to 1: the relevance that moved, half of the sum of ``|after - before|`` where each
        heatmap is divided by its absolute mass. 1 is all of it, elsewhere or to the other sign.
    before, after, difference: torch.Tensor
        Shape (N, H, W): the heatmaps, and after minus before.
    scale: torch.Tensor
        Shape (N,): the largest absolute value in the three heatmaps of an image, to draw them alike.
    order: torch.Tensor
        int64, shape (N,): the images, those first whose prediction stays while most of the relevance moves; after them,
        those whose prediction changes, likewise.
    '''

    cosine: torch.Tensor
    rank: torch.Tensor
    same: torch.Tensor
    predicted: tuple[torch.Tensor, torch.Tensor]
    moved: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    difference: torch.Tensor
    scale: torch.Tensor
    order: torch.Tensor

    def __str__(self) -> str:
        before, after = self.predicted
        rows = []
        for image in self.order.tolist():
            classes = (int(before[image]), int(after[image])) if before.dim() == 1 else ('per position',) * 2
            rows.append((image, *classes, 'yes' if self.same[image] else 'no', f'{float(self.cosine[image]):.2f}',
                         f'{float(self.rank[image]):.2f}', f'{float(self.moved[image]):.0%}'))
        stay = int(self.same.sum())
        return '\n'.join([table(('image', 'before', 'after', 'same', 'cosine', 'rank', 'moved'), rows), '',
                          f'{stay} of {len(self.same)} predictions stay; medians: cosine '
                          f'{float(self.cosine.median()):.2f}, rank {float(self.rank.median()):.2f}, moved '
                          f'{float(self.moved.median()):.0%}'])

    def __repr__(self) -> str:
        return (f'Agreement({len(self.same)} images, {int(self.same.sum())} predictions stay, median cosine '
                f'{float(self.cosine.median()):.2f})')


def agreement(model: nn.Module, changed: nn.Module, composite: Composite | None, x: Any, target: Any = 'predicted',
              initial: Initial = 'one-hot') -> Agreement:
    '''Compare the heatmaps of a network with those of a masked, pruned or repaired version of it.

    Parameters
    ----------
    model, changed: torch.nn.Module
        The original and the other network; both are copied, never changed.
    composite: zennit.core.Composite or None
        The rules; None for the recommended ones. For a rule that ignores weights (``Flat``) inside the network, give
        the pruned network rather than the masked one.
    x: torch.Tensor, tuple or dict
        The inputs, shape (N, C, H, W).
    target, initial:
        See :func:`zennit_prune.initial.initial_relevance`. Where relevance starts, and how much, is taken from the
        original for both networks: ``'predicted'`` is the original's prediction, ``'logit'`` its logit, and functions
        see its output. For a regression, give a function.

    Returns
    -------
    Agreement

    Raises
    ------
    PruneError
        If the outputs of the two differ in shape; otherwise as :func:`zennit_prune.heatmap`.
    '''
    started: list[torch.Tensor] = []

    def start(output: torch.Tensor) -> torch.Tensor:
        started.append(initial_relevance(output, target, initial))
        return started[0]

    def again(output: torch.Tensor) -> torch.Tensor:
        if output.shape != started[0].shape:
            raise PruneError(f'the networks cannot be compared: their outputs have shapes {tuple(started[0].shape)} '
                             f'and {tuple(output.shape)}. Give the original and a pruned or masked version of it.')
        return started[0].to(output)

    before, output = explained(model, composite, x, start)
    after, output_after = explained(changed, composite, x, again)
    if before.dim() < 2:
        raise PruneError(f'the heatmaps have shape {tuple(before.shape)}: give a batch of inputs, the samples first.')
    predicted = _predicted(output), _predicted(output_after)
    same = (predicted[0] == predicted[1]).reshape(len(before), -1).all(1)
    difference = after - before
    left, right = before.double().flatten(1), after.double().flatten(1)
    moved = _moved(left, right)
    order = torch.argsort(moved + 2 * same, descending=True, stable=True)
    scale = torch.stack([maps.flatten(1).abs().amax(1) for maps in (before, after, difference)]).amax(0)
    return Agreement(_cosine(left, right), _rank(left, right), same, predicted, moved, before, after, difference, scale,
                     order)


def _predicted(output: torch.Tensor) -> torch.Tensor:
    output = output.detach().cpu()
    return (output.unsqueeze(1) if output.dim() == 1 else output).argmax(1)


def _cosine(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    '''Each row over its largest value first: squares of small relevance are too small for a float.'''
    left, right = (rows / rows.abs().amax(1, keepdim=True).clamp(min=1e-300) for rows in (left, right))
    cosine = (left * right).sum(1) / (left.norm(dim=1) * right.norm(dim=1)).clamp(min=1e-300)
    return torch.where((left == right).all(1), 1.0, cosine.clamp(-1, 1))


def _rank(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.tensor([1.0 if torch.equal(*pair) else spearman(*pair) for pair in zip(left, right)],
                        dtype=torch.float64, device='cpu')


def _moved(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    mass = [rows.abs().sum(1, keepdim=True) for rows in (left, right)]
    shares = [rows / total.clamp(min=1e-300) for rows, total in zip((left, right), mass)]
    moved = (shares[1] - shares[0]).abs().sum(1) / 2
    return torch.where((mass[0] > 0).flatten() == (mass[1] > 0).flatten(), moved, 1.0).clamp(0, 1)

'''Compare the heatmaps of a network before and after pruning, image by image.'''
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import PruneError, names_options
from ..relevance._attribute import Rules
from ..relevance._initial import Initial, Origin
from ..relevance._outputs import Output, check_output
from ..relevance._relevance import spearman
from ..util._display import table
from ..util._networks import unwrapped
from ._heatmap import explained


@dataclass(frozen=True, eq=False)
class Agreement:
    '''Heatmaps of N images before and after pruning, and how they compare; print it for a table.

    All tensors are on the CPU.

    Attributes
    ----------
    cosine: torch.Tensor
        The cosine of the angle between the two heatmaps, float64, shape (N,): 1 where they are equal, 0 where only one
        of them is zero.
    rank: torch.Tensor
        Spearman's rank correlation of the pixels of the two heatmaps, float64, shape (N,).
    same: torch.Tensor
        Whether both networks predict the same class, bool, shape (N,). With one class for each position
        (segmentation), whether all of them are the same; always true for a regression, a single column whose relevance
        starts at its value or as a function says.
    predicted: tuple of torch.Tensor
        The class of the largest output, before and after, int64, shape (N,) or (N, ...).
    total_variation: torch.Tensor
        The total variation distance of the two heatmaps, float64, shape (N,), from 0 to 1: half of the L1 norm of
        their difference, where each is divided by its L1 norm. At 1, all relevance is at other pixels or of the other
        sign.
    before, after, difference: torch.Tensor
        The heatmaps, and after minus before, shape (N, H, W).
    scale: torch.Tensor
        The largest absolute value in the three heatmaps of an image, shape (N,), to draw them on one scale.
    order: torch.Tensor
        The numbers of the images, int64, shape (N,): those with the same prediction by descending ``total_variation``,
        then those with another prediction, in this order as well.

    See Also
    --------
    agreement : Computes it.

    Examples
    --------
    >>> import torch
    >>> import zennit_prune as zp
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    >>> found = zp.agreement(model, model, None, torch.randn(3, 1, 4, 4))
    >>> found
    Agreement(3 images, 3 predictions stay, median cosine 1.00)
    >>> found.same.tolist(), found.total_variation.tolist()
    ([True, True, True], [0.0, 0.0, 0.0])
    '''

    cosine: torch.Tensor
    rank: torch.Tensor
    same: torch.Tensor
    predicted: tuple[torch.Tensor, torch.Tensor]
    total_variation: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    difference: torch.Tensor
    scale: torch.Tensor
    order: torch.Tensor

    @property
    def staying(self) -> torch.Tensor:
        '''The share of an image's predictions, one or one for each position, that stay, float32, shape (N,).'''
        before, after = self.predicted
        return (before == after).reshape(len(before), -1).float().mean(1)

    @property
    def stay(self) -> str:
        '''How many predictions stay, in words.'''
        if self.predicted[0].dim() == 1:
            return f'{int(self.same.sum()):,} of {len(self.same):,} predictions stay'
        return f'{float(self.staying.mean()):.1%} of the predicted positions stay'

    def __str__(self) -> str:
        before, after = self.predicted
        rows = []
        for image in self.order.tolist():
            classes = (int(before[image]), int(after[image])) if before.dim() == 1 else ('per position',) * 2
            same = ('yes' if self.same[image] else 'no') if before.dim() == 1 else f'{float(self.staying[image]):.0%}'
            rows.append((image, *classes, same, f'{float(self.cosine[image]):.2f}',
                         f'{float(self.rank[image]):.2f}', f'{float(self.total_variation[image]):.0%}'))
        return '\n'.join([table(('image', 'before', 'after', 'same', 'cosine', 'rank', 'total variation'), rows), '',
                          f'{self.stay}; medians: cosine '
                          f'{float(self.cosine.median()):.2f}, rank {float(self.rank.median()):.2f}, total variation '
                          f'{float(self.total_variation.median()):.0%}'])

    def __repr__(self) -> str:
        stay = self.stay.replace(f' of {len(self.same)}', '')
        return f'Agreement({len(self.same)} images, {stay}, median cosine {float(self.cosine.median()):.2f})'


@names_options()
def agreement(model: nn.Module, small: nn.Module, composite: Rules | None, x: Any, target: Any = 'predicted',
              initial: Initial = 'one-hot', *, output: Output = None) -> Agreement:
    '''Compare the heatmaps of a network with those of a masked, pruned or repaired version of it.

    Parameters
    ----------
    model: torch.nn.Module
        The original network; it is copied, never changed.
    small: torch.nn.Module
        The network to compare with it; it is copied, never changed.
    composite: zennit.core.Composite, Preset or None
        The rules, or a preset for its rules; None for the recommended ones. For a rule that ignores weights (``Flat``)
        inside the network, give the pruned network rather than the masked one.
    x: torch.Tensor, tuple or dict
        The inputs, shape (N, C, H, W).
    target: torch.Tensor, callable or ``'predicted'``
        The classes that relevance starts at, shape (N,) or as in :func:`zennit_prune.heatmap`. ``'predicted'`` is the
        prediction of the original, for both networks.
    initial: str or callable
        The relevance at the target, as in :func:`zennit_prune.heatmap`. It is computed from the output of the original
        for both networks: ``'logit'`` is the original's logit, and functions are called with its output. For a
        regression, give ``'value'``.
    output: int, str or callable, optional
        The output that relevance starts from, where the networks return several tensors; see
        :func:`zennit_prune.heatmap`.

    Returns
    -------
    Agreement
        The heatmaps, their cosines, rank correlations and total variation distances, and the predictions.

    Raises
    ------
    PruneError
        If one of the two is no network, the second has more parameters than the first, their outputs differ in shape,
        inputs or targets do not fit, or relevance is not finite.

    See Also
    --------
    heatmap : Computes the heatmaps of one network.
    heatmap_image : Draws heatmaps.
    report : Shows heatmaps of two networks in an HTML page.

    Examples
    --------
    >>> import torch
    >>> import zennit_prune as zp
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
    ...                             torch.nn.Linear(144, 2))
    >>> x = torch.randn(3, 1, 8, 8)
    >>> plan = zp.Plan(zp.trace(model, x), {'0': [1]})
    >>> found = zp.agreement(model, plan.apply(model), None, x)
    >>> found.cosine.shape, found.before.shape
    (torch.Size([3]), torch.Size([3, 8, 8]))
    '''
    if not isinstance(small, nn.Module):
        raise PruneError(f'small is {type(small).__name__}, not a network: call agreement(model, small, composite, x).')
    sizes = [sum(parameter.numel() for parameter in unwrapped(network).parameters()) for network in (model, small)]
    if sizes[1] > sizes[0]:
        raise PruneError(f'the networks are given in the other order: the first one has {sizes[0]:,} parameters, the '
                         f'second one {sizes[1]:,}. The order is agreement(model, small, composite, x): the original '
                         'first.')
    check_output(output)
    origin = Origin(target, initial, output, inputs=x)
    before, started, predicted_before = explained(model, composite, x, origin)

    def again(after: torch.Tensor) -> torch.Tensor:
        if after.shape != started.shape:
            raise PruneError(f'the networks cannot be compared: their outputs have shapes {tuple(started.shape)} '
                             f'and {tuple(after.shape)}. Give the original and a pruned or masked version of it.')
        return started.to(after)

    after, _, predicted_after = explained(small, composite, x, Origin(again, output=output), classes=origin)
    if before.dim() < 2:
        raise PruneError(f'the heatmaps have shape {tuple(before.shape)}: give a batch of inputs, the samples first.')
    predicted = predicted_before.cpu(), predicted_after.cpu()
    same = (predicted[0] == predicted[1]).reshape(len(before), -1).all(1)
    difference = after - before
    left, right = before.double().flatten(1), after.double().flatten(1)
    variation = _total_variation(left, right)
    order = torch.argsort(variation + 2 * same, descending=True, stable=True)
    scale = torch.stack([maps.flatten(1).abs().amax(1) for maps in (before, after, difference)]).amax(0)
    return Agreement(_cosine(left, right), _rank(left, right), same, predicted, variation, before, after, difference,
                     scale, order)


def _cosine(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    '''Return the cosine between rows, each divided by its largest value first: squares of small numbers underflow.'''
    left, right = (rows / rows.abs().amax(1, keepdim=True).clamp(min=1e-300) for rows in (left, right))
    cosine = (left * right).sum(1) / (left.norm(dim=1) * right.norm(dim=1)).clamp(min=1e-300)
    return torch.where((left == right).all(1), 1.0, cosine.clamp(-1, 1))


def _rank(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    '''Return Spearman's rank correlation between rows; 1 for equal rows, constant ones included.'''
    return torch.tensor([1.0 if torch.equal(*pair) else spearman(*pair) for pair in zip(left, right)],
                        dtype=torch.float64, device='cpu')


def _total_variation(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    '''Return the total variation distance between rows, each divided by its L1 norm; 1 where only one is zero.'''
    norms = [rows.abs().sum(1, keepdim=True) for rows in (left, right)]
    shares = [rows / total.clamp(min=1e-300) for rows, total in zip((left, right), norms)]
    distance = (shares[1] - shares[0]).abs().sum(1) / 2
    return torch.where((norms[0] > 0).flatten() == (norms[1] > 0).flatten(), distance, 1.0).clamp(0, 1)

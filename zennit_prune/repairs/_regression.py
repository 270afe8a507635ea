'''Ridge regression from streamed covariances, with the ridge chosen by cross-validation.

The unknown is a *change* of weights, so that a ridge shrinks towards the weights that are there.
'''
from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

FOLDS = 6
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e3)  # over the mean variance of the features
FIRST_RIDGE = 0.1  # where the search for the best ridge of a network's first layer begins
SINGLE_INPUT_RIDGE = 1.0
TINY = 1e-10  # nearly no ridge, for features that determine the outputs without noise
LEFT = 1e-8  # a tiny ridge is used only where a smaller share of the squared error is left in held-out folds


@dataclass
class Change:
    '''A change of weights and biases.

    Attributes
    ----------
    weight: torch.Tensor
        The change of the weights, shape (groups, features, outputs).
    bias: torch.Tensor
        The change of the biases, shape (groups, outputs).
    ridge: float
        The ridge that cross-validation chose.
    gain: float
        The share of the squared error in held-out folds that the change removes.
    '''

    weight: torch.Tensor
    bias: torch.Tensor
    ridge: float
    gain: float


class Moments:
    '''Sums of products of features and errors, by fold, in float64.

    Parameters
    ----------
    intercept: bool
        Whether the layer has a bias that can change.
    width: int, optional
        The number of features that the variance is spread over, where these are a basis of more.
    '''

    def __init__(self, intercept: bool = True, width: int | None = None):
        self.intercept, self.width = intercept, width
        self._shift: torch.Tensor | float = 0.0
        self._folds: dict[int, list[torch.Tensor]] = {}

    def add(self, fold: int, features: torch.Tensor, errors: torch.Tensor) -> None:
        '''Add samples: ``features`` (groups, features, samples) and ``errors`` (groups, outputs, samples).'''
        if self.intercept:  # products of values far from zero would hide their variance
            if not self._folds:
                self._shift = features.mean(2, keepdim=True)
            features = features - self._shift
        count = torch.tensor(float(features.shape[2]), dtype=torch.float64, device=features.device)
        sums = [_gram(features), features @ errors.mT, features.sum(2), errors.sum(2), errors.square().sum(2)]
        terms = [*(term.double() for term in sums), count]
        held = self._folds.get(fold)
        self._folds[fold] = terms if held is None else [old + new for old, new in zip(held, terms)]

    def solve(self, ridges: tuple[float, ...] = RIDGES, guess: float = FIRST_RIDGE) -> Change | None:
        '''Return the change that is best in held-out folds; None if no change is better than none.

        The search for the best of ``ridges`` starts at a ``guess``: layers that follow each other are alike. A single
        input holds out nothing: its ridge is fixed.
        '''
        folds = sorted(self._folds)
        for sums in self._folds.values():
            sums[0] = sums[0].tril() + sums[0].tril(-1).mT
        total = self._total(folds)
        nothing = float(total[4].sum())
        if not nothing > 0:
            return None
        total_fit = _Fit(total, self.intercept, self.width)
        if len(folds) == 1:  # a single image: nothing is held out
            return self._change(total_fit, SINGLE_INPUT_RIDGE, 1.0)
        fits = [(self._folds[fold], _Fit(self._total([other for other in folds if other != fold]), self.intercept,
                                         self.width)) for fold in folds]

        @cache
        def error(ridge: float) -> float:
            return sum(_error(held, *fit(ridge)) for held, fit in fits)

        best = _descend(error, ridges, guess)
        if ridges and best == ridges[0] and error(TINY) <= LEFT * nothing:
            best = TINY
        best = min(best, float('inf'), key=error)
        gain = 1 - error(best) / nothing
        return self._change(total_fit, best, gain) if gain > 0 else None

    def _change(self, fit: _Fit, ridge: float, gain: float) -> Change:
        weight, bias = fit(ridge)
        return Change(weight, bias - (weight * self._shift).sum(1), ridge, gain)

    def _total(self, folds: list[int]) -> list[torch.Tensor]:
        return [torch.stack(terms).sum(0) for terms in zip(*(self._folds[fold] for fold in folds))]


def _gram(features: torch.Tensor) -> torch.Tensor:
    '''Return the products of features with each other; above the diagonal, some are missing.'''
    width = features.shape[1]
    products = features.new_zeros(len(features), width, width)
    size = max(width // 4, 64)
    for start in range(0, width, size):
        rows = slice(start, start + size)
        products[:, rows, :start + size] = features[:, rows] @ features[:, :start + size].mT
    return products


def _descend(error: Callable[[float], float], ridges: Sequence[float], guess: float) -> float:
    '''Return the ridge of the smallest error, descending from a guess; infinity without ridges.'''
    if not ridges:
        return float('inf')
    at = max(bisect(ridges, guess) - 1, 0)
    for step in (-1, 1):
        while 0 <= at + step < len(ridges) and error(ridges[at + step]) < error(ridges[at]):
            at += step
    return ridges[at]


class _Fit:
    '''The best change for any ridge.'''

    def __init__(self, moments: list[torch.Tensor], intercept: bool, width: int | None):
        products, cross, feature, error, _, count = moments
        self.intercept = intercept
        self.feature, self.error = feature / count, error / count
        if intercept:
            products = products - count * self.feature.unsqueeze(2) * self.feature.unsqueeze(1)
            cross = cross - count * self.feature.unsqueeze(2) * self.error.unsqueeze(1)
        self.products, self.cross = products, cross
        variances = products.diagonal(dim1=1, dim2=2)
        self.scale = (variances.sum() / (len(variances) * (width or variances.shape[1] or 1))).clamp(min=1e-30)

    def __call__(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        weight = torch.zeros_like(self.cross)
        if ridge < float('inf'):
            damped = self.products.clone()
            damped.diagonal(dim1=1, dim2=2).add_(ridge * self.scale)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not failed.any():
                weight = torch.cholesky_solve(self.cross, factor)
        if not self.intercept:
            return weight, torch.zeros_like(self.error)
        return weight, self.error - (weight * self.feature.unsqueeze(2)).sum(1)


def _error(moments: list[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor) -> float:
    '''Return the squared error that is left.'''
    products, cross, feature, error, square, count = moments
    explained = (weight * (products @ weight)).sum(1) - 2 * (weight * cross).sum(1)
    shifted = count * bias ** 2 - 2 * bias * error + 2 * bias * (weight * feature.unsqueeze(2)).sum(1)
    return float((square + explained + shifted).sum())

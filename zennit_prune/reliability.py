'''How far a ranking of channels depends on the samples it was collected from.'''
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from .errors import PruneError


@dataclass(frozen=True)
class Reliability:
    '''The split-half reliability of a ranking, from Spearman's rank correlation between halves of the samples.

    Attributes
    ----------
    groups: dict of str to float
        The correlation within each group of at least two channels; 1 is a ranking that does not change, 0 is chance.
    network: float
        The correlation over all channels of all groups together, the ranking that a plan draws on.
    samples: int
        How many samples there are; a half has half of them.
    '''

    groups: Mapping[str, float]
    network: float
    samples: int

    @classmethod
    def of(cls, halves: Mapping[str, torch.Tensor], samples: int) -> Reliability:
        '''From the scores of two halves by group, shape (2, channels).'''
        return cls({name: spearman(*values) for name, values in halves.items() if values.shape[1] > 1},
                   spearman(*torch.cat(list(halves.values()), 1)), samples)

    @property
    def full(self) -> float:
        '''The correlation to expect between the scores of all samples and those of as many others (Spearman-Brown).'''
        return 2 * self.network / (1 + self.network) if self.network > 0 else self.network

    def needed(self, correlation: float = 0.95) -> int | None:
        '''About how many samples would reach a correlation (Spearman-Brown); None where the halves do not agree.

        Raises
        ------
        PruneError
            If the correlation is not between 0 and 1.
        '''
        if not 0 < correlation < 1:
            raise PruneError(f'correlation={correlation!r} is out of reach: ask for one between 0 and 1.')
        if self.network <= 0:
            return None
        lengthening = correlation * (1 - self.network) / (self.network * (1 - correlation))
        return max(1, math.ceil(lengthening * self.samples / 2))

    def __str__(self) -> str:
        needed = self.needed()
        return (f'ranking of the whole network: {self.network:.2f} between halves of {self.samples // 2} references; '
                + ('how many would reach 0.95 cannot be told' if needed is None
                   else f'about {needed:,} would reach 0.95'))

    def to_dict(self) -> dict[str, Any]:
        '''JSON values, for :meth:`from_dict`.'''
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any, source: str) -> Reliability:
        '''The inverse of :meth:`to_dict`.

        Raises
        ------
        PruneError
            If the data are something else.
        '''
        try:
            groups = {str(name): float(value) for name, value in data['groups'].items()}
            return cls(groups, float(data['network']), int(data['samples']))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PruneError(f'{source!r} holds a damaged "reliability" ({error!r}): leave it out.') from error


def spearman(left: torch.Tensor, right: torch.Tensor) -> float:
    '''Spearman's rank correlation, with average ranks for ties; 0 where one side is constant.'''
    ranks = [_ranks(values.numpy()) for values in (left, right)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: Any) -> Any:
    '''The rank of each value; equal values share the mean of their ranks.'''
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + last - 1) / 2.0)[inverse]

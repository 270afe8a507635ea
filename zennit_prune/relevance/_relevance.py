'''``Relevance``: one score for every channel of every group, with what it takes to judge and to keep it.

How far a ranking of channels depends on the samples it was collected from.
'''
from __future__ import annotations

import json
import math
import os
from collections.abc import ItemsView, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..errors import PruneError
from ..util._display import Table, panel, table
from ..util._files import read_tensors, write_tensors
from ..util._plots import KEPT, finished, new_figure, without_mathematics
from ._exemplars import Best, Exemplars


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


FORMAT = 'zennit_prune relevance'

PANELS = 5  # in a row


class Relevance:
    '''Scores of channels by group; higher is kept.

    Parameters
    ----------
    scores: mapping of str to torch.Tensor
        For each group name, one finite number per channel of the group.
    halves: mapping of str to torch.Tensor, optional
        The scores from the even and from the odd samples alone, shape (2, channels), for :meth:`stability`.
    info: mapping, optional
        How the scores came about, as JSON values.
    exemplars: Exemplars, optional
        The samples that matter most to each channel.

    Raises
    ------
    PruneError
        If scores are not one-dimensional or not finite.
    '''

    def __init__(self, scores: Mapping[str, Any], halves: Mapping[str, torch.Tensor] | None = None,
                 info: Mapping[str, Any] | None = None, exemplars: Exemplars | None = None):
        self._scores: dict[str, torch.Tensor] = {}
        if not isinstance(scores, Mapping):
            raise PruneError(f'scores are given by group name, a dict, not a {type(scores).__name__}.')
        for name, values in scores.items():
            if values is None:
                raise PruneError(f'there are no scores for group {name!r}: leave it out to keep it whole.')
            values = torch.as_tensor(values, device='cpu').detach().to(torch.float64, copy=True).contiguous()
            if values.dim() != 1:
                raise PruneError(f'scores of group {name!r} have shape {tuple(values.shape)}: give one number per '
                                 'channel.')
            if not torch.isfinite(values).all():
                where = torch.nonzero(~torch.isfinite(values)).flatten()[:5].tolist()
                raise PruneError(f'scores of group {name!r} are not finite at positions {where}.')
            self._scores[name] = values
        self._halves = {name: values.detach().to('cpu', torch.float64) for name, values in (halves or {}).items()}
        self.info: dict[str, Any] = dict(info or {})
        self.exemplars = exemplars

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._scores:
            raise PruneError(f'there are no scores for {name!r}. Groups with scores: '
                             f'{", ".join(self._scores) or "none"}.')
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def __contains__(self, name: object) -> bool:
        return name in self._scores

    def items(self) -> ItemsView[str, torch.Tensor]:
        '''Pairs of group name and scores.'''
        return self._scores.items()

    def stability(self) -> dict[str, float]:
        '''How far the ranking depends on the samples: Spearman's rank correlation of the scores from two halves.

        Returns
        -------
        dict of str to float
            For each group with at least two channels; 1 is a ranking that does not change, 0 is chance.

        Raises
        ------
        PruneError
            If the scores were not collected from at least two samples.
        '''
        return dict(self.reliability().groups)

    def reliability(self) -> Reliability:
        '''The same for the whole network, and how many samples would be enough.

        Raises
        ------
        PruneError
            As :meth:`stability`.
        '''
        if not self.has_halves:
            raise PruneError('stability needs relevance collected from at least two samples.')
        return Reliability.of(self._halves, self.info['samples'])

    @property
    def has_halves(self) -> bool:
        '''Whether the scores were collected from at least two samples, so that halves of these can be compared.'''
        return bool(self._halves) and self.info.get('samples', 0) > 1

    def save(self, path: str | os.PathLike[str]) -> None:
        '''Write everything to one safetensors file, without code.'''
        tensors = {f'scores.{name}': values for name, values in self._scores.items()}
        tensors.update({f'halves.{name}': values for name, values in self._halves.items()})
        metadata = {'info': json.dumps(self.info)}
        if self.exemplars is not None:
            metadata['exemplars'] = self.exemplars.best.to_json()
            tensors.update({f'exemplars.{name}': values for name, values in self.exemplars.best.tensors().items()})
        write_tensors(path, tensors, metadata, FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Relevance:
        '''Read what :meth:`save` wrote.

        Raises
        ------
        PruneError
            If the file is something else.
        '''
        tensors, metadata = read_tensors(path, FORMAT)
        parts: dict[str, dict[str, torch.Tensor]] = {'scores': {}, 'halves': {}, 'exemplars': {}}
        for key, values in tensors.items():
            kind, _, name = key.partition('.')
            if kind not in parts:
                raise PruneError(f'{os.fspath(path)!r} is no {FORMAT}: it holds a tensor {key!r}.')
            parts[kind][name] = values
        text = metadata.get('exemplars')
        exemplars = Exemplars(Best.load(text, parts['exemplars'], os.fspath(path))) if text is not None else None
        return cls(parts['scores'], parts['halves'], json.loads(metadata.get('info', '{}')), exemplars)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        '''Draw the scores of every group in ascending order.

        Parameters
        ----------
        path: path-like, optional
            Where to write the picture; its suffix says of what kind.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        PruneError
            Without matplotlib.
        '''
        return _plotted(self, path)

    def _table(self) -> Table:
        stability = self.stability() if self.has_halves else {}
        rows = [(name, len(values), float(values.min()), float(values.median()), float(values.max()),
                 f'{stability[name]:.2f}' if name in stability else '') for name, values in self._scores.items()]
        return ('group', 'channels', 'least', 'median', 'most', 'stability'), rows

    def __str__(self) -> str:
        return table(*self._table())

    def _repr_html_(self) -> str:
        return panel(repr(self), [self._table()])

    def __repr__(self) -> str:
        how = ', '.join(f'{key}={value!r}' for key, value in self.info.items())
        channels = sum(map(len, self._scores.values()))
        return f'Relevance({channels} channels of {len(self)} groups{", " * bool(how)}{how})'


def _plotted(relevance: Relevance, path: str | os.PathLike[str] | None = None) -> Any:
    '''A panel for every group: its scores in ascending order.'''
    scores: Mapping[str, Any] = dict(relevance.items())
    wide = min(PANELS, len(scores) or 1)
    high = math.ceil((len(scores) or 1) / wide)
    figure = new_figure(path, (2.2 * wide, 1.5 * high + 0.3))
    panels = figure.subplots(high, wide, squeeze=False).flatten()
    for axes, (name, values) in zip(panels, scores.items()):
        ordered = values.sort().values.numpy()
        axes.fill_between(np.arange(len(ordered) + 1), np.append(ordered, ordered[-1]), step='post', color=KEPT)
        axes.set_title(without_mathematics(name), fontsize=7)
        axes.tick_params(labelsize=6)
        axes.set_xlim(0, len(ordered))
    for axes in panels[len(scores):]:
        axes.set_axis_off()
    figure.supxlabel('channels, least relevant first', fontsize=8)
    return finished(figure, panels, path)

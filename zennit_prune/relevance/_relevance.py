'''``Relevance``: one score for every channel of every group; ``Reliability``: how far its ranking can be trusted.'''
from __future__ import annotations

import json
import math
import os
from collections.abc import ItemsView, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..errors import PruneError, names_options, shown
from ..util._display import KEPT, Table, finished, new_figure, panel, table, without_mathematics
from ..util._files import read_tensors, write_tensors
from ._exemplars import Best, Exemplars

FORMAT = 'zennit_prune relevance'
PANELS = 5  # in a row


@dataclass(frozen=True)
class Reliability:
    '''The split-half rank correlation of scores: Spearman's, between the scores of two halves of the samples.

    Parameters
    ----------
    groups: dict of str to float
        The correlation within each group of at least two channels, from -1 to 1; 1 is a ranking that does not depend on
        the samples, 0 is chance.
    network: float
        The correlation over all channels of all groups together, the ranking that a plan is made from.
    samples: int
        The number of samples; a half has half of them.

    References
    ----------
    Spearman, "Correlation calculated from faulty data", and Brown, "Some experimental results in the correlation of
    mental abilities", both British Journal of Psychology 3 (1910): the correlation ``r`` of halves becomes
    ``2 r / (1 + r)`` for the whole.

    Examples
    --------
    >>> import torch
    >>> halves = {'conv1': torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]])}
    >>> found = Reliability.of(halves, samples=20)
    >>> round(found.network, 2), round(found.full, 2), found.needed(0.95)
    (0.8, 0.89, 48)
    >>> print(found)
    ranking of the whole network: 0.80 between halves of 10 references; about 48 would reach 0.95
    '''

    groups: Mapping[str, float]
    network: float
    samples: int

    @classmethod
    def of(cls, halves: Mapping[str, torch.Tensor], samples: int) -> Reliability:
        '''Compute the correlations from the scores of two halves of the samples.

        Parameters
        ----------
        halves: mapping of str to torch.Tensor
            By group, shape (2, channels): the scores of either half.
        samples: int
            The number of samples in both halves together.

        Returns
        -------
        Reliability
            The correlations within groups of at least two channels, and over all channels.
        '''
        return cls({name: spearman(*values) for name, values in halves.items() if values.shape[1] > 1},
                   spearman(*torch.cat(list(halves.values()), 1)), samples)

    @property
    def full(self) -> float:
        '''The correlation to expect between the scores of all samples and of as many others (Spearman-Brown).'''
        return 2 * self.network / (1 + self.network) if self.network > 0 else self.network

    def needed(self, correlation: float = 0.95) -> int | None:
        '''Estimate the number of samples that would reach a correlation, by Spearman and Brown's formula.

        Parameters
        ----------
        correlation: float
            The :attr:`full` correlation wanted, between 0 and 1.

        Returns
        -------
        int or None
            The number of samples, None where the halves do not agree at all.

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
        '''Return the correlations as JSON values, for :meth:`from_dict`.

        Returns
        -------
        dict of str to object
            The attributes by name.

        Examples
        --------
        >>> Reliability({'conv1': 0.8}, 0.8, 20).to_dict()
        {'groups': {'conv1': 0.8}, 'network': 0.8, 'samples': 20}
        '''
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any, source: str) -> Reliability:
        '''Read the values that :meth:`to_dict` returned.

        Parameters
        ----------
        data: object
            The values, as JSON holds them.
        source: str
            The name of the values in errors.

        Returns
        -------
        Reliability
            The correlations.

        Raises
        ------
        PruneError
            If the data are something else.

        Examples
        --------
        >>> found = Reliability({'conv1': 0.8}, 0.8, 20)
        >>> Reliability.from_dict(found.to_dict(), 'plan.json') == found
        True
        '''
        try:
            groups = {str(name): float(value) for name, value in data['groups'].items()}
            return cls(groups, float(data['network']), int(data['samples']))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PruneError(f'{source!r} holds a damaged "reliability" ({error!r}): leave it out.') from error


def spearman(left: torch.Tensor, right: torch.Tensor) -> float:
    '''Return Spearman's rank correlation, with average ranks for ties; 0 where one side is constant.'''
    ranks = [_ranks(values.numpy()) for values in (left, right)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: Any) -> Any:
    '''Return the rank of each value; equal values share the mean of their ranks.'''
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + last - 1) / 2.0)[inverse]


class Relevance:
    '''Scores of channels by group; channels with the highest are kept. Print it for a table.

    Parameters
    ----------
    scores: mapping of str to torch.Tensor
        For each group name, shape (channels,): one finite number for each channel of the group. They are copied to
        float64 on the CPU.
    halves: mapping of str to torch.Tensor, optional
        By group, shape (2, channels): the scores of the even and of the odd samples alone, for :meth:`reliability`.
    info: mapping, optional
        The origin of the scores as JSON values: ``'criterion'``, ``'samples'``, ``'notes'`` and more.
    exemplars: Exemplars, optional
        The reference samples with the highest scores for each channel.

    Raises
    ------
    PruneError
        If scores are not one-dimensional or not finite.

    Examples
    --------
    >>> relevance = Relevance({'conv1': [0.5, 2.0, 1.0], 'conv2': [3.0, 1.0]})
    >>> relevance['conv1']
    tensor([0.5000, 2.0000, 1.0000], dtype=torch.float64)
    >>> list(relevance), 'conv3' in relevance
    (['conv1', 'conv2'], False)
    >>> print(relevance)
    group  channels  least  median  most  reliability
    -----  --------  -----  ------  ----  -----------
    conv1         3    0.5       1     2
    conv2         2      1       1     3
    '''

    @names_options()
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
        '''Return pairs of group name and scores, as of a dict.

        Returns
        -------
        ItemsView of (str, torch.Tensor)
            The names, and the scores of shape (channels,).

        Examples
        --------
        >>> relevance = Relevance({'conv1': [0.5, 2.0], 'conv2': [3.0]})
        >>> {name: scores.tolist() for name, scores in relevance.items()}
        {'conv1': [0.5, 2.0], 'conv2': [3.0]}
        '''
        return self._scores.items()

    def reliability(self) -> Reliability:
        '''Compute the split-half rank correlation of the scores, which says how far the ranking depends on the samples.

        Returns
        -------
        Reliability
            The correlation within each group and over the whole network, and the number of samples that would be
            enough.

        Raises
        ------
        PruneError
            If the scores were not collected from at least two samples.

        Examples
        --------
        >>> relevance = zp.Pruner(model, None, example, progress=False).collect(loader)
        >>> found = relevance.reliability()
        >>> found.samples, sorted(found.groups), -1 <= found.network <= 1
        (8, ['conv1', 'conv2'], True)
        '''
        if not self.has_halves:
            raise PruneError('reliability needs relevance collected from at least two samples: collect from more.')
        return Reliability.of(self._halves, self.info['samples'])

    @property
    def has_halves(self) -> bool:
        '''Whether the scores were collected from at least two samples, so that halves can be compared.'''
        return bool(self._halves) and self.info.get('samples', 0) > 1

    @names_options()
    def save(self, path: str | os.PathLike[str]) -> None:
        '''Write everything to one safetensors file, which holds tensors and JSON only.

        Parameters
        ----------
        path: path-like
            The file; it appears when it is complete.

        Examples
        --------
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Relevance({'conv1': [0.5, 2.0]}).save(f'{folder}/relevance.safetensors')
        ...     Relevance.load(f'{folder}/relevance.safetensors')['conv1'].tolist()
        [0.5, 2.0]
        '''
        tensors = {f'scores.{name}': values for name, values in self._scores.items()}
        tensors.update({f'halves.{name}': values for name, values in self._halves.items()})
        metadata = {'info': json.dumps(self.info)}
        if self.exemplars is not None:
            metadata['exemplars'] = self.exemplars.best.to_json()
            tensors.update({f'exemplars.{name}': values for name, values in self.exemplars.best.tensors().items()})
        write_tensors(path, tensors, metadata, FORMAT)

    @classmethod
    @names_options()
    def load(cls, path: str | os.PathLike[str]) -> Relevance:
        '''Read scores that :meth:`save` wrote.

        Parameters
        ----------
        path: path-like
            The file.

        Returns
        -------
        Relevance
            The scores, with their reference samples where there were any.

        Raises
        ------
        PruneError
            If the file is something else.

        Examples
        --------
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Relevance({'conv1': [0.5, 2.0]}, info={'criterion': 'mine'}).save(f'{folder}/relevance.safetensors')
        ...     Relevance.load(f'{folder}/relevance.safetensors').info
        {'criterion': 'mine'}
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
            An image file to write; its suffix says of which kind, e.g. ``.png`` or ``.svg``.

        Returns
        -------
        matplotlib.figure.Figure
            The figure, with a panel for each group.

        Raises
        ------
        PruneError
            If matplotlib is not installed, or the folder of ``path`` does not exist.

        Examples
        --------
        >>> figure = Relevance({'conv1': [0.5, 2.0], 'conv2': [3.0, 1.0]}).plot()
        >>> [axes.get_title() for axes in figure.axes]
        ['conv1', 'conv2']
        '''
        return _plotted(self, path)

    def _table(self) -> Table:
        reliability = self.reliability().groups if self.has_halves else {}
        rows = [(name, len(values), float(values.min()), float(values.median()), float(values.max()),
                 f'{reliability[name]:.2f}' if name in reliability else '') for name, values in self._scores.items()]
        return ('group', 'channels', 'least', 'median', 'most', 'reliability'), rows

    def __str__(self) -> str:
        return table(*self._table())

    def _repr_html_(self) -> str:
        return panel(repr(self), [self._table()])

    def __repr__(self) -> str:
        how = ', '.join(f'{key}={value!r}' for key, value in self.info.items())
        channels = sum(map(len, self._scores.values()))
        return f'Relevance({channels} channels of {len(self)} groups{", " * bool(how)}{how})'


def _plotted(relevance: Relevance, path: str | os.PathLike[str] | None = None) -> Any:
    '''Draw a panel for every group, with its scores in ascending order.'''
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


def checked_relevance(given: object, what: str) -> Relevance:
    '''Return relevance; refuse anything else, with the name of what was to be or to return relevance.'''
    if not isinstance(given, Relevance):
        raise PruneError(f'{what} gives {shown(given)} where a Relevance is needed: collect it, or make one of your '
                         'own scores, zp.Relevance({group: scores}).')
    return given

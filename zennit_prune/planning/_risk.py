'''``Plan.at_risk``: channels to be removed that a single sample needs, and classes that lose much relevance.'''
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import PruneError, shown
from ..graph._graph import ChannelGraph
from ..relevance._exemplars import Exemplars
from ..relevance._relevance import Relevance
from ..util._display import Share, Table, panel, table


class Risk(NamedTuple):
    '''A channel that a plan removes although a sample needs it.

    Attributes
    ----------
    group: str
        The name of the group.
    channel: int
        The position within the group.
    value: float
        The channel's share in the sample's absolute relevance at the group, from 0 to 1.
    sample: int
        The number of the sample in the order of the loader.
    class_: int
        The class of the sample, -1 where it has none.

    Examples
    --------
    >>> risk = zp.planning.Risk('conv1', 3, 0.4, 17, 2)
    >>> f'channel {risk.channel} has {risk.value:.0%} of the relevance of sample {risk.sample}'
    'channel 3 has 40% of the relevance of sample 17'
    '''

    group: str
    channel: int
    value: float
    sample: int
    class_: int


@dataclass(frozen=True, eq=False)
class AtRisk:
    '''The channels and classes that a plan puts at risk; print it, or show it in a notebook.

    Attributes
    ----------
    channels: list of Risk
        The removed channels with the largest share in the relevance of any single sample, largest first.
    classes: torch.Tensor or None
        float64, shape (classes, groups), from 0 to 1: the share of each class's absolute relevance at each group that
        belongs to removed channels. None where the samples had no classes.
    rows: tuple of int
        The class of each row of ``classes``.
    columns: tuple of str
        The group of each column of ``classes``.

    Examples
    --------
    >>> pruner = zp.Pruner(model, None, example, progress=False)
    >>> relevance = pruner.collect(loader, exemplars=2)
    >>> found = zp.Plan(pruner.graph, {'conv1': [0, 1]}).at_risk(relevance)
    >>> [(risk.group, risk.channel) for risk in sorted(found.channels)], found.rows, found.columns
    ([('conv1', 0), ('conv1', 1)], (0, 1, 2, 3), ('conv1', 'conv2'))
    '''

    channels: list[Risk]
    classes: torch.Tensor | None
    rows: tuple[int, ...]
    columns: tuple[str, ...]

    def _tables(self) -> list[Table]:
        channels = [(risk.group, risk.channel, Share(risk.value), risk.sample,
                     '' if risk.class_ < 0 else risk.class_) for risk in self.channels]
        tables: list[Table] = [(('group', 'channel', 'share of a sample', 'sample', 'class'), channels)]
        if self.classes is not None:
            means, largest = self.classes.mean(1), self.classes.max(1)
            order = means.argsort(descending=True, stable=True).tolist()[:max(len(self.channels), 1)]
            tables.append((('class', 'lost on average', 'lost at most', 'in group'),
                           [(self.rows[row], Share(float(means[row])), Share(float(largest.values[row])),
                             self.columns[int(largest.indices[row])]) for row in order]))
        return tables

    def __str__(self) -> str:
        return '\n\n'.join(table(*each) for each in self._tables())

    def _repr_html_(self) -> str:
        return panel(repr(self), self._tables())

    def __repr__(self) -> str:
        return f'AtRisk({len(self.channels)} channels, {len(self.rows)} classes)'


def at_risk(graph: ChannelGraph, removed: Mapping[str, Sequence[int]], relevance: Relevance, count: int) -> AtRisk:
    '''Find the channels and classes at risk; see :meth:`Plan.at_risk`.'''
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 0:
        raise PruneError(f'count={shown(count)} is no number of channels: give a whole number from 0 on.')
    exemplars = _exemplars(graph, relevance)
    found = [Risk(name, channel, float(exemplars.shares[name][channel]), int(exemplars.share_samples[name][channel]),
                  int(exemplars.share_classes[name][channel]))
             for name, channels in removed.items() if name in exemplars.shares for channel in channels]
    largest = sorted(found, key=lambda risk: -risk.value)[:count]
    if not exemplars.classes:
        return AtRisk(largest, None, (), ())
    columns = []
    for name, means in exemplars.by_class.items():
        absolute = means.abs()
        lost = absolute[:, list(removed.get(name, ()))].sum(1)
        columns.append(lost / absolute.sum(1).clamp(min=1e-300))
    return AtRisk(largest, torch.stack(columns, 1), tuple(exemplars.classes), tuple(exemplars.by_class))


def _exemplars(graph: ChannelGraph, relevance: Any) -> Exemplars:
    '''Return the reference samples of relevance, after a check that they are of the network of a graph.'''
    if not isinstance(relevance, Relevance):
        raise PruneError(f'a Relevance is needed, which pruner.collect(loader, exemplars=8) returns, not a '
                         f'{type(relevance).__name__}.')
    found = relevance.exemplars
    if found is None:
        raise PruneError('relevance was collected without reference samples: collect with exemplars=8, say.')
    sizes = {group.name: group.size for group in graph.groups}
    for name, values in found.samples.items():
        if sizes.get(name) != len(values):
            raise PruneError(f'the reference samples of group {name!r} are for {len(values)} channels, but the network '
                             f'of the plan has {sizes.get(name, "none")}: they are of another network.')
    return found

'''Pictures of plans and of relevance, by matplotlib.'''
from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .files import check_folder
from .optional import needed

if TYPE_CHECKING:
    from .plan import Plan
    from .relevance import Relevance

KEPT, GONE, BEFORE = '#0072b2', '#d55e00', '0.85'
PANELS = 5  # in a row


def plot_plan(plan: Plan, path: str | os.PathLike[str] | None = None) -> Any:
    '''A column for every group: how many channels it has, and how many stay; see :meth:`Plan.plot`.'''
    figure = _figure(path, (8, 3.2))
    axes = figure.add_subplot()
    groups = plan.graph.groups
    at = np.arange(len(groups))
    axes.bar(at, [group.size for group in groups], color=BEFORE, label='before')
    axes.bar(at, [group.size - len(plan.removed.get(group.name, ())) for group in groups], color=KEPT, label='left')
    step = max(1, math.ceil(len(groups) / 40))  # of names that can be read
    axes.set_xticks(at[::step], [_plain(group.name) for group in groups[::step]], rotation=90, fontsize=7)
    axes.set_ylabel('channels')
    axes.margins(x=0.01)
    axes.legend(frameon=False)
    return _done(figure, [axes], path)


def plot_relevance(relevance: Relevance, path: str | os.PathLike[str] | None = None) -> Any:
    '''A panel for every group: its scores in ascending order; see :meth:`Relevance.plot`.'''
    scores: Mapping[str, Any] = dict(relevance.items())
    wide = min(PANELS, len(scores) or 1)
    high = math.ceil((len(scores) or 1) / wide)
    figure = _figure(path, (2.2 * wide, 1.5 * high + 0.3))
    panels = figure.subplots(high, wide, squeeze=False).flatten()
    for axes, (name, values) in zip(panels, scores.items()):
        ordered = values.sort().values.numpy()
        axes.fill_between(np.arange(len(ordered) + 1), np.append(ordered, ordered[-1]), step='post', color=KEPT)
        axes.set_title(_plain(name), fontsize=7)
        axes.tick_params(labelsize=6)
        axes.set_xlim(0, len(ordered))
    for axes in panels[len(scores):]:
        axes.set_axis_off()
    figure.supxlabel('channels, least relevant first', fontsize=8)
    return _done(figure, panels, path)


def _figure(path: str | os.PathLike[str] | None, size: tuple[float, float]) -> Any:
    figure = needed('matplotlib.figure', 'plot', 'plot()').Figure(figsize=size, layout='constrained')
    if path is not None:
        check_folder(path)
    return figure


def _done(figure: Any, panels: Any, path: str | os.PathLike[str] | None) -> Any:
    for axes in panels:
        axes.spines[['top', 'right']].set_visible(False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _plain(name: str) -> str:
    '''A name without signs that would be read as mathematics.'''
    return name.replace('$', r'\$')

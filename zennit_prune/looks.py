'''What a report shows of images and of their classes: heatmaps before and after, and what classes lose.'''
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import charts
from .agreement import Agreement, agreement
from .charts import Chart
from .pictures import CHANGE, SMALL, full_colour, heat, picture
from .plan import Plan
from .relevance import Relevance
from .risk import class_losses
from .subject import Subject

MOVED = 0.5  # of the relevance: where more moves, an explanation is said to change
CLASSES = 20  # rows of the matrix


@dataclass(frozen=True)
class Images:
    '''What the caller gave to look at.'''

    x: torch.Tensor | None
    target: Any
    display: torch.Tensor | None
    classes: list[str]
    names: list[str]
    most: int

    def shown(self, number: int) -> str:
        '''The picture of an image, as a data URI.'''
        source = self.x if self.display is None else self.display
        assert source is not None
        return picture(source[number], self.display is not None)

    def class_name(self, number: int) -> str:
        '''What a class is called.'''
        return str(self.classes[number]) if 0 <= number < len(self.classes) else f'class {number}'

    def image_name(self, number: int) -> str:
        '''What an image is called.'''
        return str(self.names[number]) if self.names else f'image {number}'


@dataclass(frozen=True)
class Look:
    '''An image, and what became of its explanation.'''

    name: str
    prediction: str
    verdict: str
    level: str
    picture: str
    before: str
    after: str
    difference: str
    small: bool
    cosine: float
    rank: float
    moved: float


@dataclass(frozen=True)
class Looks:
    '''The images that change most, and what to say of all.'''

    summary: str
    note: str
    shown: list[Look]


@dataclass(frozen=True)
class ClassLosses:
    '''What every class loses of its relevance, by group.'''

    chart: Chart
    caption: str
    summary: str


def look_at(pruner: Subject, plan: Plan, small: nn.Module | None, images: Images) -> Looks | None:
    '''Heatmaps of the network as it is and as it would be: those images first whose explanation changes most.'''
    if images.x is None:
        return None
    after = plan.masked(pruner.model) if small is None else small
    target = 'predicted' if images.target is None else images.target
    found = agreement(pruner.model, after, pruner.composite, images.x, target)
    turns = found.same & (found.moved > MOVED)
    order = sorted(found.order.tolist(), key=lambda number: (not turns[number], found.same[number]))
    shown = [_look(number, found, images) for number in order[:images.most]]
    stay = int(found.same.sum())
    summary = (f'{stay:,} of {len(order):,} predictions stay; in {int(turns.sum()):,} of these, more than half of '
               f'the relevance moves. Median cosine of the heatmaps: {float(found.cosine.median()):.2f}.')
    most = f' The {len(shown)} that change most are shown.' if len(shown) < len(order) else ''
    return Looks(summary, f'{summary}{most} Images that keep their prediction while its explanation changes come '
                 'first, for accuracy does not show them; then those whose prediction changes.', shown)


def _look(number: int, found: Agreement, images: Images) -> Look:
    assert images.x is not None
    same, moved = bool(found.same[number]), float(found.moved[number])
    level = 'bad' if not same else 'warn' if moved > MOVED else 'good'
    verdict = {'bad': 'prediction changes', 'warn': 'explanation changes', 'good': 'stays'}[level]
    before, after = (classes[number] for classes in found.predicted)
    prediction = 'predicted position by position'
    if before.dim() == 0:
        prediction = f'predicted {images.class_name(int(before))}'
        prediction += f', then {images.class_name(int(after))}' * (not same)
    if isinstance(images.target, torch.Tensor) and images.target.dim() == 1:
        prediction += f'; heatmaps for {images.class_name(int(images.target[number]))}'
    maps = torch.stack([found.before[number], found.after[number]])
    scale = full_colour(maps)
    return Look(
        images.image_name(number), prediction, verdict, level, images.shown(number), heat(maps[0], scale),
        heat(maps[1], scale), heat(found.difference[number], scale, CHANGE), max(images.x.shape[-2:]) <= SMALL,
        float(found.cosine[number]), float(found.rank[number]), moved)


def class_losses_of(plan: Plan, relevance: Relevance | None, images: Images) -> ClassLosses | None:
    '''The share of its relevance that every class loses at every group; None where classes were not kept apart.'''
    exemplars = getattr(relevance, 'exemplars', None)
    if relevance is None or exemplars is None or not exemplars.classes:
        return None
    losses = class_losses(plan, relevance)
    means = losses.mean(1)
    order = means.argsort(descending=True).tolist()[:CLASSES]
    names = [images.class_name(number) for number in exemplars.classes]
    chart = charts.matrix([names[row] for row in order], list(exemplars.by_class),
                          [losses[row].tolist() for row in order], 'goes')
    most = f'The {CLASSES} of {len(names)} classes that lose most. ' if len(names) > CLASSES else ''
    caption = (f'{most}The full colour is {float(losses.max()):.0%}. A row that stands out is a class that pays for '
               'the others.')
    summary = f'{names[order[0]]} loses most: {means[order[0]]:.0%} of its relevance, averaged over the groups'
    if len(names) > 1:
        summary += f'; {names[int(means.argmin())]} loses least: {float(means.min()):.0%}'
    return ClassLosses(chart, caption, f'{summary}.')

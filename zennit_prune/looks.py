'''What a report shows of images: heatmaps before and after, what excites the channels that go, what classes lose.'''
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .agreement import Agreement, agreement
from .charts import Chart
from .pictures import CHANGE, SMALL, heat, picture
from .plan import Plan
from .pruner import Pruner
from .relevance import Relevance

MOVED = 0.5  # of the relevance: where more moves, an explanation is said to change
BRIGHTEST = 0.99  # of the pixels: what is above this quantile has the full colour


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
class Crop:
    '''A part of a reference, and where the channel's relevance sits in it.'''

    picture: str
    heat: str
    caption: str


@dataclass(frozen=True)
class Channel:
    '''A channel, and the references that excite it most.'''

    title: str
    text: str
    goes: bool
    crops: list[Crop]


@dataclass(frozen=True)
class Risky:
    '''Channels that go although something speaks for them, each beside one of its group that stays.'''

    note: str
    pairs: list[tuple[Channel, Channel | None]]


@dataclass(frozen=True)
class ClassLosses:
    '''What every class loses of its relevance, by group.'''

    chart: Chart
    caption: str
    summary: str


def look_at(pruner: Pruner, plan: Plan, small: nn.Module | None, images: Images) -> Looks | None:
    '''Heatmaps of the network as it is and as it would be: those images first whose explanation changes most.'''
    if images.x is None:
        return None
    after = plan.masked(pruner.model) if small is None else small
    target = 'predicted' if images.target is None else images.target
    found = agreement(pruner.model, after, pruner.composite, images.x, target)
    order = found.order.tolist()
    shown = [_look(number, found, images) for number in order[:images.most]]
    stay = int(found.same.sum())
    turned = int((found.same & (found.moved > MOVED)).sum())
    summary = (f'{stay:,} of {len(order):,} predictions stay; in {turned:,} of these, more than half of the relevance '
               f'moves to other pixels. Median cosine of the heatmaps: {float(found.cosine.median()):.2f}.')
    most = f' The {len(shown)} that change most are shown.' if len(shown) < len(order) else ''
    return Looks(summary, f'{summary}{most} Images that keep their prediction come first, those whose explanation '
                 'changes most before all: accuracy does not show them.', shown)


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
    scale = float(maps.abs().flatten().double().quantile(BRIGHTEST)) or float(found.scale[number])
    return Look(
        images.image_name(number), prediction, verdict, level, images.shown(number), heat(maps[0], scale),
        heat(maps[1], scale), heat(found.difference[number], scale, CHANGE), max(images.x.shape[-2:]) <= SMALL,
        float(found.cosine[number]), float(found.rank[number]), moved)


def risky_channels(pruner: Pruner, plan: Plan, relevance: Relevance | None, references: Any,
                   images: Images) -> Risky | None:
    return None


def class_losses_of(plan: Plan, relevance: Relevance | None, images: Images) -> ClassLosses | None:
    return None

'''What a report shows of images: heatmaps before and after, what excites the channels that go, what classes lose.'''
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import charts
from .charts import Chart
from .networks import device_of
from .pictures import CHANGE, SMALL, heat, picture
from .plan import Plan
from .pruner import Pruner
from .relevance import Relevance

AGREES = 0.8  # cosine of heatmaps below which an explanation is said to change


@dataclass(frozen=True)
class Images:
    '''What the caller gave to look at.'''

    x: torch.Tensor | None
    target: Any
    display: torch.Tensor | None
    classes: list[str]
    names: list[str]
    most: int

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
    return None


def risky_channels(pruner: Pruner, plan: Plan, relevance: Relevance | None, references: Any,
                   images: Images) -> Risky | None:
    return None


def class_losses_of(plan: Plan, relevance: Relevance | None, images: Images) -> ClassLosses | None:
    return None

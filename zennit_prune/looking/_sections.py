'''The sections of a report that show images: heatmaps before and after, losses by class, and channels at risk.'''
from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import RandomSampler

from ..errors import PruneError
from ..planning._plan import Plan
from ..planning._risk import Risk
from ..relevance._initial import Initial
from ..relevance._outputs import Output
from ..relevance._relevance import Relevance
from ..util._loaders import batches
from ..util._networks import device_of
from . import _charts as charts
from ._agreement import Agreement, agreement
from ._charts import Chart
from ._findings import Subject
from ._heatmap import heatmap
from ._pictures import CHANGE, SMALL, full_colour, heat, picture

MOST = 0.9  # of the positions of an image, whose prediction is said to stay if so many do
CHANGED = 0.5  # total variation distance of two heatmaps above which an explanation is said to change
CLASSES = 20  # rows of the chart of classes
PAIRS = 5  # channels at risk, each beside one that is kept
SHOWN = 5  # reference samples of a channel
INSIDE = 0.9  # fraction of the relevance of a channel inside its excerpt, along each side
LARGEST = 112  # pixels of the longer side of an excerpt as shown
LEAST = 0.25  # the least side of an excerpt, as a fraction of the shorter side of the image


@dataclass(frozen=True)
class Images:
    '''The images of a report, as the caller gave them, and the names of images and classes.'''

    x: torch.Tensor | None
    target: Any
    display: torch.Tensor | None
    classes: list[str]
    names: list[str]
    most: int
    initial: Initial = 'one-hot'
    output: Output = None

    def shown(self, number: int) -> str:
        '''Return an image as a data URI.'''
        source = self.x if self.display is None else self.display
        assert source is not None
        return picture(source[number], self.display is not None)

    def class_name(self, number: int) -> str:
        '''Return the name of a class.'''
        return str(self.classes[number]) if 0 <= number < len(self.classes) else f'class {number}'

    def image_name(self, number: int) -> str:
        '''Return the name of an image.'''
        return str(self.names[number]) if self.names else f'image {number}'


@dataclass(frozen=True)
class ImageHeatmaps:
    '''An image with its heatmaps before and after, and how they compare.'''

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
    total_variation: float


@dataclass(frozen=True)
class HeatmapSection:
    '''The images whose explanations change most, and a summary of all.'''

    summary: str
    note: str
    shown: list[ImageHeatmaps]


@dataclass(frozen=True)
class ClassSection:
    '''The share of relevance that each class loses, by group.'''

    chart: Chart
    caption: str
    summary: str


def heatmap_section(pruner: Subject, plan: Plan, small: nn.Module | None, images: Images) -> HeatmapSection | None:
    '''Compute heatmaps before and after pruning, images whose explanation changes most first; None without images.'''
    if images.x is None:
        return None
    after = plan.masked(pruner.model) if small is None else small
    target = 'predicted' if images.target is None else images.target
    found = agreement(pruner.model, after, pruner.composite, images.x, target, images.initial, output=images.output)
    turns = (found.staying >= MOST) & (found.total_variation > CHANGED)
    order = sorted(found.order.tolist(), key=lambda number: (not turns[number], found.same[number]))
    shown = [_image_heatmaps(number, found, images) for number in order[:images.most]]
    dense = found.predicted[0].dim() > 1
    which = f'images of which at least {MOST:.0%} stay' if dense else 'of these'
    summary = (f'{found.stay}{"" if dense else " the same"}; for {int(turns.sum()):,} {which}, the heatmap '
               f'changes by a total variation distance of more than {CHANGED:.0%}. Median cosine between heatmaps '
               f'before and after: {float(found.cosine.median()):.2f}.')
    most = f' The {len(shown)} images that change most are shown.' if len(shown) < len(order) else ''
    note = (f'{summary}{most} Images that keep their prediction while its explanation changes come first, because '
            'accuracy does not show them; then those whose prediction changes.')
    return HeatmapSection(summary, note, shown)


def _image_heatmaps(number: int, found: Agreement, images: Images) -> ImageHeatmaps:
    '''Draw one image of the section with its heatmaps.'''
    assert images.x is not None
    same, variation = bool(found.same[number]), float(found.total_variation[number])
    level = 'bad' if found.staying[number] < MOST else 'warn' if variation > CHANGED else 'good'
    verdict = {'bad': 'prediction changes', 'warn': 'explanation changes', 'good': 'no change'}[level]
    before, after = (classes[number] for classes in found.predicted)
    prediction = f'predicted position by position, {float(found.staying[number]):.0%} stay'
    if before.dim() == 0:
        prediction = f'predicted {images.class_name(int(before))}'
        prediction += f', then {images.class_name(int(after))}' * (not same)
    if isinstance(images.target, torch.Tensor) and images.target.dim() == 1:
        prediction += f'; heatmaps for {images.class_name(int(images.target[number]))}'
    maps = torch.stack([found.before[number], found.after[number]])
    scale = full_colour(maps)
    return ImageHeatmaps(
        images.image_name(number), prediction, verdict, level, images.shown(number), heat(maps[0], scale),
        heat(maps[1], scale), heat(found.difference[number], scale, CHANGE), max(images.x.shape[-2:]) <= SMALL,
        float(found.cosine[number]), float(found.rank[number]), variation)


def class_section(plan: Plan, relevance: Relevance | None, images: Images) -> ClassSection | None:
    '''Return the share of relevance that each class loses at each group; None where scores are not known by class.'''
    exemplars = getattr(relevance, 'exemplars', None)
    losses = None if relevance is None or exemplars is None else plan.at_risk(relevance).classes
    if losses is None or exemplars is None:
        return None
    means = losses.mean(1)
    order = means.argsort(descending=True).tolist()[:CLASSES]
    names = [images.class_name(number) for number in exemplars.classes]
    chart = charts.matrix([names[row] for row in order], list(exemplars.by_class),
                          [losses[row].tolist() for row in order], 'removed')
    most = f'The {CLASSES} of {len(names)} classes that lose most. ' if len(names) > CLASSES else ''
    caption = f'{most}Full colour is {float(losses.max()):.0%}. A row that stands out is a class that loses most.'
    summary = f'{names[order[0]]} loses most: {means[order[0]]:.0%} of its relevance, averaged over the groups'
    if len(names) > 1:
        summary += f'; {names[int(means.argmin())]} loses least: {float(means.min()):.0%}'
    return ClassSection(chart, caption, f'{summary}.')


@dataclass(frozen=True)
class Excerpt:
    '''A part of a reference sample, and the heatmap of a channel there.'''

    picture: str
    heat: str
    caption: str
    small: bool


@dataclass(frozen=True)
class Channel:
    '''A channel, and the reference samples with the most relevance at it.'''

    title: str
    text: str
    removed: bool
    excerpts: list[Excerpt]


@dataclass(frozen=True)
class RiskSection:
    '''Channels to be removed that a single sample depends on, each beside the least relevant one that is kept.'''

    note: str
    pairs: list[tuple[Channel, Channel | None]]


Samples = dict[int, tuple[torch.Tensor, int | None]]


def risk_section(pruner: Subject, plan: Plan, relevance: Relevance | None, references: Any,
                 images: Images) -> RiskSection | None:
    '''Return the channels at the largest risk; None where no reference samples were kept or given.

    Parameters
    ----------
    pruner, plan, relevance, references:
        See :func:`zennit_prune.report`.
    images: Images
        The names of classes, and where relevance starts.

    Raises
    ------
    PruneError
        If ``references`` are not the samples that relevance was collected from.
    '''
    exemplars = getattr(relevance, 'exemplars', None)
    if relevance is None or exemplars is None or references is None or not plan.removed:
        return None
    risks = plan.at_risk(relevance, PAIRS).channels
    kept = {risk.group: _least_kept(plan, relevance, risk.group) for risk in risks}
    wanted = {(risk.group, risk.channel) for risk in risks}
    wanted |= {(group, channel) for group, channel in kept.items() if channel is not None}
    shown = {key: [number for number in exemplars.samples[key[0]][key[1]].tolist() if number >= 0][:SHOWN]
             for key in wanted}
    samples = _samples(references, {number for numbers in shown.values() for number in numbers} |
                       {risk.sample for risk in risks}, pruner.model)
    _check_order(risks, samples)
    drawn = {key: _excerpts(pruner, *key, numbers, samples, images) for key, numbers in shown.items()}

    def channel(group: str, position: int, removed: bool, text: str) -> Channel:
        scores = relevance[group]
        rank = int((scores < scores[position]).sum()) + 1
        text = f'Relevance {float(scores[position]):.3g}, rank {rank} of {len(scores)} from the lowest; {text}'
        return Channel(f'{group}, channel {position}', text, removed, drawn[group, position])

    pairs = []
    for risk in risks:
        whose = '' if risk.class_ < 0 else f' ({images.class_name(risk.class_)})'
        removed = channel(risk.group, risk.channel, True,
                          f"but {risk.value:.0%} of the group's relevance for reference {risk.sample}{whose}.")
        beside = kept[risk.group]
        pairs.append((removed, None if beside is None else
                      channel(risk.group, beside, False, 'the least relevant channel of the group that is kept.')))
    note = ('A score is a mean over the reference samples, so a channel that a single sample depends on can have a low '
            'one. Of the channels to be removed, these have the largest share in the relevance of any single sample. '
            'The samples with the most relevance at the channel are shown, cropped to where it is. Check what is lost '
            'with the channel, and whether the one that is kept responds to the same things.')
    return RiskSection(note, pairs) if pairs else None


def _least_kept(plan: Plan, relevance: Relevance, group: str) -> int | None:
    '''Return the least relevant channel of a group that is kept.'''
    removed = set(plan.removed.get(group, ()))
    order: list[int] = relevance[group].argsort().tolist()
    return next((position for position in order if position not in removed), None)


def _samples(references: Any, wanted: Collection[int], network: nn.Module) -> Samples:
    '''Return images and labels by their number in the loader's order.'''
    if isinstance(getattr(references, 'sampler', None), RandomSampler):
        raise PruneError('references are shuffled, so that samples cannot be identified: give a loader with '
                         'shuffle=False to collect() and here.')
    found: Samples = {}
    first = 0
    for batch in batches(references, network=network):
        inputs, target = batch
        if not isinstance(inputs, torch.Tensor) or inputs.dim() != 4:
            raise PruneError('references are shown as images: give a loader of tensors of shape (N, C, H, W).')
        classes = isinstance(target, torch.Tensor) and target.dim() == 1 and not target.is_floating_point()
        labels = target if classes else None
        for index in range(batch.size):
            if first + index in wanted:
                found[first + index] = inputs[index], None if labels is None else int(labels[index])
        first += batch.size
    if len(found) < len(wanted):
        raise PruneError(f'references hold {first} samples, but relevance was collected from at least '
                         f'{max(wanted) + 1}: give the loader it was collected from.')
    return found


def _check_order(risks: Collection[Risk], samples: Samples) -> None:
    '''Raise if samples have other classes than they had when relevance was collected.'''
    for risk in risks:
        label = samples[risk.sample][1]
        if label is not None and risk.class_ >= 0 and label != risk.class_:
            raise PruneError(f'references are in another order than relevance was collected in: sample {risk.sample} '
                             f'was of class {risk.class_}, here it is of class {label}. Give the same loader, without '
                             'shuffling.')


def _excerpts(pruner: Subject, group: str, channel: int, numbers: list[int], samples: Samples,
              images: Images) -> list[Excerpt]:
    '''Return parts of reference samples around the relevance of a channel.'''
    if not numbers:
        return []
    x = torch.stack([samples[number][0] for number in numbers]).to(device_of(pruner.model))
    labels = [samples[number][1] for number in numbers]
    target: Any = 'predicted' if None in labels else torch.tensor(labels, device=x.device)
    maps = heatmap(pruner.model, pruner.composite, x, target, images.initial, channel=(group, channel),
                   graph=pruner.graph, output=images.output)
    found = []
    for number, image, label, values in zip(numbers, x, labels, maps):
        rows, columns = _box(values)
        part = values[rows, columns]
        scale = full_colour(part[None], LARGEST)
        drawn = picture(image[:, rows, columns], largest=LARGEST), heat(part, scale, largest=LARGEST)
        caption = f'{number}' if label is None else f'{number}, {images.class_name(label)}'
        found.append(Excerpt(*drawn, caption, max(part.shape) <= SMALL))
    return found


def _box(values: torch.Tensor) -> tuple[slice, slice]:
    '''Return the square that holds most of the absolute relevance of a heatmap.'''
    strength = values.abs().double()
    ends = []
    for dim in (1, 0):
        share = strength.sum(dim).cumsum(0) / strength.sum().clamp(min=1e-300)
        ends.append((int((share < (1 - INSIDE) / 2).sum()), int((share < (1 + INSIDE) / 2).sum()) + 1))
    side = max(*(stop - start for start, stop in ends), round(LEAST * min(values.shape)))
    slices = []
    for (start, stop), size in zip(ends, values.shape):
        length = min(side, size)
        first = min(max((start + stop - length) // 2, 0), size - length)
        slices.append(slice(first, first + length))
    return slices[0], slices[1]

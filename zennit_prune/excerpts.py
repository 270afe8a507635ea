'''What excites the channels that a plan takes at a risk, beside one that stays: excerpts of the references.'''
from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import RandomSampler

from .conditional import channel_heatmap
from .errors import PruneError
from .loaders import batch_size, batches
from .networks import device_of
from .pictures import SMALL, full_colour, heat, picture
from .plan import Plan
from .relevance import Relevance
from .risk import Risk, risky
from .subject import Subject

PAIRS = 5
SHOWN = 5  # references of a channel
INSIDE = 0.9  # of the relevance of a channel is inside its excerpt, along each side
LARGEST = 112  # pixels of the longer side of what is shown
LEAST = 0.25  # of the shorter side of the image, at least, is the side of an excerpt


@dataclass(frozen=True)
class Excerpt:
    '''A part of a reference, and where the relevance of a channel sits in it.'''

    picture: str
    heat: str
    caption: str
    small: bool


@dataclass(frozen=True)
class Channel:
    '''A channel, and the references that excite it most.'''

    title: str
    text: str
    goes: bool
    excerpts: list[Excerpt]


@dataclass(frozen=True)
class Risky:
    '''Channels that go although a reference needs them, each beside the least relevant of its group that stays.'''

    note: str
    pairs: list[tuple[Channel, Channel | None]]


Samples = dict[int, tuple[torch.Tensor, int | None]]


def risky_channels(pruner: Subject, plan: Plan, relevance: Relevance | None, references: Any,
                   names: Any) -> Risky | None:
    '''The channels at the largest risk; None where relevance has no exemplars, or there are no references.

    Parameters
    ----------
    pruner, plan, relevance, references:
        See :func:`zennit_prune.report`.
    names: callable
        From the number of a class to its name.

    Raises
    ------
    PruneError
        If ``references`` are not what relevance was collected from.
    '''
    exemplars = getattr(relevance, 'exemplars', None)
    if relevance is None or exemplars is None or references is None or not plan.removed:
        return None
    risks = risky(plan, relevance, PAIRS)
    survivors = {risk.group: _survivor(plan, relevance, risk.group) for risk in risks}
    wanted = {(risk.group, risk.channel) for risk in risks}
    wanted |= {(group, channel) for group, channel in survivors.items() if channel is not None}
    shown = {key: [number for number in exemplars.samples[key[0]][key[1]].tolist() if number >= 0][:SHOWN]
             for key in wanted}
    samples = _samples(references, {number for numbers in shown.values() for number in numbers} |
                       {risk.sample for risk in risks})
    _check_order(risks, samples)
    drawn = {key: _excerpts(pruner, *key, numbers, samples, names) for key, numbers in shown.items()}

    def channel(group: str, position: int, goes: bool, text: str) -> Channel:
        scores = relevance[group]
        rank = int((scores < scores[position]).sum()) + 1
        text = f'Relevance {float(scores[position]):.3g}, rank {rank} of {len(scores)} from below; {text}'
        return Channel(f'{group}, channel {position}', text, goes, drawn[group, position])

    pairs = []
    for risk in risks:
        whose = '' if risk.class_ < 0 else f' ({names(risk.class_)})'
        goes = channel(risk.group, risk.channel, True,
                       f"but {risk.value:.0%} of the group's relevance for reference {risk.sample}{whose}.")
        beside = survivors[risk.group]
        pairs.append((goes, None if beside is None else
                      channel(risk.group, beside, False, 'the least relevant of the group that stays.')))
    note = ('Scores are means over the references, so a channel that a single one depends on may go. These channels '
            'have the largest share in the relevance of any single reference; shown are the references with the most '
            'relevance at the channel, cut to where it sits. Ask what is lost with it, and whether the one that stays '
            'sees the same.')
    return Risky(note, pairs) if pairs else None


def _survivor(plan: Plan, relevance: Relevance, group: str) -> int | None:
    '''The least relevant channel of a group that stays.'''
    gone = set(plan.removed.get(group, ()))
    order: list[int] = relevance[group].argsort().tolist()
    return next((position for position in order if position not in gone), None)


def _samples(references: Any, wanted: Collection[int]) -> Samples:
    '''Images and labels by their number in the order of the loader.'''
    if isinstance(getattr(references, 'sampler', None), RandomSampler):
        raise PruneError('references are shuffled, so that it cannot be told which were collected from: give a loader '
                         'with shuffle=False to collect() and here.')
    found: Samples = {}
    first = 0
    for inputs, target in batches(references):
        if not isinstance(inputs, torch.Tensor) or inputs.dim() != 4:
            raise PruneError('references are shown as images: give a loader of tensors of shape (N, C, H, W).')
        labels = target if isinstance(target, torch.Tensor) and target.dim() == 1 else None
        for index in range(batch_size(inputs)):
            if first + index in wanted:
                found[first + index] = inputs[index], None if labels is None else int(labels[index])
        first += batch_size(inputs)
    if len(found) < len(wanted):
        raise PruneError(f'references hold {first} samples, but relevance was collected from sample {max(wanted)}, '
                         'too: give the loader it was collected from.')
    return found


def _check_order(risks: Collection[Risk], samples: Samples) -> None:
    for risk in risks:
        label = samples[risk.sample][1]
        if label is not None and risk.class_ >= 0 and label != risk.class_:
            raise PruneError(f'references are in another order than relevance was collected in: sample {risk.sample} '
                             f'was of class {risk.class_}, here it is of class {label}. Give the same loader, without '
                             'shuffling.')


def _excerpts(pruner: Subject, group: str, channel: int, numbers: list[int], samples: Samples,
              names: Any) -> list[Excerpt]:
    if not numbers:
        return []
    x = torch.stack([samples[number][0] for number in numbers]).to(device_of(pruner.model))
    labels = [samples[number][1] for number in numbers]
    target: Any = 'predicted' if None in labels else torch.tensor(labels, device=x.device)
    maps = channel_heatmap(pruner.model, pruner.composite, x, target, group, channel, graph=pruner.graph)
    found = []
    for number, image, label, values in zip(numbers, x, labels, maps):
        rows, columns = _box(values)
        part = values[rows, columns]
        scale = full_colour(part[None], LARGEST)
        drawn = picture(image[:, rows, columns], largest=LARGEST), heat(part, scale, largest=LARGEST)
        caption = f'{number}' if label is None else f'{number}, {names(label)}'
        found.append(Excerpt(*drawn, caption, max(part.shape) <= SMALL))
    return found


def _box(values: torch.Tensor) -> tuple[slice, slice]:
    '''The square that holds most of a heatmap.'''
    mass = values.abs().double()
    ends = []
    for dim in (1, 0):
        share = mass.sum(dim).cumsum(0) / mass.sum().clamp(min=1e-300)
        ends.append((int((share < (1 - INSIDE) / 2).sum()), int((share < (1 + INSIDE) / 2).sum()) + 1))
    side = max(*(stop - start for start, stop in ends), round(LEAST * min(values.shape)))
    slices = []
    for (start, stop), size in zip(ends, values.shape):
        length = min(side, size)
        first = min(max((start + stop - length) // 2, 0), size - length)
        slices.append(slice(first, first + length))
    return slices[0], slices[1]

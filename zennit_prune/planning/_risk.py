'''What a plan puts at risk: channels that few samples need much, and classes that lose more than others.'''
from __future__ import annotations

from typing import NamedTuple

import torch

from ..errors import PruneError
from ..relevance._exemplars import Exemplars
from ..relevance._relevance import Relevance
from ._plan import Plan


class Risk(NamedTuple):
    '''A channel that a plan removes although a sample needs it.

    ``value``: its share in the sample's absolute relevance at the group, from 0 to 1; ``sample``: its number in the
    loader's order; ``class_``: its class, -1 where it has none.
    '''

    group: str
    channel: int
    value: float
    sample: int
    class_: int


def risky(plan: Plan, relevance: Relevance, count: int = 10) -> list[Risk]:
    '''The channels that a plan removes with the largest share of any single sample's relevance, largest first.

    A channel's score is a mean over samples: one that a single image depends on may well be doomed. Its share in what
    all channels of its group have for this image compares across layers, since relevance is conserved from layer to
    layer. No class can have a larger share than the largest of its samples.

    Parameters
    ----------
    plan: Plan
        What is to be removed.
    relevance: Relevance
        Collected with ``exemplars=``.
    count: int
        How many to return at most.

    Returns
    -------
    list of Risk
        (group, channel, value, sample, class).

    Raises
    ------
    PruneError
        If relevance was collected without exemplars, or from another network.
    '''
    exemplars = _exemplars(plan, relevance)
    found = [Risk(name, channel, float(exemplars.shares[name][channel]), int(exemplars.share_samples[name][channel]),
                  int(exemplars.share_classes[name][channel]))
             for name, channels in plan.removed.items() if name in exemplars.shares for channel in channels]
    return sorted(found, key=lambda risk: -risk.value)[:count]


def class_losses(plan: Plan, relevance: Relevance) -> torch.Tensor:
    '''The share of each class's relevance at each group that goes with the channels a plan removes.

    Parameters
    ----------
    plan: Plan
        What is to be removed.
    relevance: Relevance
        Collected with ``exemplars=`` from samples with a class each.

    Returns
    -------
    torch.Tensor
        float64, shape (classes, groups), from 0 to 1: rows as ``relevance.exemplars.classes``, columns as
        ``relevance.exemplars.by_class``.

    Raises
    ------
    PruneError
        If relevance was collected without exemplars, without classes, or from another network.
    '''
    exemplars = _exemplars(plan, relevance)
    if not exemplars.classes:
        raise PruneError("the samples had no classes: collect with class indices as labels, or target='predicted'.")
    columns = []
    for name, means in exemplars.by_class.items():
        mass = means.abs()
        lost = mass[:, list(plan.removed.get(name, ()))].sum(1)
        columns.append(lost / mass.sum(1).clamp(min=1e-300))
    return torch.stack(columns, 1)


def _exemplars(plan: Plan, relevance: Relevance) -> Exemplars:
    found = relevance.exemplars
    if found is None:
        raise PruneError('relevance was collected without exemplars: collect with exemplars=8, say.')
    sizes = {group.name: group.size for group in plan.graph.groups}
    for name, values in found.samples.items():
        if sizes.get(name) != len(values):
            raise PruneError(f'exemplars of group {name!r} are for {len(values)} channels, but the network of the plan '
                             f'has {sizes.get(name, "none")}: they are of another network.')
    return found

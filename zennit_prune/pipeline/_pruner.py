'''``prune``: all steps in one call.

``Pruner`` ties the steps together.
'''
from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from zennit.core import Composite

from ..errors import PruneError
from ..graph._graph import ChannelGraph, trace
from ..looking._heatmap import Channel, heatmap
from ..planning._allocate import allocate
from ..planning._cost import Budget, cost_model
from ..planning._latency import LatencyModel, LatencyTable, timed
from ..planning._plan import Plan
from ..planning._workload import device_name
from ..relevance._attribute import AttributorFactory, recommended_composite
from ..relevance._collect import Collector
from ..relevance._criteria import CRITERIA, known_criterion, looks_at_data
from ..relevance._initial import Initial
from ..relevance._preflight import Preflight, preflight
from ..relevance._relevance import Relevance
from ..relevance._streaming import collect
from ..util._loaders import batches
from ..util._networks import device_of, map_tensors, unwrapped
from ._iterate import Loop
from ._result import Result, Step

Criterion = str | Callable[[ChannelGraph, nn.Module, Any], Relevance]
NAMED = tuple(CRITERIA)


class Pruner:
    '''A network, the rules that explain it, and its removable channels.

    Parameters
    ----------
    model: torch.nn.Module
        The network; no method changes it.
    composite: zennit.core.Composite or None
        The rules of relevance; None for the recommended ones: epsilon everywhere, BatchNorm merged.
    example: torch.Tensor, tuple or dict
        An input, a tuple of arguments, or a dict of keyword arguments; values do not matter.
    ignore, layernorm, progress:
        See :func:`zennit_prune.trace`.

    Attributes
    ----------
    graph: ChannelGraph
        The removable channels; print it.
    '''

    def __init__(self, model: nn.Module, composite: Composite | None, example: Any, ignore: Sequence[str] = (),
                 layernorm: str = 'lock', progress: bool = True):
        if composite is not None and not isinstance(composite, Composite):
            raise PruneError(f'a Zennit composite is needed, an instance, not {composite!r}: e.g. EpsilonPlus(), or '
                             'None.')
        self.model = unwrapped(model)
        self.composite = recommended_composite() if composite is None else composite
        self.ignore, self.layernorm, self.progress = ignore, layernorm, progress
        self.graph = trace(self.model, example, ignore, layernorm, progress)
        self._latencies: dict[str, LatencyTable] = {}

    def collector(self, aggregate: str = 'auto', initial: Initial = 'auto', criterion: str = 'relevance',
                  **options: Any) -> Collector:
        '''A collector for a loop of your own, of relevance or any other criterion that looks at data.

        See :meth:`collect` for the parameters, and :class:`zennit_prune.Collector` for further options.
        '''
        return Collector(self.graph, self.model, self.composite, aggregate, initial, criterion=criterion, **options)

    def preflight(self, x: Any, target: Any = 'predicted', initial: Initial = 'one-hot') -> Preflight:
        '''Is relevance sound on this network? Print the answer; see :mod:`zennit_prune.preflight`.

        Parameters
        ----------
        x: torch.Tensor, tuple or dict
            A few inputs.
        target, initial:
            Where relevance starts, see :func:`zennit_prune.initial.initial_relevance`.

        Returns
        -------
        Preflight
            The sum and the absolute mass of relevance at every stage, what the rules of layers took and what the
            operations between them made, and problems, which name the operation.
        '''
        return preflight(self.model, self.composite, self.graph._recording, x, target, initial)

    def collect(self, loader: Iterable[Any], criterion: Criterion = 'relevance', aggregate: str = 'auto',
                initial: Initial = 'auto', seed: int = 0, progress: bool = True, *, target: Any = None,
                classes: Iterable[int] | None = None, attributor: AttributorFactory | None = None,
                nonfinite: str = 'error', checkpoint: str | os.PathLike[str] | None = None,
                exemplars: int = 0) -> Relevance:
        '''Score every channel on reference data.

        Under ``torch.distributed``, all processes call this, each with the loader of its shard, and all get the same
        scores; of a ``DistributedSampler``, repeated samples are left out. For one process alone, use
        :meth:`collector`.

        Parameters
        ----------
        loader: iterable
            Yields (inputs, labels) batches; or a pair of tensors. Labels may be missing where ``initial`` is a function
            or ``target`` is given.
        criterion: str or callable
            ``'relevance'``; ``'gradient'``, ``'taylor'``, ``'taylor-weights'``, ``'activation'`` or ``'wanda'``, see
            :mod:`zennit_prune.measures`; ``'random'``, ``'l1'``, ``'l2'``, ``'fpgm'`` or ``'batchnorm'``, which do not
            look at the data, see :mod:`zennit_prune.criteria`; or a function of (graph, model, loader) that returns a
            :class:`Relevance`.
        aggregate, initial, classes, attributor, nonfinite:
            See :class:`Collector`. By default, relevance starts as a one-hot, and the gradients of other criteria start
            from the cross-entropy.
        seed: int
            For ``'random'``, and for the noise of an Attributor.
        progress: bool
            Show a progress bar on standard error.
        target:
            In place of all labels, e.g. ``'predicted'``; see :func:`zennit_prune.initial.initial_relevance`.
        checkpoint: path-like, optional
            A file that holds what was collected so far: written every half a minute and when anything ends the pass
            early, read if it is there when the pass starts, removed when it is complete. The loader has to yield the
            same batches in the same order. Each of many processes has a file of its own beside it.
        exemplars: int
            How many samples to keep for each channel, those that matter most to it: ``relevance.exemplars``, see
            :class:`zennit_prune.Exemplars`.

        Returns
        -------
        Relevance

        Raises
        ------
        PruneError
            For an unknown criterion; an empty or unlabelled loader; labels out of range; inputs or relevance that are
            not finite; a checkpoint of something else; on all processes, if any of them fails.
        '''
        if criterion == 'auto':
            raise PruneError("criterion='auto' depends on the budget: give it to Pruner.prune or Pruner.iterate, or "
                             'ask zp.choose(pruner, loader, budget) and collect by its .criterion.')
        found = criterion if callable(criterion) else known_criterion(criterion)
        if exemplars and not looks_at_data(found):
            raise PruneError(f'criterion={criterion!r} scores no samples, so that it has no exemplars: use '
                             "'relevance', or leave exemplars= out.")
        if callable(criterion):
            return criterion(self.graph, self.model, loader)
        if callable(found):
            return found(self.graph, self.model, seed)
        collector = self.collector(aggregate, initial, criterion, classes=classes, attributor=attributor,
                                   nonfinite=nonfinite, seed=seed, exemplars=exemplars)
        return collect(collector, loader, target, progress, checkpoint)

    def plan(self, relevance: Relevance, budget: Budget, min_channels: int | None = None,
             min_share: float = 0.0, round_to: int | None = None, per_cost: bool = True,
             latencies: LatencyTable | None = None, progress: bool = True) -> Plan:
        '''Choose the channels to remove: lowest relevance per cost saved first, until the budget holds.

        Parameters
        ----------
        relevance: Relevance
            The scores; groups without are kept whole.
        budget: Budget
            What is to be left of the network. A latency budget holds as predicted from ``latencies``; then both
            networks are measured side by side, and the plan says so (``plan.timing``).
        min_channels, min_share, round_to, per_cost:
            See :func:`zennit_prune.allocate.allocate`.
        latencies: LatencyTable, optional
            For latency budgets, e.g. loaded from a file, of this device or another; else that of :meth:`latencies`.
        progress: bool
            Show a progress bar on standard error while latencies are measured.

        Raises
        ------
        PruneError
            If scores do not fit the groups, or the budget is out of reach.
        '''
        if not isinstance(budget, Budget):
            raise PruneError(f'a Budget is needed, not {budget!r}: e.g. Budget(flops=0.5).')
        scores = {}
        for name, values in relevance.items():
            group = self.graph.group(name)
            if len(values) != group.size:
                raise PruneError(f'there are {len(values)} scores for group {group.name!r}, which has {group.size} '
                                 'channels.')
            scores[group.name] = values.numpy()
        costs = cost_model(self.graph)
        if budget.unit == 'latency':
            costs = LatencyModel(self.graph, self.model, latencies or self.latencies(progress=progress))
        removed = allocate(self.graph, costs, scores, budget, min_channels, min_share, round_to, per_cost)
        timing = None
        if isinstance(costs, LatencyModel):
            timing = timed(costs, self.model, removed, budget.limit(costs.latencies.original))
        return Plan(self.graph, removed, relevance.reliability() if relevance.has_halves else None, timing)

    def latencies(self, seconds: float | None = None, progress: bool = True) -> LatencyTable:
        '''What the operations of the network take where it is now, at a ladder of widths; for latency budgets.

        Measured once on each device and kept, or again where ``seconds`` are given. The batch is the example's.

        Parameters
        ----------
        seconds: float, optional
            About how long to measure, 30 by default. Large networks take longer: everything is measured three times.
        progress: bool
            Show a progress bar on standard error.
        '''
        device = device_name(device_of(self.model))
        if seconds is not None or device not in self._latencies:
            costs = LatencyModel(self.graph, self.model, None, 30.0 if seconds is None else seconds, progress)
            self._latencies[device] = costs.latencies
        return self._latencies[device]

    def prune(self, loader: Iterable[Any], budget: Budget, criterion: Criterion = 'relevance', repair: str = 'refit',
              verify: bool = True, progress: bool = True, **options: Any) -> Result:
        '''All steps at once: collect, plan, apply, repair.

        Parameters
        ----------
        loader: iterable
            As for :meth:`collect`. It is read once: what the repair needs is kept as it goes by, all inputs of up to
            1,024 samples, of more a random choice. A generator loses no batch.
        budget: Budget
            What is to be left.
        criterion: str or callable
            See :meth:`collect`; or ``'auto'``, the best of a few on references that are held out, see
            :func:`zennit_prune.choose`.
        repair: str
            ``'refit'``, ``'batchnorm'``, ``'bias'`` or ``'none'``, see :func:`zennit_prune.repair`. What was refitted
            is good at what the references show: a warning says if they show few of the classes.
        verify: bool
            See :meth:`Plan.apply`.
        progress: bool
            Show progress bars on standard error.
        **options:
            Further ones of :meth:`collect` and :meth:`plan`.

        Returns
        -------
        Result
            ``.model``, ``.plan``, ``.relevance``, ``.history``.
        '''
        seed = options.pop('seed', 0)
        return Loop(self, budget, 1.0, criterion, repair, seed=seed, verify=verify, progress=progress,
                    options=options).run(loader)

    def iterate(self, loader: Iterable[Any], budget: Budget, step: float = 0.05, criterion: Criterion = 'relevance',
                repair: str = 'refit', finetune: Callable[[nn.Module], nn.Module | None] | None = None,
                callback: Callable[[Step], object] | None = None,
                evaluate: Callable[[nn.Module], float] | None = None, floor: float | None = None,
                checkpoint: str | os.PathLike[str] | None = None, seed: int = 0, verify: bool = True,
                progress: bool = True, **options: Any) -> Result:
        '''Prune step by step, scoring the network anew as it is after each.

        Every step starts from random states of its own (of torch, NumPy and Python, restored after), so that loaders
        that shuffle, ``finetune`` and ``evaluate`` draw the same numbers in a run that was interrupted.

        Under ``torch.distributed``, all processes call this, each with the loader of its shard; references of all serve
        the repair, and what ``evaluate`` returns in the first process counts. A ``finetune`` has to train all alike.

        Parameters
        ----------
        loader: iterable
            As for :meth:`collect`. It is read at every step; a generator is held in memory.
        budget: Budget
            What is to be left in the end.
        step: float
            How much of the original's cost a step takes, in the unit of the budget.
        criterion, repair, verify, progress:
            See :meth:`prune`. The repair of every step aims at what the original network computes.
        finetune: callable, optional
            Called with the network after each repair; trains it in place, or returns it trained. See
            :func:`zennit_prune.finetune`.
        callback: callable, optional
            Called with each new :class:`zennit_prune.Step`, the original's first.
        evaluate: callable, optional
            From a network (a copy, in evaluation mode) to a number, the higher the better.
        floor: float, optional
            Stop before ``evaluate`` falls below it: the last network that does not is returned, with a warning.
        checkpoint: path-like, optional
            A folder to go on from after an interruption: the same call ends with the same bits. Removed when the run is
            complete.
        seed: int
            For whatever is drawn.
        **options:
            Further ones of :meth:`collect` and :meth:`plan`.

        Returns
        -------
        Result
            ``.plan`` leads from the original to ``.model``; ``.history`` has the original and every step.

        Raises
        ------
        PruneError
            Whatever keeps a step from being exact; a budget out of reach; a checkpoint of another run.
        '''
        held = list(loader) if isinstance(loader, Iterator) else loader
        return Loop(self, budget, step, criterion, repair, finetune, callback, evaluate, floor, seed, verify, progress,
                    options).run(held, checkpoint)

    def on(self, network: nn.Module) -> Pruner:
        '''The same composite, example and options for a pruned version of the network.'''
        return Pruner(network, self.composite, self.graph._recording.example, self.ignore, self.layernorm,
                      self.progress)

    def heatmap(self, x: Any, target: Any = 'predicted', initial: Initial = 'one-hot', *,
                channel: Channel | None = None) -> torch.Tensor:
        '''Heatmaps of the network, or of what flows through single channels, under the pruner's composite.

        Parameters
        ----------
        x, target, initial, channel:
            See :func:`zennit_prune.heatmap`.

        Returns
        -------
        torch.Tensor
            Shape (N, H, W), or (K, N, H, W) for a sequence of K channels.

        Raises
        ------
        PruneError
            See :func:`zennit_prune.heatmap`.

        Examples
        --------
        >>> import torch
        >>> import zennit_prune as zp
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
        ...                             torch.nn.Linear(144, 2))
        >>> x = torch.randn(3, 1, 8, 8)
        >>> pruner = zp.Pruner(model, None, x)
        >>> pruner.heatmap(x).shape, pruner.heatmap(x, channel=('0', 2)).shape
        (torch.Size([3, 8, 8]), torch.Size([3, 8, 8]))
        '''
        return heatmap(self.model, self.composite, x, target, initial, channel=channel, graph=self.graph)


def prune(model: nn.Module, composite: Composite | None, loader: Iterable[Any], budget: Budget,
          ignore: Sequence[str] = (), progress: bool = True, repair: str = 'refit',
          criterion: Criterion = 'relevance', layernorm: str = 'lock', **options: Any) -> nn.Module:
    '''Remove the channels of least relevance in one call: trace, collect, plan, apply, verify and repair.

    Parameters
    ----------
    model: torch.nn.Module
        The network; it is left as it is.
    composite: zennit.core.Composite or None
        The rules of relevance; None for the recommended ones.
    loader: iterable
        Yields (inputs, labels) batches; ten images a class are enough. A generator loses no batch.
    budget: Budget
        What is to be left, e.g. ``Budget(flops=0.5)``.
    ignore: sequence of str
        Patterns of module names whose output channels are kept.
    progress: bool
        Show progress bars on standard error.
    repair: str
        ``'none'`` leaves the weights that stay as they are; see :meth:`Pruner.prune`.
    criterion: str or callable
        Likewise, e.g. ``'auto'``.
    layernorm: str
        See :func:`trace`.
    **options:
        Further ones of :meth:`Pruner.prune`, e.g. ``target='predicted'`` for inputs without labels.

    Returns
    -------
    torch.nn.Module
        A new, smaller network of the same class.

    Raises
    ------
    PruneError
        Whatever keeps the result from being exact; nothing is changed.
    '''
    model = unwrapped(model)
    stream = batches(loader)
    first = next(stream, None)
    if first is None:
        raise PruneError('the loader is empty: there is nothing to collect relevance from.')
    example = map_tensors(lambda tensor: tensor.to(device_of(model)), first[0])
    pruner = Pruner(model, composite, example, ignore, layernorm, progress)
    return pruner.prune(chain([first], stream), budget, criterion, repair, progress=progress, **options).model

'''``Pruner``: a network, its rules and its channels, with a method for every step; ``prune``: all steps in one call.'''
from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn
from zennit.core import Composite

from ..errors import PruneError, names_options, options_for, options_of, unknown, warn
from ..graph._graph import check_layernorm, trace
from ..looking._heatmap import Channel, heatmap
from ..planning._allocate import allocate, check_limits, check_reachable
from ..planning._cost import Budget, cost_model
from ..planning._latency import LatencyModel, LatencyTable, check_table, timed
from ..planning._plan import Plan
from ..planning._workload import device_name
from ..relevance._attribute import AttributorFactory, checked_composite
from ..relevance._collect import Collector
from ..relevance._criteria import Criterion, known_criterion, uses_data
from ..relevance._initial import Initial, Origin
from ..relevance._outputs import Output, check_output
from ..relevance._preflight import Preflight, preflight
from ..relevance._relevance import Relevance, checked_relevance
from ..relevance._streaming import collect
from ..util._fingerprint import named
from ..util._isolation import checked_seed, seeded
from ..util._loaders import batches
from ..util._networks import device_of, prunable
from ._iterate import Loop
from ._options import AnyCriterion, check_budget, check_criterion, check_scoring, check_values, takes_options
from ._presets import Preset
from ._result import Result, Step
from ._step import Recipe, reliability_of, shares_left


class Pruner:
    '''A network, the rules that explain it, and its removable channels.

    Parameters
    ----------
    model: torch.nn.Module
        The network; no method changes it.
    composite: zennit.core.Composite, Preset or None
        The rules of relevance; None for the recommended ones: epsilon everywhere, BatchNorm merged. A preset, e.g.
        ``zp.presets.paper``, supplies its composite, and its options become the defaults of the methods.
    example: torch.Tensor, tuple, mapping or list
        An input, a tuple of arguments, keyword arguments, or a list of samples; values do not matter.
    ignore: sequence of str
        Patterns of module names whose output channels are kept; see :func:`zennit_prune.trace`.
    layernorm: str
        ``'lock'`` or ``'surviving'``; see :func:`zennit_prune.trace`.
    progress: bool
        Show progress bars on standard error; every method has an option of this name that overrides it.
    examples: sequence
        Further examples, each given like ``example``: one for every task of the network. Relevance is collected from
        the task that the loader's batches run; see :func:`zennit_prune.trace`.

    Attributes
    ----------
    graph: ChannelGraph
        The removable channels; it prints as tables.
    composite: zennit.core.Composite
        The rules in use.

    Raises
    ------
    PruneError
        If the network cannot be traced, ``composite`` is none, or an option is not known.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import zennit_prune as zp
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    >>> images, labels = torch.ones(8, 3, 8, 8), torch.arange(8) % 2
    >>> pruner = zp.Pruner(model, None, images[:1], progress=False)
    >>> relevance = pruner.collect((images, labels))
    >>> plan = pruner.plan(relevance, zp.Budget(channels=0.5))
    >>> plan.apply(model)[0].out_channels
    2
    '''

    @takes_options()
    def __init__(self, model: nn.Module, composite: Composite | Preset | None, example: Any,
                 ignore: Sequence[str] = (), layernorm: str = 'lock', progress: bool = True,
                 examples: Sequence[Any] = ()):
        self.composite, self._defaults = _rules(composite)
        self.model = prunable(model)
        self.ignore, self.layernorm, self.progress = ignore, layernorm, progress
        self.graph = trace(self.model, example, ignore, layernorm, progress, examples)
        self._latencies: dict[str, LatencyTable] = {}

    def _shows(self, progress: bool | None) -> bool:
        '''Return whether to show progress bars: as a method was told, or else as the pruner was.'''
        return self.progress if progress is None else progress

    @takes_options(Collector)
    def collector(self, aggregate: str = 'auto', initial: Initial = 'auto',
                  criterion: str | Criterion = 'relevance', **options: Any) -> Collector:
        '''Make a collector for a loop of your own, of relevance or any other criterion that uses data.

        Parameters
        ----------
        aggregate: str
            The number that relevance at all positions of a sample becomes; see :meth:`collect`.
        initial: str or callable
            The relevance at the output; see :meth:`collect`.
        criterion: str or Criterion
            A criterion that uses data; see :meth:`collect`.
        **options: object
            Further options of :class:`zennit_prune.relevance.Collector`.

        Returns
        -------
        Collector
            A collector without samples; use it as a context.

        Raises
        ------
        PruneError
            For a criterion that uses no data, or an option that is not known or out of range.

        Examples
        --------
        >>> pruner = zp.Pruner(model, None, example, progress=False)
        >>> with pruner.collector() as collector:
        ...     collector.update(images, labels)
        >>> collector.compute()['conv1'].shape
        torch.Size([8])
        '''
        return Collector(self.graph, self.model, self.composite, aggregate, initial, criterion=criterion, **options)

    @takes_options()
    def preflight(self, x: Any, target: Any = 'predicted', initial: Initial = 'one-hot', *, output: Output = None
                  ) -> Preflight:
        '''Test whether relevance is sound on this network; print the result to read it.

        Parameters
        ----------
        x: torch.Tensor, tuple or dict
            A few inputs, shape (N, ...).
        target: torch.Tensor, callable or ``'predicted'``
            The classes that relevance starts at, shape (N,) or as in :func:`zennit_prune.heatmap`.
        initial: str or callable
            The relevance at the target; see :func:`zennit_prune.heatmap`.
        output: int, str or callable, optional
            The output that relevance starts from, where the network returns several tensors; see :meth:`collect`.

        Returns
        -------
        Preflight
            The sum and the L1 norm of relevance at every stage, the relevance absorbed by biases and stabilizers, the
            conservation error of the operations between layers, and problems, which name the operation.

        Raises
        ------
        PruneError
            If the network does not run with these inputs, or for a target that does not fit.

        Examples
        --------
        >>> pruner = zp.Pruner(model, None, example, progress=False)
        >>> pruner.preflight(images[:2]).problems
        ()
        '''
        check_output(output)
        return preflight(self.model, self.composite, self.graph._recording, x,
                         Origin(target, initial, output, inputs=x))

    @takes_options()
    def collect(self, loader: Iterable[Any], criterion: AnyCriterion = 'relevance', aggregate: str = 'auto',
                initial: Initial = 'auto', output: Output = None, seed: int = 0, progress: bool | None = None, *,
                target: Any = None, classes: Iterable[int] | None = None, attributor: AttributorFactory | None = None,
                nonfinite: str = 'error', checkpoint: str | os.PathLike[str] | None = None,
                exemplars: int = 0) -> Relevance:
        '''Score every channel on reference data.

        Under ``torch.distributed``, all processes call this, each with the loader of its shard, and all get the same
        scores; the samples that a ``DistributedSampler`` repeats are left out. For one process alone, use
        :meth:`collector`.

        Parameters
        ----------
        loader: iterable
            Yields batches: (inputs, labels), a dict with both, or another form on the page "Loaders"; or a pair of
            tensors. Labels may be missing where ``initial`` is a function or ``target`` is given.
        criterion: str or callable
            ``'relevance'``; ``'gradient'``, ``'taylor'``, ``'taylor-weights'``, ``'activation'`` or ``'wanda'``;
            ``'random'``, ``'l1'``, ``'l2'``, ``'fpgm'`` or ``'batchnorm'``, which use no data; or a function of
            (graph, model, loader) that returns a :class:`Relevance`.
        aggregate: str
            The number that relevance at all positions of a sample becomes before the mean over samples: ``'abs'``,
            ``'sumabs'``, ``'signed'`` or ``'positive'``, see :class:`zennit_prune.relevance.Collector`. ``'auto'``
            depends on the rules.
        initial: str or callable
            The relevance at the output, see :class:`zennit_prune.relevance.Collector`. ``'auto'`` is ``'one-hot'`` for
            relevance; the gradients of other criteria start from the cross-entropy. For a regression, ``'value'``.
        output: int, str or callable, optional
            The output that relevance starts from, where the network returns several tensors: an index, a key or
            attribute (``'logits'``), or a function of what it returns, whose result has its classes in dimension 1. By
            default, the one that is called ``'logits'`` or ``'out'``, or the only one.
        seed: int
            The seed of ``'random'``, and of the noise of an Attributor.
        progress: bool, optional
            Show a progress bar on standard error; as the pruner unless given.
        target: torch.Tensor, callable or str, optional
            A target for all samples in place of the labels of the loader, e.g. ``'predicted'``.
        classes: iterable of int, optional
            The labels of the samples that count; by default, all samples do.
        attributor: callable, optional
            One of Zennit's Attributor classes, or a function from a model to an Attributor, in place of the gradient.
        nonfinite: str
            ``'error'`` raises an error where an input or relevance is not finite, ``'skip'`` leaves the sample out.
        checkpoint: path-like, optional
            A file that holds what was collected so far: written every half a minute and when anything ends the pass
            early, read if it is there when the pass starts, removed when it is complete. The loader has to yield the
            same batches in the same order. Each of many processes has a file of its own beside it.
        exemplars: int
            The number of reference samples to keep for each channel, those with the most relevance, as
            ``relevance.exemplars``.

        Returns
        -------
        Relevance
            A score for every channel of every group, shape (channels,) each.

        Raises
        ------
        PruneError
            For an unknown criterion; an empty or unlabelled loader; labels out of range; inputs or relevance that are
            not finite; a checkpoint of something else; on all processes, if any of them fails.

        Examples
        --------
        >>> pruner = zp.Pruner(model, None, example, progress=False)
        >>> relevance = pruner.collect(loader)
        >>> relevance['conv1'].shape, relevance.info['samples']
        (torch.Size([8]), 8)
        '''
        check_criterion(criterion)
        check_scoring(criterion, aggregate=aggregate, initial=initial, classes=classes, attributor=attributor,
                      nonfinite=nonfinite, seed=seed, exemplars=exemplars, target=target, output=output)
        found = criterion if callable(criterion) else known_criterion(criterion)
        if exemplars and not uses_data(found):
            raise PruneError(f'criterion={criterion!r} scores no samples, so that it has no reference samples: '
                             "use 'relevance', or leave exemplars= out.")
        if callable(criterion):
            return checked_relevance(criterion(self.graph, self.model, loader), f'criterion={named(criterion)}')
        if callable(found):
            return found(self.graph, self.model, checked_seed(seed))
        collector = self.collector(aggregate, initial, criterion, classes=classes, attributor=attributor,
                                   nonfinite=nonfinite, seed=seed, exemplars=exemplars, output=output)
        return collect(collector, loader, target, self._shows(progress), checkpoint)

    @takes_options()
    def plan(self, relevance: Relevance, budget: Budget, min_channels: int | None = None, min_share: float = 0.0,
             round_to: int | None = None, per_cost: bool = True, latencies: LatencyTable | None = None,
             progress: bool | None = None) -> Plan:
        '''Choose the channels to remove: lowest relevance per cost saved first, until the budget holds.

        Parameters
        ----------
        relevance: Relevance
            The scores; groups without are kept whole.
        budget: Budget
            The amount to be left of the network. A latency budget holds as predicted from ``latencies``; then both
            networks are measured side by side, and the plan says so (``plan.timing``).
        min_channels: int, optional
            The least number of channels of each group that are kept; 1 by default.
        min_share: float
            The least share of each group that is kept, from 0 to 1.
        round_to: int, optional
            Groups that lose channels keep a multiple of this number.
        per_cost: bool
            Divide the score of a channel by what its removal saves, in the budget's unit, per layer that produces it.
        latencies: LatencyTable, optional
            For latency budgets, e.g. loaded from a file, of this device or another; else that of :meth:`latencies`.
        progress: bool, optional
            Show a progress bar on standard error while latencies are measured; as the pruner unless given.

        Returns
        -------
        Plan
            The channels to remove; nothing is removed yet.

        Raises
        ------
        PruneError
            If scores do not fit the groups, or the budget is out of reach.

        Examples
        --------
        >>> pruner = zp.Pruner(model, None, example, progress=False)
        >>> plan = pruner.plan(zp.Relevance({'conv2': [0.3, 0.1, 0.4, 0.2, 0.6, 0.5]}), zp.Budget(channels=12))
        >>> dict(plan.removed)
        {'conv2': (1, 3)}
        '''
        check_budget(budget)
        check_table(latencies)
        relevance = checked_relevance(relevance, 'relevance')
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

    @takes_options()
    def latencies(self, seconds: float | None = None, progress: bool | None = None) -> LatencyTable:
        '''Measure the latency of the network's operations at several widths, on the device where it is now.

        Latency budgets need this. It is measured once on each device and kept, or again where ``seconds`` are given.
        The batch is the example's.

        Parameters
        ----------
        seconds: float, optional
            The approximate duration of the measurement in seconds, 30 by default. Large networks take longer:
            everything is measured three times.
        progress: bool, optional
            Show a progress bar on standard error; as the pruner unless given.

        Returns
        -------
        LatencyTable
            The medians, to be saved or given to :meth:`plan`.

        Examples
        --------
        >>> pruner = zp.Pruner(model, None, example, progress=False)
        >>> latencies = pruner.latencies(seconds=0.1)
        >>> latencies.original > 0
        True
        '''
        device = device_name(device_of(self.model))
        if seconds is not None or device not in self._latencies:
            costs = LatencyModel(self.graph, self.model, None, 30.0 if seconds is None else seconds,
                                 self._shows(progress))
            self._latencies[device] = costs.latencies
        return self._latencies[device]

    @takes_options(collect, plan)
    def prune(self, loader: Iterable[Any], budget: Budget, criterion: AnyCriterion = 'relevance', repair: str = 'refit',
              verify: bool = True, progress: bool | None = None, seed: int = 0, **options: Any) -> Result:
        '''Prune in one step: collect, plan, apply and repair.

        Parameters
        ----------
        loader: iterable
            Batches of reference data, as for :meth:`collect`. It is read once, and at most 1,024 inputs are kept for
            the repair, a uniform subset beyond that. A generator loses no batch.
        budget: Budget
            The amount to be left.
        criterion: str or callable
            See :meth:`collect`; or ``'auto'``: the network is pruned and repaired with three quarters of the
            references by each of a few criteria, and the one is used whose outputs for the others are closest to the
            original's (``result.choice``).
        repair: str
            ``'refit'``, ``'batchnorm'``, ``'bias'`` or ``'none'``, see :func:`zennit_prune.repair`. A refitted network
            is good at what the references show: a warning says if they show few of the classes.
        verify: bool
            Compare the outputs with those of the masked original; see :meth:`Plan.apply`.
        progress: bool, optional
            Show progress bars on standard error; as the pruner unless given.
        seed: int
            The seed of all random numbers.
        **options: object
            Further options of :meth:`collect` and :meth:`plan`.

        Returns
        -------
        Result
            The pruned and repaired network (``.model``), with ``.plan``, ``.relevance``, ``.history`` and ``.choice``.

        Raises
        ------
        PruneError
            For an option that is not known, or a budget that is out of reach, before any data are read; for whatever
            keeps the result from being exact.

        Examples
        --------
        >>> pruner = zp.Pruner(model, None, example, progress=False)
        >>> result = pruner.prune(loader, zp.Budget(channels=0.5), repair='none')
        >>> result
        Result(Sequential, Plan(7 channels of 2 groups removed), 1 steps: Budget(channels=0.5) is reached.)
        '''
        began = time.perf_counter()
        if 'step' in self._defaults:
            warn(f'the preset prunes in steps of {self._defaults["step"]:.0%}, but prune takes a single one: use '
                 'Pruner.iterate.')
        recipe = self._recipe(budget, criterion, repair, seed, verify, progress, options)
        recipe, loader, choice = recipe.decided(loader)
        with seeded(recipe.seed + 1, recipe.device):
            done = recipe.step(recipe.references(loader), budget)
        history = (Step(0, shares_left(Plan(self.graph))),
                   Step(1, shares_left(done.plan), None, reliability_of(done.relevance), time.perf_counter() - began))
        return Result(done.network, done.plan, done.relevance, history, f'{budget!r} is reached.', choice)

    @takes_options(collect, plan)
    def iterate(self, loader: Iterable[Any], budget: Budget, step: float = 0.05, criterion: AnyCriterion = 'relevance',
                repair: str = 'refit', finetune: Callable[[nn.Module], nn.Module | None] | None = None,
                callback: Callable[[Step], object] | None = None,
                evaluate: Callable[[nn.Module], float] | None = None, min_score: float | None = None,
                checkpoint: str | os.PathLike[str] | None = None, seed: int = 0, verify: bool = True,
                progress: bool | None = None, **options: Any) -> Result:
        '''Prune step by step, and score the network anew after each step.

        Every step starts from random states of its own (of torch, NumPy and Python, restored after), so that loaders
        that shuffle, ``finetune`` and ``evaluate`` draw the same numbers in a run that was interrupted.

        Under ``torch.distributed``, all processes call this, each with the loader of its shard; references of all serve
        the repair, and what ``evaluate`` returns in the first process counts. A ``finetune`` has to train all alike.

        Parameters
        ----------
        loader: iterable
            Batches of reference data, as for :meth:`collect`. It is read at every step; a generator is held in memory.
        budget: Budget
            The amount to be left in the end.
        step: float
            The share of the original's cost that a step removes, in the unit of the budget.
        criterion: str or callable
            The criterion of all steps; see :meth:`prune`.
        repair: str
            The method of repair after every step; see :meth:`prune`. Its target is the output of the original network.
        finetune: callable, optional
            Called with the network after each repair; trains it in place, or returns it trained. See
            :func:`zennit_prune.finetune`.
        callback: callable, optional
            Called with each new :class:`Step`, the original's first.
        evaluate: callable, optional
            From a network (a copy, in evaluation mode) to a number, the higher the better.
        min_score: float, optional
            Stop before ``evaluate`` returns less: the last network that reaches it is returned, with a warning.
        checkpoint: path-like, optional
            A folder from which an interrupted run is resumed: an equal call ends with equal bits. Removed when the run
            is complete.
        seed: int
            The seed of all random numbers.
        verify: bool
            Compare the outputs of every step with those of the masked original; see :meth:`Plan.apply`.
        progress: bool, optional
            Show progress bars on standard error; as the pruner unless given.
        **options: object
            Further options of :meth:`collect` and :meth:`plan`.

        Returns
        -------
        Result
            ``.plan`` leads from the original to ``.model``; ``.history`` has the original and every step; the scores
            (and reference samples) in ``.relevance`` are those of the original.

        Raises
        ------
        PruneError
            For an option that is not known, or a budget that is out of reach, before any data are read; for whatever
            keeps a step from being exact; for a checkpoint of another run.

        Examples
        --------
        >>> pruner = zp.Pruner(model, None, example, progress=False)
        >>> result = pruner.iterate((), zp.Budget(channels=0.5), step=0.25, criterion='l1', repair='none')
        >>> [f'{step.left["channels"]:.0%}' for step in result.history]
        ['100%', '71%', '50%']
        '''
        recipe = self._recipe(budget, criterion, repair, seed, verify, progress, options)
        held = list(loader) if isinstance(loader, Iterator) else loader
        return Loop(recipe, step, finetune, callback, evaluate, min_score).run(held, checkpoint)

    def _recipe(self, budget: Budget, criterion: AnyCriterion, repair: str, seed: int, verify: bool,
                progress: bool | None, options: dict[str, Any]) -> Recipe:
        '''Return the recipe of a run, after a check of all that can be known without data.'''
        check_values(budget, criterion, repair, **options)
        check_table(options.get('latencies'))
        planning = {name: value.item() if isinstance(value, np.integer) else value
                    for name, value in options_for(Pruner.plan, options).items()}
        collecting = {name: value for name, value in options.items() if name not in planning}
        if self.graph.groups:
            check_reachable(self.graph, budget, **options_for(check_limits, planning))
        return Recipe(self, budget, criterion, repair, checked_seed(seed), verify, self._shows(progress), collecting,
                      planning)

    @names_options()
    def on(self, network: nn.Module, progress: bool | None = None) -> Pruner:
        '''Make a pruner with the same composite, examples and options for a pruned version of the network.

        Parameters
        ----------
        network: torch.nn.Module
            The pruned network, repaired or trained on.
        progress: bool, optional
            Show progress bars on standard error; as this pruner unless given.

        Returns
        -------
        Pruner
            A new pruner, whose network is traced anew.

        Examples
        --------
        >>> pruner = zp.Pruner(model, None, example, progress=False)
        >>> small = zp.Plan(pruner.graph, {'conv1': [0, 1]}).apply(model)
        >>> pruner.on(small).graph.group('conv1').size
        6
        '''
        example, *further = self.graph._recording.examples
        pruner = Pruner(network, self.composite, example, self.ignore, self.layernorm, self._shows(progress), further)
        pruner._defaults = self._defaults
        return pruner

    @takes_options()
    def heatmap(self, x: Any, target: Any = 'predicted', initial: Initial = 'one-hot', *,
                channel: Channel | None = None, output: Output = None) -> torch.Tensor:
        '''Compute heatmaps of the network, or of single channels, under the pruner's composite.

        Parameters
        ----------
        x: torch.Tensor, tuple or dict
            The inputs, shape (N, C, H, W).
        target: torch.Tensor, callable or ``'predicted'``
            The classes that relevance starts at, shape (N,) or as in :func:`zennit_prune.heatmap`.
        initial: str or callable
            The relevance at the target; see :func:`zennit_prune.heatmap`.
        channel: tuple of (str or ChannelGroup, int or sequence of int), optional
            A group and one or several positions in it, e.g. ``('layer1.0.conv1', 3)``.
        output: int, str or callable, optional
            The output that relevance starts from, where the network returns several tensors; see :meth:`collect`.

        Returns
        -------
        torch.Tensor
            The heatmaps, on the CPU, shape (N, H, W), or (K, N, H, W) for a sequence of K channels.

        Raises
        ------
        PruneError
            If inputs, targets or the channel do not fit the network, or relevance is not finite.

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
        return heatmap(self.model, self.composite, x, target, initial, channel=channel, graph=self.graph,
                       output=output)


def _rules(given: Composite | Preset | None) -> tuple[Composite, dict[str, Any]]:
    '''Return the composite that was given, of a preset or recommended, and the options of a preset.'''
    if isinstance(given, Preset):
        _check_preset(given)
        return checked_composite(given), dict(given._options)
    return checked_composite(given), {}


def _check_preset(preset: Preset) -> None:
    '''Refuse a preset that sets what no method knows.'''
    known = dict.fromkeys(name for method in (Pruner.prune, Pruner.iterate) for name in options_of(method))
    for name in preset._options:
        if name not in known:
            raise unknown(f'{preset!r}: option', name, known)


@takes_options(Pruner.__init__, Pruner.prune)
def prune(model: nn.Module, composite: Composite | Preset | None, loader: Iterable[Any], budget: Budget,
          ignore: Sequence[str] = (), layernorm: str = 'lock', progress: bool = True, examples: Sequence[Any] = (),
          **options: Any) -> nn.Module:
    '''Remove the channels of least relevance in one call: trace, collect, plan, apply, verify and repair.

    Parameters
    ----------
    model: torch.nn.Module
        The network; it is left as it is.
    composite: zennit.core.Composite, Preset or None
        The rules of relevance; None for the recommended ones. Or a preset, e.g. ``zp.presets.paper``.
    loader: iterable
        Yields (inputs, labels) batches; ten images a class are enough. A generator loses no batch. The first batch is
        the example that the network is traced and verified with.
    budget: Budget
        The amount to be left, e.g. ``Budget(flops=0.5)``. A latency budget is the time of a whole batch of that size.
    ignore: sequence of str
        Patterns of module names whose output channels are kept.
    layernorm: str
        ``'lock'`` or ``'surviving'``; see :func:`zennit_prune.trace`.
    progress: bool
        Show progress bars on standard error.
    examples: sequence
        Further examples, one for every task that the loader's batches do not run; see :func:`zennit_prune.trace`.
    **options: object
        Options of :meth:`Pruner.prune` (``repair``, ``criterion``, ``verify``, ``seed``), :meth:`Pruner.collect` and
        :meth:`Pruner.plan`, e.g. ``target='predicted'`` for inputs without labels, or ``repair='none'``, which leaves
        the weights that stay as they are.

    Returns
    -------
    torch.nn.Module
        A new, smaller network of the same class.

    Raises
    ------
    PruneError
        For an option that is not known, before any data are read; for whatever keeps the result from being exact.
        Nothing is changed then.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import zennit_prune as zp
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    >>> batches = [(torch.ones(8, 3, 8, 8), torch.arange(8) % 2)]
    >>> small = zp.prune(model, None, batches, zp.Budget(flops=0.5), repair='none', progress=False)
    >>> small[0].out_channels, model[0].out_channels
    (2, 4)
    '''
    model = prunable(model)
    _, defaults = _rules(composite)
    check_layernorm(layernorm)
    check_values(budget, **{**defaults, **options})
    stream = batches(loader, network=model)
    first = next(stream, None)
    if first is None:
        once = ' A generator is read once: make it anew.' if isinstance(loader, Iterator) else ''
        raise PruneError(f'the loader is empty: there is nothing to collect relevance from.{once}')
    if not first.size:
        raise PruneError('the first batch of the loader is empty, and the network is traced with it: leave out empty '
                         'batches, e.g. loader = ((x, y) for x, y in loader if len(x)).')
    example = first.to(device_of(model)).inputs
    pruner = Pruner(model, composite, example, ignore, layernorm, progress, examples)
    return pruner.prune(chain([first], stream), budget, **options).model

'''Stream channel relevance out of a Zennit composite, in memory that does not grow with the number of samples.'''
from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from zennit.core import Composite
from zennit.rules import AlphaBeta, Epsilon, Flat, Gamma, WSquare, ZBox, ZPlus

from .attribute import (
    Attribution,
    Initial,
    Reader,
    attributing,
    call_network,
    differentiable,
    initial_relevance,
    main_output,
    propagate,
)
from .canonize import GraphCanonizer
from .errors import PruneError, PruneWarning
from .graph import ChannelGraph
from .relevance import Relevance
from .states import State, find_states
from .trace import Place

SIGNED_RULES = (AlphaBeta, Flat, Gamma, WSquare, ZBox, ZPlus)  # contributions of either sign are kept apart
AGGREGATES = ('auto', 'abs', 'sumabs', 'signed', 'positive')


class Collector:
    '''Accumulate channel relevance batch by batch.

    Relevance is read at the channels' states: the tensors that carry a channel's complete value. Per sample it is
    summed over space and aggregated; the score is the mean over samples, and over states where a group has several (a
    residual stream).

    Parameters
    ----------
    graph: ChannelGraph
        The channels.
    model: torch.nn.Module
        The network that was traced; it is copied, never changed.
    composite: zennit.core.Composite
        The rules; the canonizer of the graph is applied after the composite's own.
    aggregate: str
        What is averaged over samples: ``'abs'``, the absolute value of the sum over space; ``'sumabs'``, the sum of
        absolute values; ``'signed'``, the sum; ``'positive'``, its positive part; ``'auto'``, ``'sumabs'`` where most
        rules keep positive and negative contributions apart (gamma, alpha-beta, z-plus), else ``'abs'``.
    initial: str or callable
        See :func:`zennit_prune.attribute.initial_relevance`.

    Attributes
    ----------
    samples: int
        How many were added so far.
    notes: list of str
        What the user is warned of on entering: rules that are not LRP, groups whose relevance cannot be read.

    Examples
    --------
    >>> with Collector(graph, model, EpsilonPlus()) as collector:
    ...     for inputs, labels in loader:
    ...         collector.update(inputs, labels)
    >>> relevance = collector.compute()
    '''

    criterion = 'relevance'

    def __init__(self, graph: ChannelGraph, model: nn.Module, composite: Composite, aggregate: str = 'auto',
                 initial: Initial = 'one-hot'):
        if aggregate not in AGGREGATES:
            raise PruneError(f'aggregate={aggregate!r} is unknown: use one of {", ".join(map(repr, AGGREGATES))}.')
        if not graph.groups:
            raise PruneError('the network has no removable channel to collect relevance for; print(graph) says what '
                             'locks them.')
        self.graph, self.model, self.composite = graph, model, composite
        self.aggregate, self.initial = aggregate, initial
        self.states, self.unread = self._find_states()
        self.samples = 0
        self.notes: list[str] = []
        self._sums: dict[str, torch.Tensor] = {}
        self._counts = [0, 0]
        self._context: AbstractContextManager[Any] | None = None

    def _find_states(self) -> tuple[list[State], dict[str, str]]:
        return find_states(self.graph)

    def _attributing(self) -> AbstractContextManager[Attribution]:
        places = [state.place for state in self.states]
        canonizer = GraphCanonizer.from_recording(self.graph.recording)
        return attributing(self.model, self.composite, canonizer, lambda network: Reader(network, places))

    def __enter__(self) -> Collector:
        if self._context is not None:
            raise PruneError('the collector is open already.')
        context = self._attributing()
        network, reader, registered = context.__enter__()
        assert reader is not None
        self._network, self._reader, self._registered, self._context = network, reader, registered, context
        if self.aggregate == 'auto':
            self.aggregate = suitable_aggregate(self._registered)
        try:
            self._warn()
        except Warning:  # where warnings are errors
            self.__exit__(None, None, None)
            raise
        return self

    def _warn(self) -> None:
        self.notes = []
        ruled = any(isinstance(hook, (Epsilon, *SIGNED_RULES)) for hook in self._registered.hook_refs)
        if self.criterion == 'relevance' and not ruled:
            self.notes.append(f'{type(self.composite).__name__} holds no rule of LRP for any layer of this network: '
                              'the scores are modified gradients, which are not conserved from layer to layer')
        if self.unread:
            self.notes.append('the relevance of some groups cannot be read, so they will be kept whole: '
                              + '; '.join(f'{name} ({why})' for name, why in self.unread.items()))
        for note in self.notes:
            warnings.warn(note, PruneWarning, stacklevel=3)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._context is not None:
            context, self._context = self._context, None
            del self._network, self._reader, self._registered
            context.__exit__(kind, error, trace)

    def update(self, inputs: Any, target: Any = None) -> None:
        '''Add a batch.

        Parameters
        ----------
        inputs: torch.Tensor, tuple or dict
            What the network is called with; moved to its device.
        target: torch.Tensor, callable, ``'predicted'`` or None
            See :func:`zennit_prune.attribute.initial_relevance`; may be None where ``initial`` is a function.

        Raises
        ------
        PruneError
            Outside the ``with`` block; for inputs or targets that do not fit; for relevance that is not finite. The
            batch is then not counted.
        '''
        if self._context is None:
            raise PruneError('a collector is updated inside its with block: with pruner.collector() as collector: ...')
        self._add(*self._measured(inputs, target))

    def _measured(self, inputs: Any, target: Any) -> tuple[dict[Place, torch.Tensor], int]:
        '''The relevance at every state of a batch, each shaped as the tensor there, and the size of the batch.'''
        inputs = differentiable(inputs, self._network)
        try:
            with torch.enable_grad():
                output = main_output(call_network(self._network, inputs))
                start = initial_relevance(output, target, self.initial)
                caught = list(self._reader.caught.items())
                if not caught:
                    raise PruneError('none of the tensors that carry channels was met: a canonizer replaces the '
                                     'forward of the modules that hold them.')
                relevance = propagate(output, start, [edge for _, edge in caught])
        finally:
            self._forget_batch()
        return {place: values.detach() for (place, _), values in zip(caught, relevance) if values is not None}, \
            output.shape[0]

    def _forget_batch(self) -> None:
        '''Zennit's hooks keep tensors and handles of every pass until they are removed.'''
        self._reader.clear()
        for hook in list(self._registered.hook_refs):
            hook.remove()

    def _add(self, relevance: dict[Place, torch.Tensor], batch: int) -> None:
        totals: dict[str, torch.Tensor] = {}
        covered: dict[str, torch.Tensor] = {}
        for state in self.states:
            if state.place in relevance:
                values = self._aggregated(state, relevance[state.place], batch)
                here = torch.bincount(state.positions.reshape(-1), minlength=state.size + 1)[:state.size] > 0
                totals[state.group] = totals[state.group] + values if state.group in totals else values
                covered[state.group] = covered.get(state.group, torch.zeros(state.size)) + here
        lost = sorted({state.group for state in self.states} - set(totals))
        if lost:
            raise PruneError(f'no relevance arrives at {", ".join(map(repr, lost))}: the target does not depend on '
                             'these channels, or a canonizer hides them. Start from an output that depends on them, or '
                             'trace with them in ignore.')
        for name, values in totals.items():
            if not torch.isfinite(values).all():
                raise PruneError(f'the relevance of group {name!r} is not finite: a rule divides by zero or overflows. '
                                 'Use a rule with a larger epsilon, or attribute in float32 or float64.')
        odd = self.samples % 2
        for name, values in totals.items():
            values = values / covered[name].clamp(min=1).to(values.device)
            halves = torch.stack([values[odd::2].sum(0), values[1 - odd::2].sum(0)])
            self._sums[name] = self._sums[name] + halves if name in self._sums else halves
        self._counts[0] += len(range(odd, batch, 2))
        self._counts[1] += len(range(1 - odd, batch, 2))
        self.samples += batch

    def _aggregated(self, state: State, relevance: torch.Tensor, batch: int) -> torch.Tensor:
        if relevance.shape[0] % batch:
            raise PruneError(f'relevance at {state.place.module!r} has shape {tuple(relevance.shape)} for a batch of '
                             f'{batch}: its first dimension does not hold the samples.')
        if self.aggregate == 'sumabs':
            return state.per_sample(relevance.abs(), batch)
        values = state.per_sample(relevance, batch)
        if self.aggregate == 'abs':
            return values.abs()
        return values.clamp(min=0) if self.aggregate == 'positive' else values

    def merge(self, other: Collector) -> Collector:
        '''Add what another collector of the same network, rules and aggregation saw.

        Raises
        ------
        PruneError
            If the two do not fit together.
        '''
        groups, others = ([(group.name, group.size) for group in collector.graph.groups] for collector in (self, other))
        if groups != others:
            raise PruneError('the collectors are for different networks: their groups differ.')
        if not self.samples and self.aggregate == 'auto':
            self.aggregate = other.aggregate
        for what in ('criterion', 'aggregate', 'initial'):
            if other.samples and getattr(other, what) != getattr(self, what):
                raise PruneError(f'the collectors differ in {what}: {getattr(self, what)!r} and '
                                 f'{getattr(other, what)!r}.')
        for name, values in other._sums.items():
            mine = self._sums.get(name)
            self._sums[name] = values.clone() if mine is None else mine + values.to(mine.device)
        self._counts = [ours + theirs for ours, theirs in zip(self._counts, other._counts)]
        self.samples += other.samples
        return self

    def compute(self) -> Relevance:
        '''The mean over all samples so far.

        Raises
        ------
        PruneError
            If no batch was added.
        '''
        if not self.samples:
            raise PruneError('there was no sample to collect relevance from: the loader is empty, or no batch was '
                             'added.')
        if not any(values.any() for values in self._sums.values()):
            raise PruneError("all relevance is zero: the targets do not depend on any channel, or the network's last "
                             'layer is zero.')
        counts = torch.tensor(self._counts, dtype=torch.float64).clamp(min=1).unsqueeze(1)
        sums = {name: values.to('cpu', torch.float64) for name, values in self._sums.items()}
        initial = self.initial if isinstance(self.initial, str) else getattr(self.initial, '__name__', 'function')
        return Relevance({name: values.sum(0) / self.samples for name, values in sums.items()},
                         {name: values / counts for name, values in sums.items()},
                         {'criterion': self.criterion, 'composite': type(self.composite).__name__,
                          'aggregate': self.aggregate, 'initial': initial, 'samples': self.samples,
                          'notes': self.notes})


def suitable_aggregate(composite: Composite) -> str:
    '''What suits the rules in force: ``'sumabs'`` where most keep contributions of both signs apart, else ``'abs'``.'''
    apart = sum(isinstance(hook, SIGNED_RULES) for hook in composite.hook_refs)
    together = sum(isinstance(hook, Epsilon) for hook in composite.hook_refs)
    return 'sumabs' if apart > together else 'abs'


def batches(loader: Iterable[Any], progress: str | None = None) -> Iterator[tuple[Any, Any]]:
    '''Pairs of inputs and target (None where there is none) from whatever yields batches.

    Parameters
    ----------
    loader: iterable
        Yields (inputs, target) pairs, or inputs alone; a pair of tensors is cut into batches of 32.
    progress: str, optional
        What a progress bar on standard error says.
    '''
    if isinstance(loader, torch.Tensor):
        loader = loader.split(32)
    elif isinstance(loader, tuple) and len(loader) == 2 and all(isinstance(part, torch.Tensor) for part in loader):
        if len(loader[0]) != len(loader[1]):
            raise PruneError(f'there are {len(loader[0])} inputs and {len(loader[1])} labels.')
        loader = list(zip(loader[0].split(32), loader[1].split(32)))
    elif not isinstance(loader, Iterable) or isinstance(loader, (str, dict)):
        raise PruneError(f'a loader yields batches of (inputs, labels); a {type(loader).__name__} does not.')
    try:
        total = len(loader)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a DataLoader of an IterableDataset
        total = None
    for batch in tqdm(loader, progress, total, disable=progress is None, leave=False):
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            yield batch[0], batch[1]
        elif isinstance(batch, (tuple, list)) and len(batch) == 1:
            yield batch[0], None
        elif isinstance(batch, (torch.Tensor, dict)):
            yield batch, None
        else:
            raise PruneError('a batch is (inputs, labels), inputs alone, or a dict of inputs; a '
                             f'{type(batch).__name__} is not.')

'''Stream channel relevance out of a Zennit composite, in memory that does not grow with the number of samples.

How relevance over space becomes one number, and which way suits the rules in force.
'''
from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import nn
from zennit.attribution import Attributor
from zennit.core import Composite
from zennit.rules import AlphaBeta, Epsilon, Flat, Gamma, WSquare, ZBox, ZPlus

from ..errors import PruneError, PruneWarning
from ..graph._graph import ChannelGraph
from ..tracing._boundaries import Place
from ..util._fingerprint import described, fingerprint, named
from ..util._networks import device_of, tensors_by_module
from ._attribute import (
    Attribution,
    AttributorFactory,
    Passes,
    Reader,
    attributed,
    attributing,
    call_network,
    differentiable,
    main_output,
    propagate,
)
from ._canonize import GraphCanonizer
from ._exemplars import Best, Exemplars, Spots
from ._initial import Initial, checked_classes, shares, starts
from ._relevance import Relevance
from ._selection import Selection
from ._states import State, find_states
from ._sums import Sums

SIGNED_RULES = (AlphaBeta, Flat, Gamma, WSquare, ZBox, ZPlus)  # contributions of either sign are kept apart
AGGREGATES = ('auto', 'abs', 'sumabs', 'signed', 'positive')


def holds_lrp(composite: Composite) -> bool:
    '''Whether any rule in force is one of LRP.'''
    return any(isinstance(hook, (Epsilon, *SIGNED_RULES)) for hook in composite.hook_refs)


def suitable_aggregate(composite: Composite) -> str:
    '''What suits the rules in force: ``'sumabs'`` where most keep contributions of both signs apart, else ``'abs'``.'''
    apart = sum(isinstance(hook, SIGNED_RULES) for hook in composite.hook_refs)
    together = sum(isinstance(hook, Epsilon) for hook in composite.hook_refs)
    return 'sumabs' if apart > together else 'abs'


def aggregated(how: str, state: State, relevance: torch.Tensor, batch: int) -> torch.Tensor:
    '''The score of every sample and channel at a state, shape (batch, size of the group).'''
    if relevance.shape[0] % batch:
        raise PruneError(f'relevance at {state.place.module!r} has shape {tuple(relevance.shape)} for a batch of '
                         f'{batch}: its first dimension does not hold the samples.')
    if how == 'sumabs':
        return state.per_sample(relevance.abs(), batch)
    values = state.per_sample(relevance, batch)
    if how == 'abs':
        return values.abs()
    return values.clamp(min=0) if how == 'positive' else values


NONFINITE = ('error', 'skip')


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
        See :func:`zennit_prune.initial.initial_relevance`.
    classes: iterable of int, optional
        Only samples with one of these labels are counted; predictions and rivals are taken among these classes.
    attributor: callable, optional
        One of Zennit's Attributor classes, or a function from a model to an Attributor, in place of the gradient:
        relevance is the mean over its passes.
    nonfinite: str
        What happens to a sample whose input or relevance is not finite: ``'error'``; or ``'skip'``, it is left out, and
        a warning says so.
    seed: int
        For the noise of an Attributor.
    exemplars: int
        How many samples to keep for each channel, those with the largest scores; see
        :class:`zennit_prune.Exemplars`.

    Attributes
    ----------
    sums: Sums
        What was added up so far: ``.samples`` were counted of ``.seen``, in ``.batches``.
    notes: list of str
        What the user is warned of: rules that are not LRP, groups whose relevance cannot be read, unsound relevance.
    gates: set of str
        Groups inside gates (of squeeze-excitation, say): rules hold gates constant, so that no relevance arrives there.

    Examples
    --------
    >>> with Collector(graph, model, EpsilonPlus()) as collector:
    ...     for inputs, labels in loader:
    ...         collector.update(inputs, labels)
    >>> relevance = collector.compute()
    '''

    criterion = 'relevance'
    per_sample = True  # whether a sample's score has a meaning of its own

    def __init__(self, graph: ChannelGraph, model: nn.Module, composite: Composite, aggregate: str = 'auto',
                 initial: Initial = 'one-hot', *, classes: Iterable[int] | None = None,
                 attributor: AttributorFactory | None = None, nonfinite: str = 'error', seed: int = 0,
                 exemplars: int = 0):
        for option, value, known in (('aggregate', aggregate, AGGREGATES), ('nonfinite', nonfinite, NONFINITE)):
            if value not in known:
                raise PruneError(f'{option}={value!r} is unknown: use one of {", ".join(map(repr, known))}.')
        if attributor is not None and not (callable(attributor) and not isinstance(attributor, Attributor)):
            raise PruneError(f'attributor={attributor!r} makes no Attributor: give a Zennit Attributor class, e.g. '
                             'SmoothGrad, or a function from a model to an Attributor.')
        if isinstance(exemplars, bool) or not isinstance(exemplars, int) or exemplars < 0:
            raise PruneError(f'exemplars={exemplars!r} is no number of samples: give e.g. 8, or 0 for none.')
        if exemplars and not self.per_sample:
            raise PruneError(f"criterion={self.criterion!r} has no score for single samples, so that it has no "
                             "exemplars: use another criterion, e.g. 'relevance'.")
        if not graph.groups:
            raise PruneError('the network has no removable channel to collect relevance for; print(graph) says what '
                             'locks them.')
        self.graph, self.model, self.composite = graph, model, composite
        self.aggregate, self.initial, self.classes = aggregate, initial, checked_classes(classes)
        self.attributor, self.nonfinite, self.seed, self.exemplars = attributor, nonfinite, seed, exemplars
        self.states, self.unread = self._find_states()
        self.canonizer = GraphCanonizer.from_recording(graph._recording)
        reached = {state.group for state in self.states if state.value in self.canonizer.reached}
        self.gates = {state.group for state in self.states} - reached
        self.sums = Sums()
        self.notes: list[str] = []
        self._targets: torch.Tensor | None = None
        self._context: AbstractContextManager[Any] | None = None

    def _find_states(self) -> tuple[list[State], dict[str, str]]:
        return find_states(self.graph)

    def _attributing(self) -> AbstractContextManager[Attribution]:
        places = [state.place for state in self.states]
        return attributing(self.model, self.composite, self.canonizer, lambda network: Reader(network, places))

    @property
    def samples(self) -> int:
        '''How many samples were counted so far.'''
        return self.sums.samples

    @property
    def device(self) -> torch.device:
        '''Where the network is.'''
        return device_of(self.model)

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
        if self.criterion == 'relevance' and not self.is_lrp():
            self.notes.append(f'{type(self.composite).__name__} holds no rule of LRP for any layer of this network: '
                              'the scores are modified gradients, which are not conserved from layer to layer')
        if self.unread:
            self.notes.append('the relevance of some groups cannot be read, so they will be kept whole: '
                              + '; '.join(f'{name} ({why})' for name, why in self.unread.items()))
        for note in self.notes:
            warnings.warn(note, PruneWarning, stacklevel=3)

    def is_lrp(self) -> bool:
        '''Whether any rule in force is one of LRP.'''
        return holds_lrp(self._registered)

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
            See :func:`zennit_prune.initial.initial_relevance`; may be None where ``initial`` is a function. Several
            targets of a sample are aggregated one by one and averaged. A sample without any is not counted.

        Raises
        ------
        PruneError
            Outside the ``with`` block; for inputs or targets that do not fit; for relevance that is not finite. The
            batch is then not counted.
        '''
        if self._context is None:
            raise PruneError('a collector is updated inside its with block: with pruner.collector() as collector: ...')
        batch = Selection(inputs, target, self.classes, self.nonfinite == 'skip', self.sums.seen)
        self._targets, spots = None, Spots(self.aggregate in ('abs', 'sumabs')) if self.exemplars else None
        scores = self._sampled(batch, spots) if len(batch.numbers) else {}
        best = self._best(batch, scores, spots) if spots and len(batch.rows) else None
        self.sums = self.sums.plus(scores, batch.size, batch.skipped, batch.reason, (inputs, target), best)

    def _best(self, batch: Selection, scores: Mapping[str, torch.Tensor], spots: Spots) -> Best:
        '''Which samples of a batch matter most to each channel.'''
        layout = tuple((group.name, group.size) for group in self.graph.groups)
        classes = None if self._targets is None else self._targets[batch.rows.to(self._targets.device)]
        return Best.of(layout, scores, batch.numbers[batch.rows], classes, self.exemplars, spots.only(batch.rows))

    def _sampled(self, batch: Selection, spots: Spots | None) -> dict[str, torch.Tensor]:
        '''By group, the scores of the samples that count; the mean over a sample's targets.'''
        totals: dict[str, torch.Tensor] = {}
        weight = torch.zeros((), device='cpu')
        try:
            for relevance, share in self._measured(batch.inputs, batch.target):
                if spots is not None:
                    spots.see(self.states, relevance, share)
                for name, values in self._scores(relevance, len(share)).items():
                    share = share.to(values)
                    values = torch.where(share[:, None] > 0, values * share[:, None], 0)
                    totals[name] = totals[name] + values if name in totals else values
                weight = weight.to(share) + share
        finally:
            self._forget_batch()
        if not weight.any():
            return {}
        lost = sorted({state.group for state in self.states} - set(totals) - self.gates)
        if lost:
            raise PruneError(f'no relevance arrives at {", ".join(map(repr, lost))}: the target does not depend on '
                             'these channels, or a canonizer hides them. Start from an output that depends on them, or '
                             'trace with them in ignore.')
        return batch.counted(totals, weight > 0)

    def _measured(self, inputs: Any, target: Any) -> Iterator[tuple[dict[Place, torch.Tensor], torch.Tensor]]:
        '''For each target: the relevance at every state, shaped as the tensor there, and the weight of each sample.'''
        inputs = differentiable(inputs, self._network)
        with torch.enable_grad():
            output = main_output(call_network(self._network, inputs))
        found = starts(output, target, self.initial, self.classes)
        self._targets = found[0].classes if len(found) == 1 else None
        caught = dict(self._reader.caught)
        if not caught:
            raise PruneError('none of the tensors that carry channels was met: a canonizer replaces the forward of the '
                             'modules that hold them.')
        for number, (start, share) in enumerate(zip(found, shares(found)), 1):
            if self.attributor is None:
                arrived = propagate(output, start.relevance(output), list(caught.values()), number < len(found))
                relevance = {place: values.detach() for place, values in zip(caught, arrived) if values is not None}
            else:
                passes = Passes(self._network, self._reader, self._forget_batch)
                relevance = attributed(self.attributor, passes, inputs, start.relevance, self.seed + self.sums.seen)
            yield relevance, share

    def _forget_batch(self) -> None:
        '''Zennit's hooks keep tensors and handles of every pass until they are removed.'''
        self._reader.clear()
        for hook in list(self._registered.hook_refs):
            hook.remove()

    def _scores(self, relevance: Mapping[Place, torch.Tensor], batch: int) -> dict[str, torch.Tensor]:
        '''By group, the score of every sample and channel: the mean over the group's states.'''
        totals: dict[str, torch.Tensor] = {}
        covered: dict[str, torch.Tensor] = {}
        for state in self.states:
            if state.place in relevance:
                values = self._aggregated(state, relevance[state.place], batch)
                here = torch.bincount(state.positions.reshape(-1), minlength=state.size + 1)[:state.size] > 0
                totals[state.group] = totals[state.group] + values if state.group in totals else values
                covered[state.group] = covered.get(state.group, torch.zeros(state.size, device='cpu')) + here
        return {name: values / covered[name].clamp(min=1).to(values.device) for name, values in totals.items()}

    def _aggregated(self, state: State, relevance: torch.Tensor, batch: int) -> torch.Tensor:
        return aggregated(self.aggregate, state, relevance, batch)

    def merge(self, other: Collector) -> Collector:
        '''Add what another collector of the same network, rules and settings saw.

        Raises
        ------
        PruneError
            If the two do not fit together.
        '''
        self.check_fits(other.settings(), 'the collectors', bool(other.samples))
        self.sums = self.sums.merged(other.sums)
        return self

    def settings(self) -> dict[str, Any]:
        '''What must be equal where sums are to be added, as JSON values.'''
        return {'criterion': self.criterion, 'groups': {group.name: group.size for group in self.graph.groups},
                'composite': described(self.composite), 'aggregate': self.aggregate,
                'initial': described(self.initial), 'classes': self.classes and list(self.classes),
                'attributor': described(self.attributor), 'seed': self.attributor and self.seed,
                'exemplars': self.exemplars or None}

    def check_fits(self, settings: Mapping[str, Any], what: str, used: bool = True) -> None:
        '''Compare with the settings of ``what``; an aggregate that is not yet decided is taken from there.'''
        mine = self.settings()
        if settings.get('groups') != mine['groups']:
            raise PruneError(f'{what} are for different networks: their groups differ.')
        if not self.samples and self.aggregate == 'auto':
            self.aggregate = mine['aggregate'] = settings['aggregate']
        for key, value in mine.items():
            if used and settings.get(key) != value:
                raise PruneError(f'{what} differ in {key}: {value!r} and {settings.get(key)!r}.')

    def save(self, path: str | os.PathLike[str]) -> None:
        '''Write what was added so far to one safetensors file, from which :meth:`load` goes on.'''
        self.sums.save(path, {**self.settings(), 'weights': fingerprint(tensors_by_module(self.model))})

    def load(self, path: str | os.PathLike[str]) -> Collector:
        '''Go on from what :meth:`save` wrote; ``.sums.batches`` says how many batches it holds.

        Raises
        ------
        PruneError
            If something was added already, or the file is of another network, other rules or other settings.
        '''
        if self.sums.batches:
            raise PruneError('a collector that holds batches cannot load others: load into a fresh one, then merge.')
        sums, settings = Sums.load(path)
        self.check_fits(settings, f'this collector and {os.fspath(path)!r}')
        if settings.get('weights') != fingerprint(tensors_by_module(self.model)):
            raise PruneError(f'{os.fspath(path)!r} was collected from a network with other weights.')
        self.sums = sums
        return self

    def compute(self) -> Relevance:
        '''The mean over all samples so far.

        Raises
        ------
        PruneError
            If no sample was counted.
        '''
        sums = self.sums
        if not sums.samples:
            why = 'the loader is empty, or no batch was added.'
            if sums.seen:
                among = f' among classes={self.classes}' if self.classes else ''
                why = sums.reason or f'none of {sums.seen} has a target{among}.'
            raise PruneError(f'there was no sample to collect relevance from: {why}')
        if sums.skipped:
            warnings.warn(f'{sums.skipped} of {sums.seen} samples were left out: {sums.reason}', PruneWarning,
                          stacklevel=2)
        if not any(values.any() for values in sums.halves.values()):
            raise PruneError("all relevance is zero: the targets do not depend on any channel, or the network's last "
                             'layer is zero.')
        held = sorted(self.gates - set(sums.halves))
        notes = [*self.notes, f'no relevance arrives at {", ".join(held)}, inside gates that are held constant: these '
                              'channels have no scores and are kept'] if held else [*self.notes]
        counts = torch.tensor(sums.counts, dtype=torch.float64, device='cpu').clamp(min=1).unsqueeze(1)
        halves = {name: values.to('cpu', torch.float64) for name, values in sums.halves.items()}
        info = {'criterion': self.criterion, 'composite': named(self.composite), 'aggregate': self.aggregate,
                'initial': named(self.initial), 'samples': sums.samples, 'notes': notes}
        if self.classes:
            info['classes'] = list(self.classes)
        if self.attributor:
            info['attributor'] = named(self.attributor)
        if sums.skipped:
            info['skipped'] = sums.skipped
        if sums.best is not None and sums.best.dropped:
            notes.append(f'exemplars: means of the first {len(sums.best.classes)} classes were kept, without those of '
                         f'{sums.best.dropped} samples of others')
        return Relevance({name: values.sum(0) / sums.samples for name, values in halves.items()},
                         {name: values / counts for name, values in halves.items()}, info,
                         None if sums.best is None else Exemplars(sums.best))

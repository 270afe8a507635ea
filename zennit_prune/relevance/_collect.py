'''``Collector``: scores of channels, accumulated batch by batch in memory that does not grow with the samples.'''
from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import nn
from zennit.attribution import Attributor
from zennit.core import Composite
from zennit.rules import AlphaBeta, Epsilon, Flat, Gamma, WSquare, ZBox, ZPlus

from ..errors import PruneError, names_options, unknown, warn
from ..graph._graph import ChannelGraph, check_graph
from ..tracing._boundaries import Place
from ..util._arguments import call_network
from ..util._display import some
from ..util._fingerprint import described, fingerprint, named
from ..util._isolation import checked_seed
from ..util._loaders import Batch
from ..util._networks import device_of, output_tensors, tensors_by_module
from ._attribute import (
    Attribution,
    AttributorFactory,
    Keeper,
    Passes,
    Reader,
    Rules,
    attributed,
    attributing,
    check_depends,
    checked_composite,
    differentiable,
    propagate,
)
from ._canonize import GraphCanonizer
from ._criteria import Criterion, collected_criterion
from ._exemplars import Best, Exemplars, Spots
from ._initial import Initial, Origin, check_initial, check_seen, checked_classes, labels_seen, of_classes, shares
from ._list_calls import ListCalls
from ._nonfinite import without_nan
from ._outputs import Output, check_output
from ._relevance import Relevance
from ._sites import ActivationSite
from ._sums import Selection, Sums

SIGNED_RULES = (AlphaBeta, Flat, Gamma, WSquare, ZBox, ZPlus)  # contributions of either sign are kept apart
AGGREGATES = ('auto', 'abs', 'sumabs', 'signed', 'positive')
NONFINITE = ('error', 'skip')


def holds_lrp(composite: Composite) -> bool:
    '''Return whether any rule in force is one of LRP.'''
    return any(isinstance(hook, (Epsilon, *SIGNED_RULES)) for hook in composite.hook_refs)


def suitable_aggregate(composite: Composite) -> str:
    '''Return the aggregate that suits the rules in force.

    ``'sumabs'`` where most rules keep positive and negative contributions apart, ``'abs'`` where most mix them.
    '''
    apart = sum(isinstance(hook, SIGNED_RULES) for hook in composite.hook_refs)
    together = sum(isinstance(hook, Epsilon) for hook in composite.hook_refs)
    return 'sumabs' if apart > together else 'abs'


def aggregated(how: str, site: ActivationSite, relevance: torch.Tensor, batch: int) -> torch.Tensor:
    '''Sum relevance at a site over space, for every sample and channel, shape (batch, size of the group).'''
    if relevance.shape[0] % batch:
        raise PruneError(f'relevance at {site.place.module!r} has shape {tuple(relevance.shape)} for a batch of '
                         f'{batch}: its first dimension does not hold the samples. Let forward stack samples, and run '
                         'its layers once for all.')
    if how == 'sumabs':
        return site.per_sample(relevance.abs(), batch)
    values = site.per_sample(relevance, batch)
    if how == 'abs':
        return values.abs()
    return values.clamp(min=0) if how == 'positive' else values


class Collector:
    '''Accumulate scores of channels batch by batch.

    A criterion defines a quantity at the activation sites of the channels, the tensors that carry a channel's complete
    value. For each sample it is summed over space and aggregated; the score is the mean over samples, and over sites
    where a group has several (a residual stream).

    Parameters
    ----------
    graph: ChannelGraph
        The channels.
    model: torch.nn.Module
        The network that was traced; it is copied, never changed.
    composite: zennit.core.Composite, Preset or None
        The rules of relevance, or a preset for its rules; None for the recommended ones. The canonizer of the graph is
        applied after the composite's own. Other criteria run the plain network.
    aggregate: str
        The number that is averaged over samples: ``'abs'``, the absolute value of the sum over space; ``'sumabs'``, the
        sum of absolute values; ``'signed'``, the sum; ``'positive'``, its positive part. ``'auto'`` for relevance is
        ``'sumabs'`` where most rules keep positive and negative contributions apart (gamma, alpha-beta, z-plus), else
        ``'abs'``; for another criterion, it is what its formula says.
    initial: str or callable
        The relevance, or the gradient of the loss, at the output: see
        :func:`zennit_prune.relevance.initial_relevance`. ``'auto'`` is ``'one-hot'`` for relevance and
        ``'cross-entropy'`` for gradients. For another loss, give a function of the output that returns the gradient of
        each sample's loss.
    criterion: str or Criterion
        ``'relevance'``, ``'gradient'``, ``'taylor'``, ``'taylor-weights'``, ``'activation'`` or ``'wanda'``; or a
        :class:`zennit_prune.relevance.Criterion` of your own.
    output: int, str or callable, optional
        The output that relevance starts from, where the network returns several tensors: an index, a key or attribute
        (``'logits'``), or a function of what it returns, whose result has its classes in dimension 1. By default, the
        one that is called ``'logits'`` or ``'out'``, or the only one.
    classes: iterable of int, optional
        Count only samples with one of these labels; predictions and rivals are chosen among these classes.
    attributor: callable, optional
        One of Zennit's Attributor classes, or a function from a model to an Attributor, in place of the gradient:
        relevance is the mean over its passes.
    nonfinite: str
        The treatment of a sample whose input or relevance is not finite: with ``'error'``, an error is raised; with
        ``'skip'``, the sample is left out, and a warning says so.
    seed: int
        The seed of the noise of an Attributor.
    exemplars: int
        The number of reference samples to keep for each channel, those with the largest scores; see
        :class:`zennit_prune.relevance.Exemplars`.

    Attributes
    ----------
    sums: Sums
        The sums so far: ``.samples`` were counted of ``.seen``, in ``.batches``.
    notes: list of str
        Warnings: rules that are not LRP, an aggregate that does not suit the rules, groups that cannot be read, unsound
        relevance.
    sites: list of ActivationSite
        Where channels are read.
    unread: dict of str to str
        The groups that cannot be read, each with the reason.
    gates: set of str
        Groups inside gates (of squeeze-excitation, say): rules hold gates constant, so that no relevance arrives there.

    Raises
    ------
    PruneError
        For an unknown option, before any data are read; where the network has no removable channel; where a criterion
        says nothing about any channel.

    References
    ----------
    Yeom et al., "Pruning by Explaining: A Novel Criterion for Deep Neural Network Pruning" (arXiv 1912.08881),
    section 3: relevance summed over space and reference samples.

    Examples
    --------
    >>> import torch
    >>> from zennit.composites import EpsilonPlus
    >>> import zennit_prune as zp
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> x, labels = torch.rand(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])
    >>> with Collector(zp.trace(model, x, progress=False), model, EpsilonPlus()) as collector:
    ...     for start in (0, 3):
    ...         collector.update(x[start:start + 3], labels[start:start + 3])
    >>> relevance = collector.compute()
    >>> relevance['0'].shape, relevance.info['samples']
    (torch.Size([3]), 6)
    '''

    @names_options()
    def __init__(self, graph: ChannelGraph, model: nn.Module, composite: Rules | None, aggregate: str = 'auto',
                 initial: Initial = 'auto', *, criterion: str | Criterion = 'relevance', output: Output = None,
                 classes: Iterable[int] | None = None, attributor: AttributorFactory | None = None,
                 nonfinite: str = 'error', seed: int = 0, exemplars: int = 0):
        self.criterion = check_settings(criterion, aggregate, initial, classes, attributor, nonfinite, seed, exemplars,
                                        output)
        check_graph(graph)
        composite = checked_composite(composite)
        if not graph.groups:
            raise PruneError('the network has no removable channel to collect relevance for; print(graph) says what '
                             'locks them.')
        self.graph, self.model = graph, model
        self.composite = composite if self.criterion.lrp else Composite()
        self.aggregate = self.criterion.aggregate if aggregate == 'auto' else aggregate
        self.initial = self.criterion.initial if initial == 'auto' else initial
        self.classes, self.output = checked_classes(classes), output
        self.attributor, self.nonfinite, self.seed, self.exemplars = attributor, nonfinite, seed, exemplars
        self.sites, self.unread = self.criterion.sites(graph, model)
        if not self.sites and not self.criterion.lrp:
            raise PruneError(f'criterion={self.criterion.name!r} says nothing about any channel of this network: '
                             f'{"; ".join(f"{name} ({why})" for name, why in self.unread.items())}. Use another.')
        self.canonizer = GraphCanonizer.from_recording(graph._recording)
        reached = {site.group for site in self.sites if site.value in self.canonizer.reached}
        self.gates = {site.group for site in self.sites} - reached
        self.sums = Sums()
        self.notes: list[str] = []
        self._targets: torch.Tensor | None = None
        self._reached: set[str] = set()
        self._labels: frozenset[int] = frozenset()
        self._lists = ListCalls(model, graph._recording, [site.place for site in self.sites])
        self._sound: torch.Tensor | None = None
        self._context: AbstractContextManager[Any] | None = None

    def _attributing(self) -> AbstractContextManager[Attribution]:
        places = [site.place for site in self.sites]
        reader = Keeper if self.criterion.activations else Reader
        return attributing(self.model, self.composite, self.canonizer if self.criterion.lrp else None,
                           lambda network: reader(network, places), self.canonizer.fed)

    @property
    def samples(self) -> int:
        '''The number of samples counted so far.'''
        return self.sums.samples

    @property
    def device(self) -> torch.device:
        '''The device of the network.'''
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
        rules = type(self.composite).__name__
        if self.criterion.lrp and not self.holds_lrp():
            self.notes.append(f'{rules} holds no rule of LRP for any layer of this network: the scores are modified '
                              'gradients, which are not conserved from layer to layer')
        if self.criterion.lrp and self.aggregate == 'signed' and suitable_aggregate(self._registered) == 'abs':
            self.notes.append(f"aggregate='signed' does not suit {rules}: its rules mix positive and negative "
                              'contributions, so that the relevance of a channel that matters in both ways sums to '
                              "about zero, and it is removed first. Use aggregate='abs' or 'auto'")
        if self.unread:
            self.notes.append('the relevance of some groups cannot be read, so they will be kept whole: '
                              + '; '.join(f'{name} ({why})' for name, why in self.unread.items()))
        for note in self.notes:
            warn(note)

    def holds_lrp(self) -> bool:
        '''Return whether any rule in force is one of LRP; callable inside the ``with`` block only.

        Returns
        -------
        bool
            False where a composite of gradients, say, has no rule for any layer.

        Examples
        --------
        >>> with Collector(graph, model, EpsilonPlus()) as collector:
        ...     collector.holds_lrp()
        True
        '''
        return self.criterion.lrp and holds_lrp(self._registered)

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
        inputs: torch.Tensor, tuple, mapping or list
            The arguments of the network, of N samples; they are copied to its device. The labels may be among them.
        target: torch.Tensor, callable, ``'predicted'`` or None
            Class indices, shape (N,); other kinds as for :func:`zennit_prune.heatmap`. May be None where
            ``initial`` is a function. Several targets of a sample are aggregated one by one and averaged. A sample
            without any is not counted.

        Raises
        ------
        PruneError
            Outside the ``with`` block; for inputs or targets that do not fit; for relevance that is not finite. The
            batch is then not counted.
        '''
        self.add(Batch.of((inputs, target), self.model))

    def add(self, batch: Batch) -> None:
        '''Add a batch whose values may have been checked already.

        Parameters
        ----------
        batch: Batch
            Inputs and target, as for :meth:`update`.

        Raises
        ------
        PruneError
            For the reasons of :meth:`update`; the batch is then not counted.

        Examples
        --------
        >>> from zennit_prune.util._loaders import Batch
        >>> with Collector(graph, model, EpsilonPlus()) as collector:
        ...     collector.add(Batch(images, labels))
        >>> collector.samples
        8
        '''
        if self._context is None:
            raise PruneError('a collector is updated inside its with block: with pruner.collector() as collector: ...')
        samples = Selection(batch.to(self.device), self.classes, self.nonfinite == 'skip', self.sums.seen)
        self._reached, self._labels = set(), frozenset()
        self._lists.check(samples.batch)
        self._targets, spots = None, Spots(self.aggregate in ('abs', 'sumabs')) if self.exemplars else None
        scores = self._sampled(samples, spots) if len(samples.numbers) else {}
        best = self._best(samples, scores, spots) if spots and len(samples.rows) else None
        self.sums = self.sums.plus(scores, samples.size, samples.skipped, samples.reason, tuple(batch), best,
                                   self._reached, self._labels)

    def _best(self, samples: Selection, scores: Mapping[str, torch.Tensor], spots: Spots) -> Best:
        '''Return the samples of a batch with the largest scores, for each channel.'''
        layout = tuple((group.name, group.size) for group in self.graph.groups)
        classes = None if self._targets is None else self._targets[samples.rows.to(self._targets.device)]
        return Best.of(layout, scores, samples.numbers[samples.rows], classes, self.exemplars, spots.only(samples.rows))

    def _sampled(self, samples: Selection, spots: Spots | None) -> dict[str, torch.Tensor]:
        '''Return, by group, the scores of the samples that count: the mean over each sample's targets.'''
        totals: dict[str, torch.Tensor] = {}
        weight = torch.zeros((), device='cpu')
        try:
            for quantities, share in self._measured(samples.batch):
                if spots is not None:
                    spots.see(self.sites, quantities, share)
                for name, values in self._scores(quantities, len(share)).items():
                    share = share.to(values)
                    values = torch.where(share[:, None] > 0, values * share[:, None], 0)
                    totals[name] = totals[name] + values if name in totals else values
                weight = weight.to(share) + share
        finally:
            self._forget_batch()
        if not weight.any():
            return {}
        if not totals:
            raise _nothing_arrives()
        return samples.counted(totals, weight > 0, self._sound, self.model)

    def _measured(self, batch: Batch) -> Iterator[tuple[dict[Place, torch.Tensor], torch.Tensor]]:
        '''Yield, for each target, the quantity at every site in the tensor's shape, and the weight of each sample.'''
        quantity, nothing = self.criterion.quantity, torch.empty(0, device=self.device)
        if not self.criterion.gradients:
            output = self._run_forward(batch)
            yield ({place: quantity(values, nothing) for place, values in self._activations().items()},
                   torch.ones(len(output), device=output.device))
            return
        for arrived, share in self._propagated(batch):
            values = self._activations()
            yield {place: quantity(values.get(place, nothing), gradient) for place, gradient in arrived.items()}, share

    def _activations(self) -> dict[Place, torch.Tensor]:
        '''Return the values of the last pass by place, where the criterion needs them.'''
        return dict(self._reader.values) if self.criterion.activations else {}

    def _run_forward(self, batch: Batch) -> torch.Tensor:
        '''Return the output of the network, for criteria that need no target.'''
        if self.classes is not None and of_classes(batch.target, self.classes) is None:
            raise PruneError(f'classes={self.classes} needs a label for each sample, as '
                             f'criterion={self.criterion.name!r} uses no output.')
        inputs = differentiable(batch, self._network)
        with torch.no_grad():
            returned = output_tensors(call_network(self._network, inputs, self.graph._recording.example))
        return next((tensor for tensor in returned if tensor.dim()), torch.empty(batch.size, device=self.device))

    def _propagated(self, batch: Batch) -> Iterator[tuple[dict[Place, torch.Tensor], torch.Tensor]]:
        '''Yield, for each target, the relevance or gradient at every site, and the weight of each sample.'''
        inputs = differentiable(batch, self._network)
        origin = self.origin(batch)
        with torch.enable_grad():
            output = origin.chosen(call_network(self._network, inputs, self.graph._recording.example))
        check_depends(output)
        self._sound = without_nan(output)
        found = origin.starts(output)
        self._labels = labels_seen(batch.target, output)
        self._targets = found[0].classes if len(found) == 1 else None
        caught = dict(self._reader.caught)
        if not caught:
            raise _nothing_arrives() if self._reader.met else PruneError(
                'none of the tensors that carry channels was met: a canonizer replaces the forward of the modules that '
                'hold them.')
        for number, (start, share) in enumerate(zip(found, shares(found)), 1):
            if self.attributor is None:
                arrived = propagate(output, start.relevance(output), list(caught.values()), number < len(found))
                relevance = {place: values.detach() for place, values in zip(caught, arrived) if values is not None}
            else:
                passes = Passes(self._network, self._reader, self._forget_batch, origin.chosen)
                relevance = attributed(self.attributor, passes, inputs, start.relevance, self.seed + self.sums.seen)
            yield relevance, share

    def origin(self, batch: Batch) -> Origin:
        '''Return where the relevance of a batch starts.

        Parameters
        ----------
        batch: Batch
            The samples with their target.

        Returns
        -------
        Origin
            Its target, with the settings of the collector.

        Examples
        --------
        >>> from zennit_prune.util._loaders import Batch
        >>> Collector(graph, model, EpsilonPlus()).origin(Batch(images, labels)).initial
        'one-hot'
        '''
        return Origin(batch.target, self.initial, self.output, self.classes, batch.inputs, batch.labels)

    def _forget_batch(self) -> None:
        '''Remove the tensors and handles that Zennit's hooks keep after every pass.'''
        self._reader.clear()
        for hook in list(self._registered.hook_refs):
            hook.remove()

    def _scores(self, quantities: Mapping[Place, torch.Tensor], batch: int) -> dict[str, torch.Tensor]:
        '''Return, by group, the score of every sample and channel: the mean over the group's sites.'''
        totals: dict[str, torch.Tensor] = {}
        covered: dict[str, torch.Tensor] = {}
        for site in self.sites:
            if site.place in quantities:
                values = self._score(site, quantities[site.place], batch)
                if site.group not in self.sums.reached and quantities[site.place].any():
                    self._reached.add(site.group)
                here = torch.bincount(site.positions.reshape(-1), minlength=site.size + 1)[:site.size] > 0
                totals[site.group] = totals[site.group] + values if site.group in totals else values
                covered[site.group] = covered.get(site.group, torch.zeros(site.size, device='cpu')) + here
        return {name: values / covered[name].clamp(min=1).to(values.device) for name, values in totals.items()}

    def _score(self, site: ActivationSite, quantity: torch.Tensor, batch: int) -> torch.Tensor:
        '''Return the score of every sample and channel at one site, shape (batch, size of the group).'''
        sums = aggregated(self.aggregate, site, quantity, batch)
        if self.criterion.per_element:
            one_sample = torch.ones_like(quantity[:quantity.shape[0] // batch])
            sums = sums / site.per_sample(one_sample, 1).clamp(min=1)
        return self.criterion.score(sums, site)

    def merge(self, other: Collector) -> Collector:
        '''Add the sums of another collector of the same network, rules and settings.

        Parameters
        ----------
        other: Collector
            It is left as it is.

        Returns
        -------
        Collector
            This collector, with the samples of both.

        Raises
        ------
        PruneError
            If the two do not fit together.

        Examples
        --------
        >>> one, two = Collector(graph, model, EpsilonPlus()), Collector(graph, model, EpsilonPlus())
        >>> with one, two:
        ...     one.update(images[:4], labels[:4])
        ...     two.update(images[4:], labels[4:])
        >>> one.merge(two).samples
        8
        '''
        self.check_fits(other.settings(), 'the collectors', bool(other.samples))
        self.sums = self.sums.merged(other.sums)
        return self

    def settings(self) -> dict[str, Any]:
        '''Return the settings that must be equal where sums are to be added, as JSON values.

        Returns
        -------
        dict of str to object
            Criterion, groups and their sizes, composite, and the options of the collector.

        Examples
        --------
        >>> Collector(graph, model, EpsilonPlus(), 'signed').settings()['aggregate']
        'signed'
        '''
        return {'criterion': self.criterion.name, 'groups': {group.name: group.size for group in self.graph.groups},
                'composite': described(self.composite), 'aggregate': self.aggregate,
                'initial': described(self.initial), 'output': described(self.output),
                'classes': self.classes and list(self.classes),
                'attributor': described(self.attributor), 'seed': self.attributor and self.seed,
                'exemplars': self.exemplars or None}

    def check_fits(self, settings: Mapping[str, Any], what: str, used: bool = True) -> None:
        '''Raise unless settings equal those of this collector; an undecided aggregate is adopted from them.

        Parameters
        ----------
        settings: mapping
            The settings that :meth:`settings` returned.
        what: str
            The collectors compared, for the message.
        used: bool
            The settings belong to sums that hold samples; if not, only the network must be equal.

        Raises
        ------
        PruneError
            If a setting differs, with its name and both values.

        Examples
        --------
        >>> one, two = (Collector(graph, model, EpsilonPlus(), how) for how in ('abs', 'signed'))
        >>> try:
        ...     one.check_fits(two.settings(), 'the collectors')
        ... except zp.PruneError as error:
        ...     print(error)
        the collectors differ in aggregate: 'abs' and 'signed'.
        '''
        mine = self.settings()
        if settings.get('groups') != mine['groups']:
            raise PruneError(f'{what} are for different networks: their groups differ.')
        if not self.samples and self.aggregate == 'auto':
            self.aggregate = mine['aggregate'] = settings['aggregate']
        for key, value in mine.items():
            if used and settings.get(key) != value:
                raise PruneError(f'{what} differ in {key}: {value!r} and {settings.get(key)!r}.')

    def save(self, path: str | os.PathLike[str]) -> None:
        '''Write the sums so far to one safetensors file, from which :meth:`load` goes on.

        Parameters
        ----------
        path: path-like
            The file; it appears when it is complete.

        Examples
        --------
        >>> import tempfile
        >>> with Collector(graph, model, EpsilonPlus()) as collector:
        ...     collector.update(images, labels)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     collector.save(f'{folder}/collector.safetensors')
        ...     Collector(graph, model, EpsilonPlus()).load(f'{folder}/collector.safetensors').samples
        8
        '''
        self.sums.save(path, {**self.settings(), 'weights': fingerprint(tensors_by_module(self.model))})

    def load(self, path: str | os.PathLike[str]) -> Collector:
        '''Go on from the sums that :meth:`save` wrote; ``.sums.batches`` is the number of their batches.

        Parameters
        ----------
        path: path-like
            The file.

        Returns
        -------
        Collector
            This collector, with the sums of the file.

        Raises
        ------
        PruneError
            If something was added already, or the file is of another network, other rules or other settings.

        Examples
        --------
        >>> import tempfile
        >>> with Collector(graph, model, EpsilonPlus()) as collector:
        ...     collector.update(images, labels)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     collector.save(f'{folder}/collector.safetensors')
        ...     resumed = Collector(graph, model, EpsilonPlus()).load(f'{folder}/collector.safetensors')
        >>> resumed.sums.batches
        1
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
        '''Return the scores: the mean over all samples so far.

        Returns
        -------
        Relevance
            The scores; ``.info`` holds the settings and the number of samples, ``.exemplars`` the reference samples.

        Raises
        ------
        PruneError
            If no sample was counted, or all relevance is zero.
        '''
        sums = self.sums
        self._check_sums()
        if sums.skipped:
            warn(f'{sums.skipped} of {sums.seen} samples were left out: {sums.reason}')
        lost = self._unreached()
        if lost:
            warn(f'{_no_relevance_at(lost)}: these channels have no scores and are kept. The output that relevance '
                 'starts from does not depend on them on these samples, or the path to it is computed without '
                 'gradients. Start from an output that depends on them, see output= and initial=')
        finish = self.criterion.finish
        counts = torch.tensor(sums.counts, dtype=torch.float64, device='cpu').clamp(min=1).unsqueeze(1)
        halves = {name: values.to('cpu', torch.float64) for name, values in sums.halves.items()
                  if name not in lost}
        return Relevance({name: finish(values.sum(0) / sums.samples) for name, values in halves.items()},
                         {name: finish(values / counts) for name, values in halves.items()}, self._info(),
                         None if sums.best is None else Exemplars(sums.best))

    def _unreached(self) -> list[str]:
        '''Return the groups without a score for want of any relevance: they are kept, as nothing is known of them.'''
        if not self.criterion.gradients:
            return []
        return [name for name in dict.fromkeys(site.group for site in self.sites)
                if name not in self.sums.reached and name not in self.gates]

    def _check_sums(self) -> None:
        sums = self.sums
        check_seen(sums.labels)
        if not sums.samples:
            why = 'the loader is empty (a generator is read once), or no batch was added.'
            if sums.seen:
                among = f' among classes={self.classes}' if self.classes else ''
                why = sums.reason or f'none of {sums.seen} has a target{among}.'
            raise PruneError(f'there was no sample to collect relevance from: {why}')
        if not any(values.any() for values in sums.halves.values()):
            raise PruneError("all relevance is zero: the targets do not depend on any channel, or the network's last "
                             'layer is zero.')

    def _info(self) -> dict[str, Any]:
        '''Return the origin of the scores as JSON values: criterion, options, rules, samples and notes.'''
        sums, notes = self.sums, [*self.notes]
        lost = self._unreached()
        if lost:
            notes.append(f'{_no_relevance_at(lost)}: these channels have no scores and are kept')
        held = sorted(self.gates - set(sums.halves))
        if held:
            notes.append(f'no relevance arrives at {", ".join(held)}, inside gates that are held constant: these '
                         'channels have no scores and are kept')
        if sums.best is not None and sums.best.dropped:
            notes.append(f'reference samples: means of the first {len(sums.best.classes)} classes were kept, without '
                         f'those of {sums.best.dropped} samples of others')
        return {'criterion': self.criterion.name,
                **({'composite': named(self.composite)} if self.criterion.lrp else {}),
                'aggregate': self.aggregate,
                **({'initial': named(self.initial)} if self.criterion.gradients else {}),
                'samples': sums.samples, 'notes': notes,
                **({} if self.output is None else {'output': _named_output(self.output)}),
                **({'classes': list(self.classes)} if self.classes else {}),
                **({'attributor': named(self.attributor)} if self.attributor else {}),
                **({'skipped': sums.skipped} if sums.skipped else {})}


def _named_output(output: Output) -> int | str:
    return output if isinstance(output, int) else named(output)


def _nothing_arrives() -> PruneError:
    return PruneError('no relevance arrives at any channel: the output that relevance starts from does not depend on '
                      'them, or what is between them and the output is computed without gradients (torch.no_grad, '
                      '.detach()). Let that part run with gradients, or name another output with output=.')


def _no_relevance_at(names: Iterable[str]) -> str:
    return f'no relevance arrives at {some(names)}'


def check_settings(criterion: str | Criterion = 'relevance', aggregate: str = 'auto', initial: Initial = 'auto',
                   classes: Iterable[int] | None = None, attributor: AttributorFactory | None = None,
                   nonfinite: str = 'error', seed: int = 0, exemplars: int = 0, output: Output = None) -> Criterion:
    '''Refuse wrong settings of a collector, without a network or data; return the criterion.'''
    found = collected_criterion(criterion)
    for option, value, known in (('aggregate', aggregate, AGGREGATES), ('nonfinite', nonfinite, NONFINITE)):
        if value not in known:
            raise unknown(option, value, known)
    check_initial(found.initial if initial == 'auto' else initial, checked_classes(classes))
    if attributor is not None and not (callable(attributor) and not isinstance(attributor, Attributor)):
        raise PruneError(f'attributor={attributor!r} makes no Attributor: give a Zennit Attributor class, e.g. '
                         'SmoothGrad, or a function from a model to an Attributor.')
    if attributor is not None and not found.lrp:
        raise PruneError(f"attributor= is for criterion='relevance'; {found.name!r} has a formula of its own.")
    check_output(output)
    checked_seed(seed)
    if isinstance(exemplars, bool) or not isinstance(exemplars, int) or exemplars < 0:
        raise PruneError(f'exemplars={exemplars!r} is no number of samples: give e.g. 8, or 0 for none.')
    if exemplars and not found.per_sample:
        raise PruneError(f'criterion={found.name!r} has no score for single samples, so that it has no reference '
                         "samples: use another criterion, e.g. 'relevance'.")
    return found

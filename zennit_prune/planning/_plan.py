'''``Plan``: an immutable choice of channels to remove, to be read, edited, saved, tried and applied; ``verify``.

Channels are given as positions in their groups, and every block of a group loses equally many. Everything that is done
with a plan starts here; cutting, masking and comparing are in :mod:`zennit_prune.surgery`.
'''
from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import PruneError, names_options, shown, warn
from ..graph._graph import ChannelGraph, check_graph
from ..graph._groups import checked_positions
from ..relevance._relevance import Relevance, Reliability
from ..surgery._masking import masked_copy, warn_of_changed_statistics
from ..surgery._surgery import transplant
from ..surgery._verify import compare
from ..util._display import (
    BEFORE,
    KEPT,
    Share,
    Table,
    finished,
    new_figure,
    panel,
    some,
    table,
    waiting,
    without_mathematics,
)
from ..util._files import check_path, write_text
from ..util._isolation import isolated
from ..util._networks import (
    modules_by_name,
    prunable,
    tensors_by_module,
    unwrapped,
    without_garbage_collection,
)
from ._carry import composed
from ._cost import cost_model
from ._latency import Timing
from ._risk import AtRisk, at_risk

FORMAT = 'zennit_prune plan'


class Plan:
    '''The channels of a network that are to be removed.

    A plan is immutable: every edit returns a new one, and no network changes before :meth:`apply`. Printed, it is a
    table of groups with the cost before and after.

    Parameters
    ----------
    graph: ChannelGraph
        The removable channels of the network, from :func:`zennit_prune.trace`.
    removed: mapping of str to iterable of int, optional
        Positions by the name of the group, each from 0 to the size of the group less one.
    reliability: Reliability, optional
        The split-half rank correlation of the scores that the plan was made from. It is printed, saved and kept by
        edits.
    timing: Timing, optional
        The measured latency of a plan for a latency budget. It is printed, but neither saved nor kept by edits.

    Attributes
    ----------
    graph: ChannelGraph
        The removable channels of the network.
    removed: mapping of str to tuple of int
        Sorted positions by the name of the group, without groups that lose nothing. Read-only.
    reliability: Reliability or None
        As given.
    timing: Timing or None
        As given.

    Raises
    ------
    PruneError
        For an unknown or locked name, a position out of range or given twice, blocks of a group that lose different
        numbers of channels, or a dimension that would be emptied.

    Examples
    --------
    >>> import torch
    >>> import zennit_prune as zp
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> plan = zp.Plan(zp.trace(model, torch.ones(2, 3)), {'0': [1, 2]})
    >>> print(plan)
    group  channels  left  share
    -----  --------  ----  -----
    0             4     2  50%
    <BLANKLINE>
    flops: 40 -> 20 (50.0% left)
    params: 26 -> 14 (53.8% left)
    channels: 4 -> 2 (50.0% left)
    >>> plan.apply(model)[0]
    Linear(in_features=3, out_features=2, bias=True)
    '''

    @names_options()
    def __init__(self, graph: ChannelGraph, removed: Mapping[str, Iterable[int]] | None = None,
                 reliability: Reliability | None = None, timing: Timing | None = None):
        check_graph(graph, 'a plan is made for a {}, which zp.trace returns, not for {}')
        self.graph, self.reliability, self.timing = graph, reliability, timing
        if removed is not None and not isinstance(removed, Mapping):
            raise PruneError(f'removals are positions by group name, a dict, not {shown(removed)}.')
        found: dict[str, tuple[int, ...]] = {}
        for name, positions in (removed or {}).items():
            group = graph.group(name)
            if group.name in found:
                raise PruneError(f'{name!r} names group {group.name!r}, which is given twice: join the positions.')
            found[group.name] = checked_positions(group, positions)
            graph._check_balance(group, found[group.name])
        self._removed = {group.name: found[group.name] for group in graph.groups if found.get(group.name)}
        self._check_not_emptied()

    @property
    def removed(self) -> Mapping[str, tuple[int, ...]]:
        '''Sorted positions by the name of the group, without groups that lose nothing. Read-only.'''
        return MappingProxyType(self._removed)

    def _check_not_emptied(self) -> None:
        '''Refuse to remove all channels along a dimension.'''
        gone = self.graph._removed_labels(self.removed)
        for axis in self.graph._recording.axes:
            if gone[axis.start:axis.start + axis.size].all():
                raise PruneError(f'the plan removes all {axis.size} channels along dimension {axis.dim} of '
                                 f'{axis.parameter!r}: keep at least one.')

    # editing
    @names_options()
    def remove(self, name: str, positions: Iterable[int]) -> Plan:
        '''Return a plan that also removes these positions.

        Parameters
        ----------
        name: str
            A group, or a layer with channels of a single group.
        positions: iterable of int
            Positions within the group; equally many of each block where the group has blocks (``group.blocks``).

        Returns
        -------
        Plan
            A new plan; this one is left as it is.

        Raises
        ------
        PruneError
            For an unknown or locked name, positions that are none, unequal blocks, or an emptied dimension.

        Examples
        --------
        >>> import torch
        >>> import zennit_prune as zp
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> zp.Plan(zp.trace(model, torch.ones(2, 3))).remove('0', [1]).remove('0', [3])
        Plan(2 channels of 1 groups removed)
        '''
        group = self.graph.group(name)
        fresh = checked_positions(group, positions)
        removed = {**self.removed, group.name: sorted({*self.removed.get(group.name, ()), *fresh})}
        return Plan(self.graph, removed, self.reliability)

    @names_options()
    def keep(self, name: str, positions: Iterable[int]) -> Plan:
        '''Return a plan that keeps these positions.

        Parameters
        ----------
        name: str
            A group, or a layer with channels of a single group.
        positions: iterable of int
            Positions within the group, whether they were to be removed or not.

        Returns
        -------
        Plan
            A new plan; this one is left as it is.

        Raises
        ------
        PruneError
            For an unknown or locked name, positions that are none, or blocks that would lose different numbers.

        Examples
        --------
        >>> import torch
        >>> import zennit_prune as zp
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> plan = zp.Plan(zp.trace(model, torch.ones(2, 3)), {'0': [1, 2]})
        >>> dict(plan.keep('0', [2]).removed)
        {'0': (1,)}
        '''
        group = self.graph.group(name)
        kept = set(checked_positions(group, positions))
        left = [position for position in self.removed.get(group.name, ()) if position not in kept]
        return Plan(self.graph, {**self.removed, group.name: left}, self.reliability)

    @names_options()
    def compose(self, later: Plan) -> Plan:
        '''Return one plan for the original that has the effect of this plan followed by a later one.

        Parameters
        ----------
        later: Plan
            A plan for the network that this plan leaves, traced anew; its positions count the remaining channels.

        Returns
        -------
        Plan
            A plan for the network that this plan is for.

        Raises
        ------
        PruneError
            If ``later`` was made for another network, or the original cannot lose these channels at once: a grouped
            convolution that is left with one channel per group loses whole groups, as a depthwise one.

        Examples
        --------
        >>> import torch
        >>> import zennit_prune as zp
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> x = torch.ones(2, 3)
        >>> first = zp.Plan(zp.trace(model, x), {'0': [0]})
        >>> second = zp.Plan(zp.trace(first.apply(model), x), {'0': [0]})
        >>> dict(first.compose(second).removed)
        {'0': (0, 1)}
        '''
        checked_plan('plan.compose(later)', later)
        return Plan(self.graph, composed(self.graph, self.removed, later.graph, later.removed))

    # trying and applying
    @names_options()
    def at_risk(self, relevance: Relevance, count: int = 10) -> AtRisk:
        '''Find channels to be removed that a single sample needs, and classes that lose more relevance than others.

        The score of a channel is a mean over samples, so that a channel on which a single image depends may be removed.
        Its share in the relevance of all channels of its group for this image can be compared across layers, since
        relevance is conserved from layer to layer. The share of a class is never larger than that of its samples.

        Parameters
        ----------
        relevance: Relevance
            Relevance collected with reference samples (``exemplars=``).
        count: int
            The largest number of channels to return.

        Returns
        -------
        AtRisk
            ``.channels``, a list of :class:`~zennit_prune.planning.Risk`, and ``.classes``, a tensor of shape (classes,
            groups), None where the samples had no classes. It prints as tables.

        Raises
        ------
        PruneError
            If relevance was collected without reference samples, or from another network.

        Examples
        --------
        >>> import torch
        >>> import zennit_prune as zp
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> pruner = zp.Pruner(model, None, torch.ones(2, 3))
        >>> relevance = pruner.collect((torch.randn(8, 3), torch.arange(8) % 2), exemplars=2, progress=False)
        >>> found = zp.Plan(pruner.graph).remove('0', [1, 2]).at_risk(relevance)
        >>> len(found.channels), found.classes.shape
        (2, torch.Size([2, 1]))
        '''
        return at_risk(self.graph, self.removed, relevance, count)

    @names_options()
    @torch.inference_mode(False)
    def masked(self, model: nn.Module) -> nn.Module:
        '''Return a copy of the original in which the removed channels are silent.

        It has the original's shapes and computes what the pruned network will compute. The slices of weights that read
        a removed channel are zero, so that attributions are those of the pruned network, too. A rule that ignores
        weights (``Flat``, ``WSquare``) inside the network still spreads relevance over silent channels: use the pruned
        network for such composites.

        Parameters
        ----------
        model: torch.nn.Module
            The traced network; it is left as it is.

        Returns
        -------
        torch.nn.Module
            An ordinary module of the same class, with the same training flags; it can be copied and pickled.

        Raises
        ------
        PruneError
            If ``model`` is not the network that was traced.

        Examples
        --------
        >>> import torch
        >>> import zennit_prune as zp
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> plan = zp.Plan(zp.trace(model, torch.ones(2, 3))).remove('0', [1, 2])
        >>> masked = plan.masked(model)
        >>> masked[2].weight.shape, masked[2].weight[:, 1:3].abs().sum().item()
        (torch.Size([2, 4]), 0.0)
        '''
        return masked_copy(self.graph, self._checked_model(model), self.removed)

    @names_options()
    def apply(self, model: nn.Module, verify: bool = True, progress: bool = True) -> nn.Module:
        '''Remove the channels; return an ordinary, smaller network of the same class.

        The structure of the result is always proven by a second trace.

        Parameters
        ----------
        model: torch.nn.Module
            The traced network; it is left as it is, whatever happens.
        verify: bool
            Also compare the outputs with those of the masked original, on noise.
        progress: bool
            Show a progress bar on standard error once it takes more than two seconds.

        Returns
        -------
        torch.nn.Module
            A new network on the same device, with the same training flags and ``requires_grad``.

        Raises
        ------
        PruneError
            If the plan is empty, ``model`` is not the network that was traced, or the result is not provably the
            original with these channels silent (:class:`VerificationError` where outputs differ).

        Warns
        -----
        PruneWarning
            If LayerNorm runs over removed channels, the network was traced in one of its two modes only, or it has
            parts that no example of the trace runs: these may no longer fit.

        Examples
        --------
        >>> import torch
        >>> import zennit_prune as zp
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> zp.Plan(zp.trace(model, torch.ones(2, 3)), {'0': [1, 2]}).apply(model)
        Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=2, bias=True)
        )
        '''
        model = self._checked_model(model)
        if not self.removed:
            raise PruneError('the plan is empty: it removes no channel.')
        with torch.inference_mode(False), waiting('apply', progress):
            small = self._proven(model)
            self.graph._recording.warn_if_untraced()
            warn_of_changed_statistics(self.graph._recording.operations, self.graph._removed_labels(self.removed))
            if self._left_behind:
                warn(self._left_behind)
            if verify:
                for example in self.graph._recording.examples:
                    compare(self.graph, model, small, self.removed, example.fitted(model))
        return small

    @property
    def _left_behind(self) -> str:
        '''The warning of parts that no example runs, which may read removed channels; empty if there are none.'''
        parts = self.graph._unused_beside(self.removed) if self.removed else []
        if not parts:
            return ''
        return (f'no example of the trace runs these parts, whose weights stay as they are: '
                f'{some(map(repr, parts), 5)}. Whatever else calls them (another task, say) may fail, or read other '
                'channels. Trace with examples=, a further example for every other task; parts that nothing calls do '
                'no harm')

    def _proven(self, model: nn.Module) -> nn.Module:
        '''Return the narrowed network, after the proof of its structure.'''
        with without_garbage_collection(), isolated(model):
            small = self.graph._narrowed(model, self.removed)
            failure = self.graph._prove(small, self.removed)
        if failure is not None:
            layers = self.graph._layers_in(failure.operation, self.removed)
            raise PruneError(f'this plan cannot be applied exactly: {failure}. Remove fewer channels of '
                             f'{some(map(repr, layers))}, or none: trace with ignore={layers!r}.')
        return small

    @names_options()
    @torch.inference_mode(False)
    def apply_(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None,
               verify: bool = True, progress: bool = True) -> nn.Module:
        '''Remove the channels in place; everything is proven before the first write.

        Parameters
        ----------
        model: torch.nn.Module
            The traced network, which is narrowed, or a copy of it: with ``torch.optim.swa_utils.AveragedModel``, narrow
            the average, too, so that it can go on with the network.
        optimizer: torch.optim.Optimizer, optional
            The optimizer that trains the network: its parameter groups point to the new parameters, and its state
            (momentum, Adam moments) is narrowed, too.
        verify: bool
            Also compare the outputs with those of the masked original, on noise.
        progress: bool
            Show a progress bar on standard error once it takes more than two seconds.

        Returns
        -------
        torch.nn.Module
            ``model`` itself.

        Raises
        ------
        PruneError
            For the reasons of :meth:`apply`, or if the optimizer cannot follow; nothing is changed then.

        Examples
        --------
        >>> import torch
        >>> import zennit_prune as zp
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> plan = zp.Plan(zp.trace(model, torch.ones(2, 3)), {'0': [1, 2]})
        >>> plan.apply_(model, optimizer) is model, optimizer.param_groups[0]['params'][0].shape
        (True, torch.Size([2, 3]))
        '''
        inner = unwrapped(model)
        small = self.apply(inner, verify, progress)
        transplant(inner, small, self.graph._kept(self.removed), self.graph._group_sizes,
                   self.graph._attributes(self.removed), optimizer)
        return model

    def _checked_model(self, model: nn.Module) -> nn.Module:
        '''Return the network inside ``model``, after a check that it is the one that was traced.'''
        model = prunable(model)
        differs = self._differs(model)
        if differs:
            inner = [name for name, module in modules_by_name(model)[1:] if not self._differs(module)]
            hint = 'Trace it again.'
            if inner:
                path = inner[0] if all(map(str.isidentifier, inner[0].split('.'))) else f'get_submodule({inner[0]!r})'
                hint = (f'It holds a network that fits ({some(map(repr, inner), 3)}): give that one, as in '
                        f'plan.apply_(wrapper.{path}).')
            raise PruneError(f'this is not the network that was traced: {differs}. {hint}')
        return model

    def _differs(self, model: nn.Module) -> str:
        '''Return how a network differs from the traced one along labelled dimensions; an empty text if it does not.'''
        tensors = dict(tensors_by_module(model))
        for axis in self.graph._recording.axes:
            shape = tuple(tensors[axis.parameter].shape) if axis.parameter in tensors else ()
            if len(shape) <= axis.dim or shape[axis.dim] != axis.length:
                has = f'has shape {shape}' if shape else 'is missing'
                return f'{axis.parameter!r} {has}, but had {axis.length} indices along dimension {axis.dim}'
        return ''

    def _misfit(self, network: nn.Module, pruned: bool = True) -> str:
        '''Return how a network differs in shape from the pruned one, or from the original; '' if it does not.'''
        found = dict(tensors_by_module(network))
        kept = self.graph._kept(self.removed) if pruned else {}
        for name, size in self.graph._recording.sizes.items():
            stay = kept.get(name, {})
            shape = tuple(len(stay[dim]) if dim in stay else length for dim, length in enumerate(size.shape))
            if name not in found or tuple(found[name].shape) != shape:
                has = f'has shape {tuple(found[name].shape)}' if name in found else 'is missing'
                return f'{name!r} {has}, but {shape} stays by the plan' if pruned else f'{name!r} {has}, not {shape}'
        return ''

    # files
    @names_options()
    def save(self, path: str | os.PathLike[str]) -> None:
        '''Write the plan as JSON.

        Parameters
        ----------
        path: path-like
            The file; it appears when it is complete.

        Examples
        --------
        >>> import tempfile
        >>> import torch
        >>> import zennit_prune as zp
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> graph = zp.trace(model, torch.ones(2, 3))
        >>> plan = zp.Plan(graph, {'0': [1, 2]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plan.save(f'{folder}/plan.json')
        ...     zp.Plan.load(f'{folder}/plan.json', graph) == plan
        True
        '''
        write_text(path, json.dumps(self.to_dict(), indent=1) + '\n')

    def to_dict(self) -> dict[str, Any]:
        '''Return the plan as JSON values: its removals, and the sizes of all groups, which identify the network.

        Returns
        -------
        dict of str to object
            The values that :meth:`from_dict` reads.

        Examples
        --------
        >>> data = zp.Plan(graph, {'conv1': [0, 3]}).to_dict()
        >>> data['removed'], data['groups']
        ({'conv1': [0, 3]}, {'conv1': 8, 'conv2': 6})
        '''
        data = {'format': FORMAT, 'version': 1, 'groups': {group.name: group.size for group in self.graph.groups},
                'removed': {name: list(positions) for name, positions in self.removed.items()}}
        return data if self.reliability is None else {**data, 'reliability': self.reliability.to_dict()}

    @classmethod
    @names_options()
    def load(cls, path: str | os.PathLike[str], graph: ChannelGraph) -> Plan:
        '''Read a plan that :meth:`save` wrote.

        Parameters
        ----------
        path: path-like
            The file.
        graph: ChannelGraph
            The removable channels of the network that the plan is for.

        Returns
        -------
        Plan
            The plan, with the reliability of its scores if that was saved.

        Raises
        ------
        PruneError
            If the file is not a plan, or is one for another network.

        Examples
        --------
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     zp.Plan(graph, {'conv1': [0, 3]}).save(f'{folder}/plan.json')
        ...     dict(zp.Plan.load(f'{folder}/plan.json', graph).removed)
        {'conv1': (0, 3)}
        '''
        check_path(path, 'Plan.load(path, graph)')
        try:
            data = json.loads(Path(path).read_text())
        except ValueError as error:
            raise PruneError(f'{os.fspath(path)!r} is not a plan: {error}.') from error
        return cls.from_dict(data, graph, os.fspath(path))

    @classmethod
    def from_dict(cls, data: Any, graph: ChannelGraph, source: str = 'the data') -> Plan:
        '''Make a plan from the values of :meth:`to_dict`.

        Parameters
        ----------
        data: object
            The values, as JSON holds them.
        graph: ChannelGraph
            The removable channels of the network that the plan is for.
        source: str
            The name of the values in errors.

        Returns
        -------
        Plan
            The plan, with the reliability of its scores if that is among the values.

        Raises
        ------
        PruneError
            If the values are not those of a plan, or of one for another network.

        Examples
        --------
        >>> plan = zp.Plan(graph, {'conv1': [0, 3]})
        >>> zp.Plan.from_dict(plan.to_dict(), graph) == plan
        True
        '''
        check_graph(graph)
        if not isinstance(data, dict) or data.get('format') != FORMAT:
            raise PruneError(f'{source!r} is not a plan: it lacks "format": "{FORMAT}".')
        if data.get('version') != 1:
            raise PruneError(f'{source!r} is a plan of version {data.get("version")!r}; this release reads version 1.')
        sizes = {group.name: group.size for group in graph.groups}
        removed = data.get('removed', {})
        if not isinstance(removed, dict) or not isinstance(data.get('groups', {}), dict):
            raise PruneError(f'{source!r} is no plan: "groups" and "removed" are objects by group name.')
        for name, size in data.get('groups', {}).items():
            if sizes.get(name) != size:
                blocks = next((group.step for group in graph.groups if group.name == name), 1)
                hint = ''
                if blocks > 1 and sizes[name] == size * blocks:
                    hint = (f' If it was saved when the {blocks} blocks of this group had to lose equal positions, '
                            'make it again: each block loses positions of its own now.')
                raise PruneError(f'{source!r} is a plan for another network: its group {name!r} has {size} channels, '
                                 f'here it has {sizes.get(name, "none")}.{hint}')
        reliability = data.get('reliability')
        return cls(graph, removed, None if reliability is None else Reliability.from_dict(reliability, source))

    # reading
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and other.graph is self.graph and dict(other.removed) == dict(self.removed)

    def __hash__(self) -> int:
        return hash((id(self.graph), tuple(self.removed.items())))

    @names_options()
    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        '''Draw how many channels of every group stay.

        Parameters
        ----------
        path: path-like, optional
            An image file to write; its suffix says of which kind, e.g. ``.png`` or ``.svg``.

        Returns
        -------
        matplotlib.figure.Figure
            The figure, with a column for each group.

        Raises
        ------
        PruneError
            If matplotlib is not installed, or the folder of ``path`` does not exist.

        Examples
        --------
        >>> figure = zp.Plan(graph, {'conv1': [0, 3]}).plot()
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['conv1', 'conv2']
        '''
        return _plotted(self, path)

    def _tables(self) -> tuple[Table, list[str]]:
        '''Return the table of the groups, and lines on the whole network.'''
        rows: list[tuple[Any, ...]] = []
        reliability = {} if self.reliability is None else self.reliability.groups
        for group in self.graph.groups:
            gone = len(self.removed.get(group.name, ()))
            halves = [f'{reliability[group.name]:.2f}' if group.name in reliability else ''] if reliability else []
            rows.append((group.name, group.size, group.size - gone, Share(1 - gone / group.size), *halves))
        costs = cost_model(self.graph)
        counts = costs.counts(self.removed)
        totals = []
        for unit in ('flops', 'params', 'channels'):
            before, after = costs(unit, 0 * counts), costs(unit, counts)
            totals.append(f'{unit}: {before:,.0f} -> {after:,.0f} ({after / (before or 1):.1%} left)')
        header = ('group', 'channels', 'left', 'share', *['reliability'] * bool(reliability))
        notes = [str(note) for note in (self.timing, self.reliability) if note is not None]
        return (header, rows), [*totals, *notes, *[f'Note: {self._left_behind}.'] * bool(self._left_behind)]

    def __str__(self) -> str:
        groups, notes = self._tables()
        return '\n'.join([table(*groups), '', *notes])

    def _repr_html_(self) -> str:
        groups, notes = self._tables()
        return panel(repr(self), [groups], notes)

    def __repr__(self) -> str:
        return f'Plan({sum(map(len, self.removed.values()))} channels of {len(self.removed)} groups removed)'


@names_options()
def verify(model: nn.Module, small: nn.Module, plan: Plan, example: Any) -> float:
    '''Compare a pruned network with the masked original on seeded noise.

    Parameters
    ----------
    model: torch.nn.Module
        The original as it is now; it is left as it is.
    small: torch.nn.Module
        The pruned network as it is now; it is left as it is.
    plan: Plan
        The plan by which ``small`` was pruned.
    example: torch.Tensor, tuple or dict
        An input, a tuple of arguments, or a dict of keyword arguments. Its floating-point tensors are replaced by
        Gaussian noise of their shape; others are used as they are. Outputs are also compared for the further examples
        (``examples=``) of the trace.

    Returns
    -------
    float
        The largest absolute difference of any output, divided by the largest absolute output.

    Raises
    ------
    PruneError
        If ``model`` is not the network that was traced, or the networks are given in the other order.
    VerificationError
        If the result exceeds 1e-10 (float64), 1e-4 (float32), 2e-2 (float16) or 1e-1 (bfloat16), or is not finite. The
        message names the first layer that differs.

    Examples
    --------
    >>> import torch
    >>> import zennit_prune as zp
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)), torch.ones(2, 3)
    >>> plan = zp.Plan(zp.trace(model, x), {'0': [1, 2]})
    >>> zp.verify(model, plan.apply(model), plan, x) < 1e-4
    True
    '''
    model, small = checked_pair('verify(model, small, plan, example)', model, small, plan)
    model = plan._checked_model(model)
    further = [other.fitted(model) for other in plan.graph._recording.examples[1:]]
    return max(compare(plan.graph, model, small, plan.removed, given) for given in (example, *further))


def checked_pair(call: str, model: nn.Module, small: nn.Module, plan: Plan) -> tuple[nn.Module, nn.Module]:
    '''Return the networks inside two modules; refuse arguments in another order than that of ``call``.'''
    checked_plan(call, plan)
    model, small = prunable(model), prunable(small)
    if plan.removed and not plan._misfit(model) and not plan._misfit(small, pruned=False):
        raise PruneError('the networks are given in the other order: the first one has the shapes of the pruned '
                         f'network, the second one those of the original. The order is {call}: the original first.')
    return model, small


def checked_plan(call: str, plan: Plan) -> None:
    '''Refuse anything but a plan in the place of the plan.'''
    if not isinstance(plan, Plan):
        raise PruneError(f'a Plan is needed, not {shown(plan)}: the order of arguments is {call}.')


def _plotted(plan: Plan, path: str | os.PathLike[str] | None = None) -> Any:
    '''Draw a column for every group: its channels, and those that stay.'''
    figure = new_figure(path, (8, 3.2))
    axes = figure.add_subplot()
    groups = plan.graph.groups
    at = np.arange(len(groups))
    axes.bar(at, [group.size for group in groups], color=BEFORE, label='before')
    axes.bar(at, [group.size - len(plan.removed.get(group.name, ())) for group in groups], color=KEPT, label='left')
    step = max(1, math.ceil(len(groups) / 40))  # of names that can be read
    axes.set_xticks(at[::step], [without_mathematics(group.name) for group in groups[::step]], rotation=90, fontsize=7)
    axes.set_ylabel('channels')
    axes.margins(x=0.01)
    axes.legend(frameon=False)
    return finished(figure, [axes], path)

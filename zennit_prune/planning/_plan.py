'''``Plan``: an immutable choice of channels to remove, to be read, edited, saved, tried and applied.

What may be asked to go: positions in groups, equally many of each of their blocks.

Two plans in a row as one: what the second removes from the pruned network, in channels of the original.

A pruned network traced anew may show other groups under other names: a grouped convolution that is left with one
channel a group is a depthwise one. What relates the two is where channels sit in parameters.
'''
from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..errors import PruneError
from ..graph._graph import ChannelGraph
from ..graph._groups import ChannelGroup
from ..relevance._relevance import Reliability
from ..surgery._masking import masked_copy, warn_of_changed_statistics
from ..surgery._surgery import transplant
from ..surgery._verify import compare
from ..util._display import Share, Table, panel, some, table, waiting
from ..util._files import write_text
from ..util._isolation import isolated
from ..util._networks import tensors_by_module, unwrapped, without_garbage_collection
from ..util._plots import BEFORE, KEPT, finished, new_figure, without_mathematics
from ._cost import CostModel
from ._latency import Timing


def checked_positions(group: ChannelGroup, positions: Iterable[int]) -> tuple[int, ...]:
    '''Sorted positions, each a whole number within the group and given once.'''
    if isinstance(positions, str) or not isinstance(positions, Iterable) or getattr(positions, 'ndim', 1) == 0:
        raise PruneError(f'positions of group {group.name!r} are a list, not {positions!r}.')
    numbers = []
    for position in positions:
        try:
            flag = isinstance(position, (bool, np.bool_)) or getattr(position, 'dtype', None) == torch.bool
            number = None if flag else operator.index(position)
        except TypeError:
            number = None
        if number is None:
            raise PruneError(f'{position!r} is no position in group {group.name!r}: give whole numbers from 0 to '
                             f'{group.size - 1}.')
        numbers.append(number)
        if not 0 <= numbers[-1] < group.size:
            raise PruneError(f'position {position} is out of range for group {group.name!r}: it has positions 0 to '
                             f'{group.size - 1}.')
    if len(set(numbers)) < len(numbers):
        twice = next(number for number in numbers if numbers.count(number) > 1)
        raise PruneError(f'position {twice} of group {group.name!r} is given twice.')
    return tuple(sorted(numbers))


def check_balance(graph: ChannelGraph, group: ChannelGroup, positions: Sequence[int]) -> None:
    '''Refuse to remove different numbers of channels from the blocks of a group.'''
    if group.blocks is None:
        return
    counts = np.bincount(group.blocks[list(positions)], minlength=group.step).tolist()
    if len(set(counts)) > 1:
        most, least = counts.index(max(counts)), counts.index(min(counts))
        spare = np.setdiff1d(np.flatnonzero(group.blocks == least), positions)
        raise PruneError(f'the {group.step} blocks of group {group.name!r} must lose equally many channels, for '
                         f'{some(graph._balanced_by(group), 3)}: block {most} would lose {counts[most]}, block {least} '
                         f'{counts[least]}. Choose all of them in one call; the block of each position is in '
                         f'group.blocks. Block {least} could also lose {some(map(str, spare.tolist()))}.')


Removed = Mapping[str, Sequence[int]]


def composed(before: ChannelGraph, first: Removed, after: ChannelGraph, second: Removed) -> dict[str, list[int]]:
    '''The positions that go, by group of the original.

    Parameters
    ----------
    before, first:
        The original, and what the first plan removes from it.
    after, second:
        The pruned network, and what the second plan removes from that.

    Raises
    ------
    PruneError
        If ``after`` is not what ``first`` leaves, or the original cannot lose these channels at once.
    '''
    gone = before._removed_labels(first)
    lost, matched = _carried(before, gone, after, after._removed_labels(second))
    channel = before._solution.channel
    new = np.unique(channel[lost])
    stuck = lost & (channel < 0)
    if stuck.any():
        raise PruneError(f'{_where(before, stuck)} must stay in the original '
                         f'({before._solution.reason(int(stuck.argmax()))}): the later plan cannot be joined to this '
                         'one. Apply one after the other.')
    part = matched & ~lost & ~gone & np.isin(channel, new) & (channel >= 0)
    if part.any():
        raise PruneError(f'the later plan removes parts of channels of the original, which also sit in '
                         f'{_where(before, part)}: it cannot be joined to this one. Apply one after the other.')
    chosen = np.zeros(len(before._solution.group), bool)
    chosen[new] = True
    removed = {}
    for group in before.groups:
        positions = sorted({*first.get(group.name, ()), *np.flatnonzero(chosen[group.channels]).tolist()})
        counts = np.bincount(group.blocks[positions], minlength=group.step) if group.blocks is not None else [0]
        if len(set(counts)) > 1:
            raise PruneError(f'the later plan removes whole blocks of group {group.name!r}, whose {group.step} blocks '
                             'must lose equally many channels in the original, for '
                             f'{some(before._balanced_by(group), 3)}: left with one channel each, they are a depthwise '
                             'convolution. It cannot be joined to this one. Apply one after the other.')
        if positions:
            removed[group.name] = positions
    return removed


def _carried(before: ChannelGraph, gone: npt.NDArray[np.bool_], after: ChannelGraph,
             lost_after: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    '''For each label of the original, whether it goes with those of ``after``, and whether it is there at all.'''
    axes = {(axis.parameter, axis.dim): axis for axis in after._recording.axes}
    lost, matched = np.zeros((2, len(gone)), bool)
    for axis in before._recording.axes:
        labels = axis.labels[~gone[axis.labels]]
        there = axes.pop((axis.parameter, axis.dim), None)
        if there is not None and there.size == len(labels):
            lost[labels] = lost_after[there.start:there.start + there.size]
            matched[labels] = True
        elif there is not None or len(labels) > axis.blocks:  # a dimension of one index has no labels
            raise PruneError(f'{axis.parameter!r} has {len(labels) // axis.blocks} indices along dimension {axis.dim} '
                             f'after this plan, but {"no such dimension" if there is None else there.length} in the '
                             'later one: the later plan was made for another network.')
    if axes:
        raise PruneError(f'{next(iter(axes))[0]!r} is not in the network of this plan: the later plan was made for '
                         'another network.')
    return lost, matched


def _where(graph: ChannelGraph, labels: npt.NDArray[np.bool_]) -> str:
    numbers = np.unique(graph._roles.axis[np.flatnonzero(labels)])
    return some(dict.fromkeys(repr(graph._recording.axes[number].parameter) for number in numbers.tolist()), 3)


FORMAT = 'zennit_prune plan'


class Plan:
    '''Which channels of which groups are to be removed.

    Every edit returns a new plan; nothing happens to any network before :meth:`apply`.

    Parameters
    ----------
    graph: ChannelGraph
        The network's removable channels.
    removed: mapping of str to iterable of int, optional
        Positions within each group.
    reliability: Reliability, optional
        How far the scores that the plan was made from depend on the samples; for the table, and kept by edits.
    timing: Timing, optional
        What a plan for a latency budget was measured to take; for the table, gone with an edit, and not saved.

    Attributes
    ----------
    removed: mapping of str to tuple of int
        Sorted positions by group name, groups that lose nothing left out. Read-only.

    Raises
    ------
    PruneError
        For an unknown or locked name, a position out of range or given twice, blocks of a group that lose different
        numbers of channels, or a dimension that would be emptied.
    '''

    def __init__(self, graph: ChannelGraph, removed: Mapping[str, Iterable[int]] | None = None,
                 reliability: Reliability | None = None, timing: Timing | None = None):
        if not isinstance(graph, ChannelGraph):
            raise PruneError(f'a plan is made for a ChannelGraph, which zp.trace returns, not for {graph!r}.')
        self.graph, self.reliability, self.timing = graph, reliability, timing
        if removed is not None and not isinstance(removed, Mapping):
            raise PruneError(f'removals are positions by group name, a dict, not {removed!r}.')
        found: dict[str, tuple[int, ...]] = {}
        for name, positions in (removed or {}).items():
            group = graph.group(name)
            if group.name in found:
                raise PruneError(f'{name!r} names group {group.name!r}, which is given twice: join the positions.')
            found[group.name] = checked_positions(group, positions)
            check_balance(graph, group, found[group.name])
        self._removed = {group.name: found[group.name] for group in graph.groups if found.get(group.name)}
        self._check_not_emptied()

    @property
    def removed(self) -> Mapping[str, tuple[int, ...]]:
        '''Sorted positions by group name, groups that lose nothing left out. Read-only.'''
        return MappingProxyType(self._removed)

    def _check_not_emptied(self) -> None:
        gone = self.graph._removed_labels(self.removed)
        for axis in self.graph._recording.axes:
            if gone[axis.start:axis.start + axis.size].all():
                raise PruneError(f'the plan removes all {axis.size} channels along dimension {axis.dim} of '
                                 f'{axis.parameter!r}: keep at least one.')

    # editing
    def remove(self, name: str, positions: Iterable[int]) -> Plan:
        '''A plan that also removes these positions of a group (or of the only group of a layer).

        Of a group with blocks (``group.blocks``), equally many positions of each block go.
        '''
        group = self.graph.group(name)
        fresh = checked_positions(group, positions)
        removed = {**self.removed, group.name: sorted({*self.removed.get(group.name, ()), *fresh})}
        return Plan(self.graph, removed, self.reliability)

    def keep(self, name: str, positions: Iterable[int]) -> Plan:
        '''A plan that keeps these positions of a group (or of the only group of a layer).'''
        group = self.graph.group(name)
        kept = set(checked_positions(group, positions))
        left = [position for position in self.removed.get(group.name, ()) if position not in kept]
        return Plan(self.graph, {**self.removed, group.name: left}, self.reliability)

    def compose(self, later: Plan) -> Plan:
        '''The plan that does in one step what this plan and then ``later``, made for the pruned network, do.

        Parameters
        ----------
        later: Plan
            Its positions count what this plan leaves; channels are told by where they sit in parameters.

        Raises
        ------
        PruneError
            If ``later`` was made for another network, or the original cannot lose these channels at once: a grouped
            convolution that is left with one channel a group loses whole groups as a depthwise one.
        '''
        return Plan(self.graph, composed(self.graph, self.removed, later.graph, later.removed))

    # trying and applying
    @torch.inference_mode(False)
    def masked(self, model: nn.Module) -> _Masked:
        '''A separate network of the original shapes that computes what the pruned network will compute.

        It is built by zeroing what reads the removed channels, attributions included. It can be used in a ``with``
        statement; ``model`` is never touched. A rule that ignores weights (``Flat``, ``WSquare``) inside the network
        still spreads relevance over silent channels: use the pruned network for such composites.

        Parameters
        ----------
        model: torch.nn.Module
            The traced network.
        '''
        masked = masked_copy(self.graph, self._checked_model(model), self.removed)
        masked.__class__ = type(type(masked).__name__, (_Masked, type(masked)), {'__module__': type(masked).__module__})
        return cast(_Masked, masked)

    def apply(self, model: nn.Module, verify: bool = True, progress: bool = True) -> nn.Module:
        '''Remove the channels: an ordinary, smaller network of the same class.

        The structure is always proven; ``verify`` adds numbers.

        Parameters
        ----------
        model: torch.nn.Module
            The traced network; it is left as it is, whatever happens.
        verify: bool
            Compare the result with the masked original on noise.
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
            original with these channels silent (:class:`VerificationError` where numbers differ).
        '''
        model = self._checked_model(model)
        if not self.removed:
            raise PruneError('the plan is empty: it removes no channel.')
        with torch.inference_mode(False), waiting('apply', progress):
            small = self._proven(model)
            self.graph._recording.warn_if_untraced()
            warn_of_changed_statistics(self.graph._recording.operations, self.graph._removed_labels(self.removed))
            if verify:
                compare(self.graph, model, small, self.removed, self.graph._recording.example.fitted(model))
        return small

    def _proven(self, model: nn.Module) -> nn.Module:
        with without_garbage_collection(), isolated(model):
            small = self.graph._narrowed(model, self.removed)
            failure = self.graph._prove(small, self.removed)
        if failure is not None:
            layers = self.graph._layers_in(failure.operation, self.removed)
            raise PruneError(f'this plan cannot be applied exactly: {failure}. Remove fewer channels of '
                             f'{some(map(repr, layers))}, or none: trace with ignore={layers!r}.')
        return small

    @torch.inference_mode(False)
    def apply_(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None,
               verify: bool = True) -> nn.Module:
        '''Remove the channels in place; everything is proven before the first write.

        Parameters
        ----------
        model: torch.nn.Module
            The traced network; it is narrowed and returned.
        optimizer: torch.optim.Optimizer, optional
            Its parameter groups point to the new parameters, and its state (momentum, Adam moments) is narrowed along.
        verify: bool
            As for :meth:`apply`.

        Raises
        ------
        PruneError
            As :meth:`apply`; nothing is changed then.
        '''
        inner = unwrapped(model)
        small = self.apply(inner, verify)
        transplant(inner, small, self.graph._kept(self.removed), self.graph._group_sizes,
                   self.graph._attributes(self.removed), optimizer)
        return model

    def _checked_model(self, model: nn.Module) -> nn.Module:
        '''The network inside ``model``, after a check that it is the one that was traced.'''
        model = unwrapped(model)
        tensors = dict(tensors_by_module(model))
        for axis in self.graph._recording.axes:
            shape = tuple(tensors[axis.parameter].shape) if axis.parameter in tensors else ()
            if len(shape) <= axis.dim or shape[axis.dim] != axis.length:
                has = f'has shape {shape}' if shape else 'is missing'
                raise PruneError(f'this is not the network that was traced: {axis.parameter!r} {has}, but had '
                                 f'{axis.length} indices along dimension {axis.dim}. Trace it again.')
        return model

    # files
    def save(self, path: str | os.PathLike[str]) -> None:
        '''Write the plan as JSON.'''
        write_text(path, json.dumps(self.to_dict(), indent=1) + '\n')

    def to_dict(self) -> dict[str, Any]:
        '''The plan as JSON values: its removals, and the sizes of all groups, by which a network is known.'''
        data = {'format': FORMAT, 'version': 1, 'groups': {group.name: group.size for group in self.graph.groups},
                'removed': {name: list(positions) for name, positions in self.removed.items()}}
        return data if self.reliability is None else {**data, 'reliability': self.reliability.to_dict()}

    @classmethod
    def load(cls, path: str | os.PathLike[str], graph: ChannelGraph) -> Plan:
        '''Read a plan for the network of ``graph``.

        Raises
        ------
        PruneError
            If the file is not a plan, or is one for another network.
        '''
        try:
            data = json.loads(Path(path).read_text())
        except ValueError as error:
            raise PruneError(f'{os.fspath(path)!r} is not a plan: {error}.') from error
        return cls.from_dict(data, graph, os.fspath(path))

    @classmethod
    def from_dict(cls, data: Any, graph: ChannelGraph, source: str = 'the data') -> Plan:
        '''The inverse of :meth:`to_dict`.'''
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

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        '''Draw how many channels of every group stay, to a file or not; returns the matplotlib figure.'''
        return _plotted(self, path)

    def _tables(self) -> tuple[Table, list[str]]:
        '''The groups, and lines on the whole network.'''
        rows: list[tuple[Any, ...]] = []
        stability = {} if self.reliability is None else self.reliability.groups
        for group in self.graph.groups:
            gone = len(self.removed.get(group.name, ()))
            agreement = [f'{stability[group.name]:.2f}' if group.name in stability else ''] if stability else []
            rows.append((group.name, group.size, group.size - gone, Share(1 - gone / group.size), *agreement))
        costs = CostModel(self.graph)
        counts = costs.counts(self.removed)
        totals = []
        for unit in ('flops', 'params', 'channels'):
            before, after = costs(unit, 0 * counts), costs(unit, counts)
            totals.append(f'{unit}: {before:,.0f} -> {after:,.0f} ({after / (before or 1):.1%} left)')
        header = ('group', 'channels', 'left', 'share', *['stability'] * bool(stability))
        notes = [str(note) for note in (self.timing, self.reliability) if note is not None]
        return (header, rows), [*totals, *notes]

    def __str__(self) -> str:
        groups, notes = self._tables()
        return '\n'.join([table(*groups), '', *notes])

    def _repr_html_(self) -> str:
        groups, notes = self._tables()
        return panel(repr(self), [groups], notes)

    def __repr__(self) -> str:
        return f'Plan({sum(map(len, self.removed.values()))} channels of {len(self.removed)} groups removed)'


def verify(model: nn.Module, small: nn.Module, plan: Plan, example: Any) -> float:
    '''Compare a pruned network with the masked original on seeded noise.

    Parameters
    ----------
    model, small: torch.nn.Module
        The original and the pruned network, both as they are now; neither is changed.
    plan: Plan
        What was removed.
    example: torch.Tensor, tuple or dict
        Its floating-point tensors are replaced by Gaussian noise of their shape; others are used as they are.

    Returns
    -------
    float
        The largest absolute difference over the largest absolute output.

    Raises
    ------
    VerificationError
        If that exceeds 1e-10 (float64), 1e-4 (float32), 2e-2 (float16) or 1e-1 (bfloat16); it names the first wrong
        layer.
    '''
    return compare(plan.graph, plan._checked_model(model), unwrapped(small), plan.removed, example)


if TYPE_CHECKING:
    _Network = nn.Module
else:
    _Network = object  # the class of the network is joined to it at run time


class _Masked(_Network):
    '''Lets a masked network be used in a ``with`` statement.'''

    def __enter__(self) -> _Masked:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        return None


def _plotted(plan: Plan, path: str | os.PathLike[str] | None = None) -> Any:
    '''A column for every group: how many channels it has, and how many stay.'''
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

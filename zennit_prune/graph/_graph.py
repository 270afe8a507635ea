'''Trace a network into a ``ChannelGraph``: its removable channels in groups, and the reasons why others must stay.

:func:`trace` puts the steps together: record a run, solve for channels, build groups, remove some channels of each on
trial, and lock those that the replay rejects, until it accepts.
'''
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import PruneError, names_options, shown
from ..surgery._replay import Failure, replay
from ..surgery._surgery import narrowed_copy
from ..tracing._attributes import Attribute, Claim, new_sizes, stating_several
from ..tracing._calls import Site
from ..tracing._labels import Labels
from ..tracing._parametrized import fixed_dims, restore
from ..tracing._recorded import Operation
from ..tracing._trace import Recording, record
from ..util._display import Table, panel, some, table, waiting
from ..util._isolation import isolated
from ..util._networks import Indices, prunable, structural_copy, without_garbage_collection
from ._explain import Reach, balances, couplings, graph_tables, group_text, locked_inputs, reach, unused_parts
from ._groups import ChannelGroup, Mask, Roles, build_groups, build_locked, trial_counts
from ._solve import Lock, solve

MAX_TRIALS = 400


@names_options()
@torch.inference_mode(False)
def trace(model: nn.Module, example: Any, ignore: Sequence[str] = (), layernorm: str = 'lock',
          progress: bool = True, examples: Sequence[Any] = ()) -> ChannelGraph:
    '''Find the removable channels of a network.

    A copy of the network is run without data; the network itself is not touched. Channels that the trace cannot prove
    removable are locked.

    Parameters
    ----------
    model: torch.nn.Module
        An ordinary module, on any device and of any floating-point type. ``DataParallel``, ``DistributedDataParallel``,
        ``torch.optim.swa_utils.AveragedModel`` and compiled networks are unwrapped.
    example: torch.Tensor, tuple or dict
        An input, a tuple of arguments, or a dict of keyword arguments, on the network's device; values do not matter.
    ignore: sequence of str
        Patterns, as of ``fnmatch``, of the names of modules and parameters whose output channels are kept, e.g.
        ``'layer4*'``.
    layernorm: str
        Whether channels that LayerNorm runs over stay (``'lock'``), since removing one changes the statistics of all
        others, or can be removed (``'surviving'``), so that mean and variance run over the channels that are left. The
        latter changes the network by more than the removal: the pruned network is exact against an original whose
        LayerNorm runs over the surviving channels only, and :meth:`Plan.apply` warns.
    progress: bool
        Whether to show a progress bar on standard error once the trace takes more than two seconds.
    examples: sequence
        Further examples, each given like ``example``, for a network of several tasks, e.g. one for each head. The
        network is traced with all of them. A channel can be removed only if it can with each, and applying a plan is
        proven and verified with each. Costs, latencies and relevance are those of ``example``.

    Returns
    -------
    ChannelGraph
        The groups of removable channels, and the locked layers with reasons.

    Raises
    ------
    PruneError
        If the network does not run with an example, branches on values of its input, or is not an ordinary module; if
        it has masks of ``torch.nn.utils.prune`` or is prepared for quantization; if an example is on another device; if
        a pattern in ``ignore`` matches nothing; if ``layernorm`` is neither of its values.

    Examples
    --------
    >>> import torch
    >>> import zennit_prune as zp
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4))
    >>> graph = zp.trace(model, torch.zeros(1, 3, 8, 8))
    >>> graph.groups
    (ChannelGroup(name='0', size=8), ChannelGroup(name='2', size=6))
    >>> zp.trace(model, torch.zeros(1, 3, 8, 8), ignore=['2']).locked
    {'2': 'ignored (2)', '4': 'it is an output of the network'}

    A network of two tasks, of which a call runs one:

    >>> class Tasks(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.body, self.heads = nn.Linear(3, 6), nn.ModuleList([nn.Linear(6, 1), nn.Linear(6, 2)])
    ...     def forward(self, x, task=0):
    ...         return self.heads[task](self.body(x))
    >>> x = torch.zeros(1, 3)
    >>> zp.trace(Tasks(), x, examples=[(x, 1)]).group('body').layers('consumer')
    ['heads.0', 'heads.1']
    '''
    check_layernorm(layernorm)
    model = prunable(model)
    with without_garbage_collection(), isolated(model), waiting('trace', progress):
        return ChannelGraph(model, example, ignore, layernorm, examples)


def check_layernorm(layernorm: str) -> None:
    '''Refuse a setting of ``layernorm`` that is not known.'''
    if layernorm not in ('lock', 'surviving'):
        raise PruneError(f"layernorm={layernorm!r} is neither 'lock', which keeps the channels that LayerNorm runs "
                         "over, nor 'surviving', which takes its statistics over those that are left.")


def check_graph(given: object, needed: str = 'a {} is needed, which zp.trace returns, not {}') -> None:
    '''Refuse anything but a graph, and name the graph that the object has.'''
    if not isinstance(given, ChannelGraph):
        hint = ' Give its .graph.' if isinstance(getattr(given, 'graph', None), ChannelGraph) else ''
        raise PruneError(f'{needed.format("ChannelGraph", shown(given))}.{hint}')


class ChannelGraph:
    '''The removable channels of a network, in dependency groups, and the reasons why other channels must stay.

    Graphs are made by :func:`trace`. Printing one shows its groups and its locked layers.

    Parameters
    ----------
    model: torch.nn.Module
        The network.
    example: torch.Tensor, tuple or dict
        The arguments to run it with.
    ignore: sequence of str
        Patterns of the names of modules and parameters whose output channels are kept.
    layernorm: str
        Whether channels that LayerNorm runs over are locked, as in :func:`trace`.
    examples: sequence
        Further arguments to run it with, as in :func:`trace`.

    Attributes
    ----------
    groups: tuple of ChannelGroup
        The groups, in execution order of their first producers.
    locked: dict of str to str
        The layers and parameters of which all or some output channels must stay, each with the reason.
    notes: list of str
        Remarks about the trace that the user should know.

    Examples
    --------
    >>> import torch
    >>> import zennit_prune as zp
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4))
    >>> graph = zp.trace(model, torch.zeros(1, 3, 8, 8))
    >>> graph
    ChannelGraph(2 groups, 14 removable channels)
    >>> graph.group('1')  # the BatchNorm holds the channels of the convolution before it
    ChannelGroup(name='0', size=8)
    >>> print(graph.why('1'))
    1 holds the 8 channels of group '0':
      produced by 0
      read by 2
      followed by 0.bias, 1, 1.bias, 1.running_mean, 1.running_var
    >>> graph.locked
    {'4': 'it is an output of the network'}
    >>> print(graph.reach)
    within reach: 99.6% of the parameters, 100.0% of the FLOPs, 77.8% of the output channels of all layers
    '''

    def __init__(self, model: nn.Module, example: Any, ignore: Sequence[str] = (), layernorm: str = 'lock',
                 examples: Sequence[Any] = ()):
        self._costs: Any = None  # the cost model, once it was asked for
        self._find(model, record(model, example, layernorm, examples=examples), ignore)
        whole = self._stuck_stacks()
        if whole:
            found = vars(self).copy()
            self._find(model, record(model, example, layernorm, whole, examples), ignore)
            if not any((self._solution.channel[labels] >= 0).any() for labels in self._joint(whole)):
                self.__dict__.update(found)

    def _find(self, model: nn.Module, recording: Recording, ignore: Sequence[str]) -> None:
        self._recording, self.notes = recording, list(recording.notes)
        self._coupled: set[Attribute] = set()
        self._locks: list[Lock] = [*self._ignored(model, ignore), *self._computed(model)]
        self._roles = Roles(self._recording)
        self._solve()
        self._lock_what_fails(model)

    def _stuck_stacks(self) -> set[Site]:
        '''Find the products of stacks of matrices that can lose no row or column but might lose whole matrices.

        In attention the matrices are heads. Its two products are in one module: if one of them can lose width, heads
        stay. A module that makes no shape from its attributes could not be told how many heads are left.
        '''
        stating = {claim.attribute.module for claim in self._claims()}
        sites = {operation.site for operation in self._recording.operations
                 if operation.joint and operation.site.module in stating}
        loose = {site[:2] for site in sites for labels in self._joint([site])
                 if not self._solution.locked[labels].all()}
        return {site for site in sites if site[:2] not in loose}

    def _joint(self, sites: Iterable[Site]) -> list[Labels]:
        return [labels for operation in self._recording.operations if operation.site in set(sites)
                for labels in operation.joint]

    def _ignored(self, model: nn.Module, patterns: Sequence[str]) -> Iterable[Lock]:
        '''Lock the channels that the modules and parameters named by a pattern produce.'''
        if isinstance(patterns, str) or not isinstance(patterns, Iterable) \
                or not all(isinstance(pattern, str) for pattern in patterns):
            raise PruneError(f"ignore is a sequence of patterns of module names, not {patterns!r}: e.g. ignore=['fc'].")
        modules = [name for name, _ in model.named_modules() if name] if patterns else []
        for pattern in patterns:
            matches = [name for name in (*modules, *self._recording.fields) if fnmatchcase(name, pattern)]
            if not matches:
                raise PruneError(f'ignore={pattern!r} matches no module of the network. Names are those of '
                                 f'named_modules(), e.g. {", ".join(map(repr, modules[:5]))}; * matches dots too.')
            reason, found = f'ignored ({pattern})', False
            for run in self._recording.runs.values():
                for (name, _), tensors in run.outputs.items():
                    if name in matches:
                        for field in (field for fields in tensors for field in fields):
                            found = True
                            yield field.labels, reason
            for name, fields in self._recording.fields.items():
                inside = not found and any(name.startswith(f'{match}.') for match in matches)  # not called as a module
                if inside or name in matches:
                    yield from ((field.labels, reason) for field in fields[:1])

    def _computed(self, model: nn.Module) -> Iterable[Lock]:
        '''Lock the channels that parametrizations of weights keep.'''
        for name, dim, reason in fixed_dims(model):
            yield from ((field.labels, reason) for field in self._recording.fields.get(name, ()) if dim in field.dims)

    def _solve(self) -> None:
        self._solution = solve(self._recording, self._locks)
        self.groups: tuple[ChannelGroup, ...] = build_groups(self._recording, self._solution, self._roles)
        self.locked: dict[str, str] = build_locked(self._recording, self._solution, self._roles)

    def _lock_what_fails(self, model: nn.Module) -> None:
        '''Remove some channels of every group on trial, and lock channels that the replay rejects, until it accepts.'''
        for _ in range(MAX_TRIALS):
            if not self._couple_what_is_counted_once():
                failure = self._failed_trial(model)
                if failure is None:
                    return
                self._lock(failure)
            self._solve()
        raise PruneError(f'no channels were found that survive a trial removal; the last failure: {failure}.')

    def _couple_what_is_counted_once(self) -> bool:
        '''Couple channels whose number one attribute states: ``forward`` would not run with different numbers.'''
        component, every = self._solution.component, self._claims()
        stated = Counter(claim.attribute for claim in every)
        claims = [claim for claim in every if stated[claim.attribute] > 1]
        found = stating_several(claims, self._removed_labels(self._on_trial())) if claims else {}
        fresh = {attribute: rows for attribute, rows in found.items()
                 if attribute not in self._coupled and (component[rows] != component[rows[:1]]).any()}
        for attribute, rows in fresh.items():
            site = Site(attribute.module, 0, attribute.name, 0)
            self._recording.operations.append(Operation(f'self.{attribute.name}', site, balances=[rows]))
        self._coupled.update(fresh)
        return bool(fresh)

    def _on_trial(self, one_each: bool = False) -> dict[str, list[int]]:
        '''Choose some positions of all groups that can lose any, as many of each block, equally at every call.'''
        groups = [group for group in self.groups if group.size > group.step]
        counts = [1] * len(groups) if one_each else trial_counts(groups)
        orders = (group.order_by_block(np.argsort(np.random.default_rng(group.size).permutation(group.size)))
                  for group in groups)
        return {group.name: order[:count * group.step].tolist() for group, order, count in zip(groups, orders, counts)}

    def _failed_trial(self, model: nn.Module) -> Failure | None:
        '''Replay the network without a share of each group, and return the first failure, or None.

        Where attributes of modules change, it is also replayed without one channel of each group: ``forward`` may
        divide one attribute by another, and with similar shares a quotient would not change.
        '''
        for one_each in (False, True):
            removed = self._on_trial(one_each)
            failure = self._replayed(self._narrowed(model, removed, 'meta'), removed) if removed else None
            if failure is not None or not self._attributes(removed):
                return failure
        return None

    def _lock(self, failure: Failure) -> None:
        '''Lock the channels that meet in the failing operation, and in its counterparts in modules of that class.'''
        operations = self._recording.runs[failure.mode].operations
        culprit = failure.operation
        what = (culprit.name, culprit.kind, culprit.site[2:])
        alike = [operation for operation in operations
                 if (operation.name, operation.kind, operation.site[2:]) == what]
        before, after = reversed(operations[:failure.index]), operations[failure.index + 1:]
        for candidates in (alike, *([operation] for operation in (*before, *after))):
            fresh = [(field.labels, str(failure)) for operation in candidates for field in operation.fields()
                     if (self._solution.channel[field.labels] >= 0).any()]
            if fresh:
                self._locks += fresh
                return
        raise PruneError(f'the network cannot be pruned: {failure}, and no channel flows there that could be kept.')

    # what the steps after the trace ask
    @property
    def _group_sizes(self) -> dict[str, int]:
        '''The channels per group of the weights of depthwise convolutions and GroupNorm.'''
        return {name: size for run in self._recording.runs.values() for name, size in run.group_sizes.items()}

    def group(self, name: str) -> ChannelGroup:
        '''Return a group by its name or by the name of a layer that holds its channels.

        Parameters
        ----------
        name: str
            The name of a group, or of a layer that holds channels of a single group.

        Returns
        -------
        ChannelGroup
            The group.

        Raises
        ------
        PruneError
            If there is no such group, or if the layer holds channels of several.
        '''
        if not isinstance(name, str):
            raise PruneError(f'a group is given by its name, a text, not by {shown(name)}.')
        for group in self.groups:
            if group.name == name:
                return group
        holders = [group for group in self.groups if name in group.layers('producer', 'follower')]
        if len(holders) == 1:
            return holders[0]
        if holders:
            raise PruneError(f'{name!r} holds channels of several groups: '
                             f'{", ".join(repr(group.name) for group in holders)}. Name one of these.')
        if name in self.locked:
            raise PruneError(f'the channels of {name!r} must stay: {self.locked[name]}.')
        raise PruneError(f'there is no group {name!r}. Groups: {some(group.name for group in self.groups)}.')

    def _layers_in(self, operation: Operation, removed: Mapping[str, Sequence[int]]) -> list[str]:
        '''Return a layer of each group of ``removed`` that an operation meets, or of all groups if it meets none.'''
        met = {channel for field in operation.fields()
               for channel in self._solution.channel[field.labels].reshape(-1).tolist()}
        groups = [self.group(name) for name in removed]
        found = [group for group in groups if met.intersection(group.channels.tolist())] or groups
        return list(dict.fromkeys(group.layers('producer', 'follower')[0] for group in found))

    def _balanced_by(self, group: ChannelGroup) -> list[str]:
        '''Return the operations for which the blocks of a group must lose equally many channels.'''
        found = balances(self._recording, self._solution)
        return found.get(int(self._solution.group[group.channels[0]]), []) if group.blocks is not None else []

    def _check_balance(self, group: ChannelGroup, positions: Sequence[int]) -> None:
        '''Refuse to remove different numbers of channels from the blocks of a group.'''
        if group.blocks is None:
            return
        counts = np.bincount(group.blocks[list(positions)], minlength=group.step).tolist()
        if len(set(counts)) > 1:
            most, least = counts.index(max(counts)), counts.index(min(counts))
            spare = np.setdiff1d(np.flatnonzero(group.blocks == least), positions)
            raise PruneError(f'the {group.step} blocks of group {group.name!r} must lose equally many channels, for '
                             f'{some(self._balanced_by(group), 3)}: block {most} would lose {counts[most]}, block '
                             f'{least} {counts[least]}. Choose all of them in one call; the block of each position is '
                             f'in group.blocks. Block {least} could also lose {some(map(str, spare.tolist()))}.')

    def _removed_labels(self, removed: Mapping[str, Sequence[int]]) -> Mask:
        '''Return, for each label, whether it is removed with the channels at these positions of these groups.'''
        gone = np.zeros(len(self._solution.group) + 1, bool)
        for name, positions in removed.items():
            gone[self.group(name).channels[list(positions)]] = True
        return gone[self._solution.channel]

    def _kept(self, removed: Mapping[str, Sequence[int]]) -> dict[str, dict[int, Indices]]:
        '''Return the indices that stay, by parameter or buffer and dimension, where any are removed.'''
        gone = self._removed_labels(removed)
        kept: dict[str, dict[int, Indices]] = {}
        for axis in self._recording.axes:
            mask = gone[axis.start:axis.start + axis.size]
            if mask.any():
                stay = np.flatnonzero(~mask)
                index = stay.reshape(axis.blocks, -1).T % axis.length if axis.blocks > 1 else stay
                kept.setdefault(axis.parameter, {})[axis.dim] = Indices(index)
        return kept

    def _unused_beside(self, removed: Mapping[str, Sequence[int]]) -> list[str]:
        '''Return the parts that no example runs and that may read these channels, as short as they can be named.'''
        gone = self._removed_labels(removed)
        narrowed = [axis.length for axis in self._recording.axes if gone[axis.labels].any()]
        return unused_parts(self._recording, min(narrowed, default=1))

    def _attributes(self, removed: Mapping[str, Sequence[int]]) -> dict[Attribute, int]:
        '''Return the new values of attributes of modules that ``forward`` makes shapes from.'''
        return new_sizes(self._claims(), self._removed_labels(removed))

    def _claims(self) -> list[Claim]:
        return [claim for run in self._recording.runs.values() for claim in run.claims]

    def _narrowed(self, model: nn.Module, removed: Mapping[str, Sequence[int]], device: str | None = None) -> nn.Module:
        '''Make a copy of ``model`` without these channels, which is not yet proven.'''
        kept, device = self._kept(removed), device if self._recording.device == 'meta' else None
        small = narrowed_copy(model, kept, self._group_sizes, self._attributes(removed), device)
        if device is None:
            restore(small, model, kept)
        return small

    def _prove(self, small: nn.Module, removed: Mapping[str, Sequence[int]]) -> Failure | None:
        '''Trace ``small``, compare it with the original by operation, and return the first failure, or None.'''
        return self._replayed(structural_copy(small, self._recording.device), removed)

    def _replayed(self, small: nn.Module, removed: Mapping[str, Sequence[int]]) -> Failure | None:
        return replay(self._recording, self._solution, small, self._removed_labels(removed))

    # what people read
    @property
    def reach(self) -> Reach:
        '''The shares of parameters, FLOPs and output channels within reach of pruning.'''
        return reach(self._recording, self._solution, self._roles)

    def why(self, name: str) -> str:
        '''Say in words what couples or locks the channels of a layer.

        Parameters
        ----------
        name: str
            The name of a layer, a parameter or a group.

        Returns
        -------
        str
            One or more lines of text.

        Raises
        ------
        PruneError
            If nothing has that name.
        '''
        coupled, lines = self._couplings(), []
        for group in self.groups:
            if name == group.name or name in group.layers():
                number = int(self._solution.group[group.channels[0]])
                lines += group_text(group, name, coupled.get(number, []), self._balanced_by(group))
        if name in self.locked:
            lines.append(f'{name}: output channels are locked: {self.locked[name]}')
        lines += locked_inputs(self._recording, self._solution, self._roles, name)
        if not lines:
            self.group(name)
        return '\n'.join(lines)

    def _couplings(self) -> dict[int, list[str]]:
        return couplings(self._recording, self._solution, self._roles)

    def _shown(self) -> tuple[list[Table], list[str]]:
        tables = graph_tables(self.groups, self.locked, self._solution, self._couplings())
        return tables, [f'Note: {note}.' for note in self.notes]

    def __str__(self) -> str:
        tables, notes = self._shown()
        return '\n\n'.join([f'{self!r}; {self.reach}.', *(table(*one) for one in tables), *notes])

    def _repr_html_(self) -> str:
        tables, notes = self._shown()
        return panel(f'{self!r}; {self.reach}', tables, notes)

    def __repr__(self) -> str:
        return f'ChannelGraph({len(self.groups)} groups, {sum(group.size for group in self.groups)} removable channels)'

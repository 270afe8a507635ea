'''Say in words which channels are coupled or locked, and why, and how much of a network is within reach.'''
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from ..tracing._labels import Array, Labels, flat_pairs, same
from ..tracing._rules import KERNEL
from ..tracing._trace import Recording
from ..util._display import Table, some
from ..util._networks import computed_name
from ._groups import ChannelGroup, Roles, layer_name, unused_tensors
from ._solve import NOT_READ, Solution


class Reach(NamedTuple):
    '''The shares of a network, from 0 to 1, that belong to removable channels.

    Attributes
    ----------
    params: float
        The share of the parameters.
    flops: float
        The share of the floating-point operations.
    channels: float
        The share of the output channels of all layers.
    '''

    params: float
    flops: float
    channels: float

    def __str__(self) -> str:
        return (f'within reach: {self.params:.1%} of the parameters, {self.flops:.1%} of the FLOPs, '
                f'{self.channels:.1%} of the output channels of all layers')


def reach(recording: Recording, solution: Solution, roles: Roles) -> Reach:
    '''Compute the shares within reach: a weight counts if the index of one of its dimensions can be removed.'''
    free = ~solution.locked

    def share(arrays: Iterable[Labels]) -> float:
        return 1 - math.prod(1 - float(free[labels].mean()) for labels in arrays)

    sizes = [(math.prod(size.shape), share(field.labels for field in recording.fields.get(name, [])))
             for name, size in recording.sizes.items() if size.is_parameter]
    work = [(operation.flops, share([*operation.contracted[:1], *(field.labels for fields in operation.outputs
                                                                  for field in fields)]))
            for operation in recording.runs['eval'].operations if operation.flops]
    params, flops = (sum(amount * part for amount, part in parts) / (sum(amount for amount, _ in parts) or 1)
                     for parts in (sizes, work))
    return Reach(params, flops, float(free[roles.produces].mean()) if roles.produces.any() else 0.0)


def couplings(recording: Recording, solution: Solution, roles: Roles) -> dict[int, list[str]]:
    '''Return, for each group of the solution, the operations that couple its producers or parts of one producer.

    Producers are joined in execution order, followers between them included; an operation that joins two producers
    which were not joined before couples them.
    '''
    parent: dict[tuple[int, int], tuple[int, int]] = {}  # by group and axis

    def root(key: tuple[int, int]) -> tuple[int, int]:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    producing = set(roles.order)
    joined: set[tuple[int, int]] = set()  # roots of sets that hold a producer
    found: dict[int, list[str]] = {}
    for operation in recording.operations:
        ties = [*operation.ties, *((rows, rows[:1]) for rows in operation.balances
                                   if same(solution.component[rows[1:]], solution.component[rows[:-1]]))]
        if not ties:
            continue
        left, right = flat_pairs(ties)
        channel = solution.channel[left]
        inside = channel >= 0
        left, right, group = left[inside], right[inside], solution.group[channel[inside]]
        if not len(left):
            continue
        folded = _folded(left, right, group, roles) | _folded(right, left, group, roles)
        numbers = np.unique(np.stack([group, roles.axis[left], roles.axis[right],
                                      roles.produces[left] & roles.produces[right]]), axis=1).T.tolist()
        for number, first, second, both in numbers:
            a, b = (number, first), (number, second)
            hold = [root(key) in joined or key[1] in producing for key in (a, b)]
            couples = bool(both) if first == second else all(hold) and root(a) != root(b)
            couples |= number in folded
            if any(hold):
                joined.add(root(b))
            parent[root(a)] = root(b)
            if couples and str(operation) not in found.setdefault(number, []):
                found[number].append(str(operation))
    return found


def balances(recording: Recording, solution: Solution) -> dict[int, list[str]]:
    '''Return, for each group of the solution, the operations that keep its blocks equally large.'''
    found: dict[int, list[str]] = {}
    for operation in recording.operations:
        for labels in operation.balances:
            channel = solution.channel[labels]
            for number in np.unique(solution.group[channel[channel >= 0]]).tolist():
                if str(operation) not in found.setdefault(number, []):
                    found[number].append(str(operation))
    return found


def _folded(left: Array, right: Array, group: Array, roles: Roles) -> set[int]:
    '''Return the groups where several channels of one producer are tied to one label of another tensor.'''
    other = roles.produces[left] & (roles.axis[left] != roles.axis[right])
    pairs = np.unique(np.stack([group, right, roles.axis[left], left])[:, other], axis=1)
    same = (pairs[:3, 1:] == pairs[:3, :-1]).all(0)
    return set(pairs[0, 1:][same].tolist())


def graph_tables(groups: Iterable[ChannelGroup], locked: Mapping[str, str], solution: Solution,
                 coupled: Mapping[int, list[str]]) -> list[Table]:
    '''Make the tables that show a graph: its groups, with blocks if there are any, and its locked layers.'''
    blocks = any(group.blocks is not None for group in groups)
    rows = [(group.name, group.size, *['' if group.blocks is None else group.step] * blocks,
             some(group.layers('producer')[1:], 3), some(group.layers('consumer'), 3),
             some(coupled.get(int(solution.group[group.channels[0]]), []), 3)) for group in groups]
    return [(('group', 'channels', *['blocks'] * blocks, 'together with', 'read by', 'coupled by'), rows),
            *([(('locked', 'why'), list(locked.items()))] if locked else [])]


def unused_parts(recording: Recording, width: int) -> list[str]:
    '''Return the modules of which no operation reads any tensor, and single tensors of other modules.

    Code that did not run may slice, join or reshape what it reads, so that no size of a parameter shows that it reads
    no removed channel: all parameters but those of one number count, which fit any channels. Buffers are tables and
    statistics more often than they meet channels: those that are smaller along every dimension than what loses channels
    do not count.

    Parameters
    ----------
    recording: Recording
        The trace.
    width: int
        The smallest size of a dimension that loses channels.

    Returns
    -------
    list of str
        The names; a module or tensor within a module that is named is left out.
    '''
    unused = unused_tensors(recording)
    used = {prefix for name, fields in recording.fields.items() if fields and name not in unused
            for prefix in _prefixes(name)}
    counted = [name for name in unused if recording.sizes[name].is_parameter
               or max(recording.sizes[name].shape) >= width]
    return list(dict.fromkeys(next(prefix for prefix in _prefixes(name) if prefix not in used) for name in counted))


def _prefixes(name: str) -> list[str]:
    '''Return the names of the modules around a parameter, the outermost first, and its own name.'''
    parts = computed_name(name).split('.')
    return ['.'.join(parts[:count + 1]) for count in range(len(parts))]


def group_text(group: ChannelGroup, name: str, coupled: list[str], balanced: list[str]) -> list[str]:
    '''Write the lines that say what couples and balances the channels of a group, seen from the layer ``name``.'''
    roles = [member.role for member in group.members if member.layer == name]
    verb = 'reads' if roles and all(role == 'consumer' for role in roles) else 'holds'
    lines = [f'{name} {verb} the {group.size} channels of group {group.name!r}:',
             f'  produced by {some(group.layers("producer"))}',
             f'  read by {some(group.layers("consumer"))}']
    if group.layers('follower'):
        lines.append(f'  followed by {some(group.layers("follower"))}')
    if coupled:
        lines.append(f'  coupled by {some(coupled)}')
    if group.blocks is not None:
        lines.append(f'  in {group.step} blocks that must lose equally many, for {some(balanced)}')
    return lines


def locked_inputs(recording: Recording, solution: Solution, roles: Roles, name: str) -> list[str]:
    '''Write the lines that say why indices of a layer's other dimensions must stay, kernels left out.'''
    lines = []
    for axis in recording.axes:
        if name in (axis.parameter, layer_name(axis.parameter)):
            labels = axis.labels
            stuck = labels[solution.locked[labels] & ~roles.produces[labels]]
            found = dict.fromkeys(solution.reason(label) for label in stuck.tolist())
            reasons = [reason for reason in found if reason != NOT_READ and not reason.startswith(KERNEL)]
            if reasons:
                lines.append(f'{name}: {len(stuck)} of {axis.size} indices along dimension {axis.dim} of '
                             f'{axis.parameter} stay: {"; ".join(reasons)}')
    return lines

'''Networks of several tasks: what the example does not run is named, and ``examples=`` traces all tasks.'''
from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles.oracle import silenced
from small import apart, drawn_of, same, seeded, snapshot
from torch import nn
from torch.nn import functional as F

import zennit_prune as zp

D = torch.float64


class Tasks(nn.Module):
    '''A body of convolutions, and what several tasks read of it.'''

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.heads = nn.ModuleDict({
            'age': nn.Linear(6, 1), 'sex': nn.Linear(6, 2), 'place': nn.Linear(6 * 16, 3),
            'deep': nn.Sequential(nn.Linear(6, 10), nn.Dropout(0.5), nn.ReLU(), nn.Linear(10, 2)),
            'early': nn.Conv2d(8, 2, 1)})

    def forward(self, x: torch.Tensor, task: str = 'age') -> torch.Tensor:
        x = F.relu(self.norm(self.conv1(x)))
        if task == 'early':
            return self.heads[task](x)
        x = F.relu(self.conv2(x))
        if task == 'map':
            return x
        if task == 'numbers':
            return x.mean((2, 3)) @ torch.arange(6.0, dtype=x.dtype, device=x.device)
        if task == 'values':
            return self.heads['sex'](x.mean((2, 3))) + torch.tensor([1.0, 2.0], dtype=D)[torch.tensor([0, 1])]
        if task == 'fails':
            raise RuntimeError('no such task')
        return self.heads[task](F.adaptive_avg_pool2d(x, 4).flatten(1) if task == 'place' else x.mean((2, 3)))


def tasks() -> tuple[Tasks, torch.Tensor]:
    return seeded(Tasks().double()), torch.randn(2, 3, 8, 8, dtype=D)  # type: ignore[return-value]


def drawn(graph: zp.graph.ChannelGraph) -> zp.Plan:
    random = np.random.default_rng(0)
    return zp.Plan(graph, {group.name: drawn_of(group, random, group.size // 2) for group in graph.groups})


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter('error', zp.PruneWarning)
        yield


ALL = ('sex', 'place', 'deep', 'early')


# --- what no example runs


def test_parts_that_the_example_does_not_run_are_named() -> None:
    model, x = tasks()
    graph = zp.trace(model, x, examples=[(x, 'sex'), (x, 'deep')])
    plan = drawn(graph)
    with pytest.warns(zp.PruneWarning, match=r"'heads.place', 'heads.early'\. Whatever .* examples=") as found:
        small = plan.apply(model)
    assert found[0].filename == __file__
    assert "'heads.place', 'heads.early'" in str(plan) and 'heads.early' in plan._repr_html_()
    with pytest.raises(RuntimeError):
        small(x, 'place')
    with pytest.warns(zp.PruneWarning, match=r"'heads.place'"):
        plan.apply_(copy.deepcopy(model), verify=False)


def test_nothing_is_named_where_all_parts_run() -> None:
    model, x = tasks()
    plan = drawn(zp.trace(model, x, examples=[(x, task) for task in ALL]))
    with no_warning():
        plan.apply(model)
    assert 'no example' not in str(plan)


def test_a_plan_that_removes_nothing_leaves_nothing_behind() -> None:
    model, x = tasks()
    assert 'no example' not in str(zp.Plan(zp.trace(model, x)))


def test_parts_are_named_as_short_as_possible() -> None:
    '''A part is its outermost module, or a parameter; many are counted; tables that meet no channel are not named.'''

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
            self.token, self.scale = nn.Parameter(torch.zeros(1, 8)), nn.Parameter(torch.ones(1))
            self.register_buffer('mean', torch.zeros(1, 3, 1, 1))
            self.register_buffer('positions', torch.zeros(1, 5, 8))
            self.others = nn.Module()
            self.others.one, self.others.two = nn.Sequential(nn.Linear(8, 2), nn.BatchNorm1d(2)), nn.Conv1d(3, 3, 1)
            self.more = nn.ModuleList([nn.ModuleList([nn.Linear(8, 2)])])
            for number in range(4):
                setattr(self, f'head{number}', nn.Linear(8, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x))

    model = Net().eval()
    plan = zp.Plan(zp.trace(model, torch.randn(2, 3)), {'first': [0, 1]})
    with pytest.warns(zp.PruneWarning) as found:
        plan.apply(model)
    named = str(found[0].message).split(': ')[1].split('. ')[0]
    assert named == "'token', 'others', 'more', 'head0', 'head1' and 3 more"


# --- one example for every task


def test_every_task_computes_what_it_did_without_the_channels() -> None:
    '''Against an oracle that knows nothing of the library: zeros where removed channels are read.'''
    model, x = tasks()
    before = snapshot(model)
    graph = zp.trace(model, x, examples=[(x, 'sex'), {'x': x, 'task': 'place'}, (x, 'deep'), (x, 'early')])
    assert {group.name: group.size for group in graph.groups} == {'conv1': 8, 'conv2': 6, 'heads.deep.0': 10}
    assert graph.group('conv1').layers('consumer') == ['conv2', 'heads.early']
    assert set(graph.group('conv2').layers('consumer')) == {'heads.age', 'heads.sex', 'heads.place', 'heads.deep.0'}
    small = drawn(graph).apply(model)
    assert same(before, snapshot(model))
    silent = silenced(model, small)
    for task in ('age', *ALL):
        assert apart(silent(x, task), small(x, task)) < 1e-10
        copy.deepcopy(small).train()(x, task).sum().backward()


@pytest.mark.parametrize(('task', 'locked'), [('map', 'conv2'), ('numbers', 'conv2')])
def test_what_one_example_locks_stays(task: str, locked: str) -> None:
    '''Channels that the first example leaves free, and that another returns or counts.'''
    model, x = tasks()
    assert {group.name for group in zp.trace(model, x).groups} == {'conv1', 'conv2'}
    graph = zp.trace(model, x, examples=[(x, task)])
    assert {group.name for group in graph.groups} == {'conv1'} and locked in graph.locked
    with pytest.warns(zp.PruneWarning):
        small = drawn(graph).apply(model)
    assert small(x, task).shape == model(x, task).shape


def test_trial_removals_run_every_example() -> None:
    '''The width is written out for one task, in training only.'''

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor, wide: bool = False) -> torch.Tensor:
            x = self.first(x)
            return self.last(x.view(-1, 8) if wide and self.training else x)

    x = torch.randn(2, 3)
    assert [group.size for group in zp.trace(Net(), x).groups] == [8]
    graph = zp.trace(Net(), x, examples=[(x, True)])
    assert graph.groups == () and 'view' in graph.locked['first']
    assert set(graph._recording.runs) == {'eval', 'eval 2', 'train 2'}


def test_an_example_that_needs_values_is_traced_on_them() -> None:
    model, x = tasks()
    graph = zp.trace(model, x, examples=[(x, 'values')])
    assert [example.device for example in graph._recording.examples] == ['meta', 'real']
    assert any(note.startswith('examples[0]: the network needs values') for note in graph.notes)
    with pytest.warns(zp.PruneWarning, match='place'):
        small = drawn(graph).apply(model)
    assert apart(silenced(model, small)(x, 'values'), small(x, 'values')) < 1e-10


def test_outputs_are_compared_for_every_example() -> None:
    model, x = tasks()
    graph = zp.trace(model, x, examples=[(x, task) for task in ALL])
    plan = drawn(graph)
    small = plan.apply(model)
    assert zp.verify(model, small, plan, x) < 1e-10
    with torch.no_grad():
        small.heads['deep'][3].weight.mul_(1.1)
    with pytest.raises(zp.VerificationError, match=r"first layer that differs is 'heads.deep.3'"):
        zp.verify(model, small, plan, x)
    with pytest.raises(zp.VerificationError, match=r"first layer that differs is 'heads.deep.3'"):
        zp.verify(model, small, plan, (x, 'deep'))


def test_costs_and_scores_are_those_of_the_first_example() -> None:
    model, x = tasks()
    pruner = zp.Pruner(model, None, x, progress=False, examples=[(x, task) for task in ALL])
    alone = zp.Pruner(model, None, x, progress=False)
    shared = ('conv1', 'conv2')
    assert alone.graph.reach.flops == pruner.graph.reach.flops
    with pytest.warns(zp.PruneWarning, match=r'heads\.deep\.0 \('):  # no batch runs it
        relevance = pruner.collect((x, torch.zeros(2, dtype=torch.long)))
    assert 'heads.deep.0' not in relevance
    expected = alone.collect((x, torch.zeros(2, dtype=torch.long)))
    assert all(torch.equal(relevance[name], expected[name]) for name in shared)
    plan = pruner.plan(relevance, zp.Budget(channels=0.6))
    assert set(plan.removed) <= set(shared)
    small = plan.apply(model)
    for task in ('age', *ALL):
        small(x, task)


def test_examples_are_carried_on(tmp_path: Path) -> None:
    '''By ``on`` and in loops, and plans are read for graphs that were traced alike.'''
    model, x = tasks()
    pruner = zp.Pruner(model, None, x, progress=False, examples=[(x, task) for task in ALL])
    plan = drawn(pruner.graph)
    plan.save(tmp_path / 'plan.json')
    again = zp.trace(model, x, examples=[(x, task) for task in ALL])
    assert zp.Plan.load(tmp_path / 'plan.json', again).removed == plan.removed
    with pytest.raises(zp.PruneError, match='another network'):
        zp.Plan.load(tmp_path / 'plan.json', zp.trace(model, x))
    small = plan.apply(model)
    later = pruner.on(small)
    assert len(later.graph._recording.examples) == 5 and later.graph.group('heads.deep.0').size == 5
    both = plan.compose(zp.Plan(later.graph, {'heads.deep.0': [0]}))
    assert both.apply(model)(x, 'deep').shape == (2, 2)
    with no_warning():
        result = pruner.iterate((), zp.Budget(params=0.6), step=0.2, criterion='l1', repair='none')
        small = zp.prune(model, None, [(x, torch.zeros(2, dtype=torch.long))], zp.Budget(params=0.8), progress=False,
                         examples=[(x, task) for task in ALL], criterion='l1', repair='none')
    for task in ('age', *ALL):
        assert result.model(x, task).shape == small(x, task).shape == model(x, task).shape


@pytest.mark.parametrize(('examples', 'message'), [
    (torch.zeros(2, 3, 8, 8, dtype=D), r'examples=a Tensor is no sequence'),
    ({'x': torch.zeros(2, 3, 8, 8, dtype=D)}, r'examples=a dict is no sequence'),
    ((torch.zeros(2, 3, 8, 8, dtype=D), 'sex'), r"examples\[1\]='sex' holds no tensor.*examples=\[\(x, \.\.\.\)\]"),
    ([(torch.zeros(2, 3, 8, 8, dtype=D), 'fails')], r'examples\[0\]: the network does not run .*no such task'),
    ([torch.zeros(0, 3, 8, 8, dtype=D)], r'examples\[0\]: the example holds no sample'),
])
def test_examples_that_are_none(examples: Any, message: str) -> None:
    model, x = tasks()
    with pytest.raises(zp.PruneError, match=message):
        zp.trace(model, x, examples=examples)


def test_equal_examples_change_nothing() -> None:
    model, x = tasks()
    graph, again = zp.trace(model, x), zp.trace(model, x, examples=[x, x[:1]])
    assert [(group.name, group.channels.tolist()) for group in graph.groups] == [
        (group.name, group.channels.tolist()) for group in again.groups]
    assert graph.locked == again.locked and graph.notes == again.notes
    assert len(again._recording.operations) == len(graph._recording.operations)


def test_norms_over_other_channels_for_each_task_are_not_masked() -> None:
    '''One call of a function, which has no name but its place, runs over the channels of one layer or of another.'''

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other, self.last = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 2)
            self.second = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor, other: bool = False) -> torch.Tensor:
            x = self.other(x) if other else self.first(x)
            return (self.second if other else self.last)(F.layer_norm(x, (x.shape[-1],)))

    x, model = torch.randn(2, 3), Net().eval()
    plan = zp.Plan(zp.trace(model, x, layernorm='surviving', examples=[(x, True)]), {'first': [0], 'other': [1]})
    with pytest.raises(zp.PruneError, match='LayerNorm in the network itself runs over other channels'):
        plan.masked(model)


def test_a_repair_fits_the_first_task_and_says_so() -> None:
    model, _ = tasks()
    x, other = torch.randn(40, 3, 8, 8, dtype=D), torch.randn(24, 3, 8, 8, dtype=D)
    pruner = zp.Pruner(model, None, (x[:2], 'age'), examples=[(x[:2], 'sex'), (x[:2], 'deep')], progress=False)
    plan = zp.Plan(pruner.graph, {'conv1': [0, 3], 'conv2': [1]})
    small = plan.apply(model)
    with pytest.warns(zp.PruneWarning, match=r"first example.*; 24 inputs .* left out.*'heads.sex', 'heads.deep'"):
        both = zp.repair(model, small, plan, [((x, 'age'), None), ((other, 'sex'), None)], progress=False)
    with pytest.warns(zp.PruneWarning, match=r"first example of the trace runs\. What only .*'heads.sex'"):
        alone = zp.repair(model, small, plan, [((x, 'age'), None)], progress=False)
    assert all(map(torch.equal, both.parameters(), alone.parameters()))
    assert torch.equal(both.heads['sex'].weight, small.heads['sex'].weight)
    with pytest.raises(zp.PruneError, match='the data are empty, but for those of other examples'):
        zp.repair(model, small, plan, [((other, 'sex'), None)], progress=False)


def test_groups_of_other_tasks_are_kept_and_the_reason_is_true() -> None:
    model, x = tasks()
    pruner = zp.Pruner(model, None, (x, 'age'), examples=[(x, 'deep')], progress=False)
    with pytest.warns(zp.PruneWarning, match=r'heads.deep.0 \(only a further example of the trace runs it\)'):
        relevance = pruner.collect([((x, 'age'), None), ((x, 'deep'), None)], initial='value')
    alone = zp.Pruner(model, None, (x, 'age'), progress=False).collect([((x, 'age'), None)], initial='value')
    assert not torch.equal(relevance['conv1'], alone['conv1'])  # both tasks count
    assert 'heads.deep.0' not in pruner.plan(relevance, zp.Budget(channels=0.6)).removed

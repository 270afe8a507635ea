'''Pruning at once is straight: no copies, cost models or checkpoint form that nobody asked for.'''
from __future__ import annotations

import copy
import traceback
from typing import Any

import pytest
from small import Residual, images, labels, same, seeded, snapshot
from torch import nn

import zennit_prune as zp
from zennit_prune.pipeline import _checkpoint as checkpoint
from zennit_prune.pipeline import _iterate as iterate
from zennit_prune.pipeline import _step as steps
from zennit_prune.planning import _cost as costs
from zennit_prune.util import _networks as networks

LOADER = (images(16), labels(16))
HALF = zp.Budget(flops=0.5)
QUIET: Any = {'progress': False}


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    '''The file behind every deep copy of a network.'''
    found: list[str] = []
    copier, deepcopy = networks._Copier.__init__, copy.deepcopy

    def note() -> None:
        files = [frame.filename.rpartition('/')[2] for frame in traceback.extract_stack()]
        found.append(next(name for name in reversed(files) if name not in (
            'test_step.py', '_networks.py', '_surgery.py', '_graph.py')))

    def counted(self: Any, *args: Any) -> None:
        note()
        copier(self, *args)

    def copied(value: Any, memo: Any = None, *rest: Any) -> Any:
        if memo is None and isinstance(value, nn.Module):
            note()
        return deepcopy(value, memo, *rest)

    monkeypatch.setattr(networks._Copier, '__init__', counted)
    monkeypatch.setattr(copy, 'deepcopy', copied)
    return found


@pytest.mark.parametrize('repair', ['none', 'refit'])
def test_the_pipeline_itself_copies_no_network(repair: str, copies: list[str]) -> None:
    zp.prune(seeded(Residual()), None, LOADER, HALF, repair=repair, **QUIET)
    assert not {'_step.py', '_pruner.py', '_iterate.py', '_checkpoint.py', '_carry.py'} & {*copies}
    assert repair == 'refit' or len(copies) <= 8


def test_one_cost_model_serves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    made, model = [], costs.CostModel.__init__

    def counted(self: Any, graph: Any) -> None:
        made.append(graph)
        model(self, graph)

    monkeypatch.setattr(costs.CostModel, '__init__', counted)
    zp.prune(seeded(Residual()), None, LOADER, HALF, **QUIET)
    assert len(made) == 1


def test_nothing_is_put_into_the_form_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError('the form of a checkpoint')

    for module, name in ((iterate, 'fingerprint'), (iterate, 'described'), (iterate, 'filled'), (steps, 'filled'),
                         (steps, 'values_for_plan'), (steps, 'scores_for_original'), (checkpoint, 'write_tensors')):
        monkeypatch.setattr(module, name, never)
    result = zp.Pruner(seeded(Residual()), None, images(1), **QUIET).prune(LOADER, HALF)
    assert [step.number for step in result.history] == [0, 1]


def told(network: nn.Module) -> list[Any]:
    '''Values and flags.'''
    return [[(name, tensor.tolist()) for name, tensor in network.state_dict().items()],
            [module.training for module in network.modules()],
            [parameter.requires_grad for parameter in network.parameters()]]


def test_at_once_and_one_step_of_many_are_the_same_step() -> None:
    one = zp.Pruner(seeded(Residual()), None, images(1), **QUIET)
    before = snapshot(one.model)
    at_once, looped = one.prune(LOADER, HALF, seed=3), one.iterate(LOADER, HALF, 1.0, seed=3)
    assert at_once.plan == looped.plan and told(at_once.model) == told(looped.model)
    assert [(step.number, step.left, step.reliability) for step in at_once.history] == [
        (step.number, step.left, step.reliability) for step in looped.history]
    assert at_once.stopped == looped.stopped and same(before, snapshot(one.model))


def test_the_result_is_no_part_of_the_users_network() -> None:
    one = zp.Pruner(seeded(Residual()), None, images(1), **QUIET)
    own = {id(tensor) for tensor in (*one.model.parameters(), *one.model.buffers())}
    stopped = pytest.warns(zp.PruneWarning, match='not reached')
    values = iter([1.0, 0.0])
    with stopped:
        nothing = one.iterate(LOADER, HALF, 0.2, repair='none', evaluate=lambda network: next(values), min_score=0.5)
    for result in (one.prune(LOADER, HALF, repair='none'), one.prune(LOADER, HALF), nothing):
        assert not own & {id(tensor) for tensor in (*result.model.parameters(), *result.model.buffers())}

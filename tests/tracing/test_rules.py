'''Operators of users: locked until they have a rule, exact with it, guarded by the replay.'''

# no postponed annotations: torch 2.4 reads them to find the signature of an operator

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import zennit_prune as zp
from zennit_prune.tracing import _rules as rules


@torch.library.custom_op('zennit_prune_tests::swap_halves', mutates_args=())
def swap_halves(x: torch.Tensor) -> torch.Tensor:
    return x.roll(x.shape[1] // 2, 1)


@torch.library.custom_op('zennit_prune_tests::view', mutates_args=())  # a namespace of its own: no ATen view
def bent(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, 0.3 * x)


for operator in (swap_halves, bent):
    operator.register_fake(torch.empty_like)


class Net(nn.Module):
    def __init__(self, operator: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.operator = lambda x: operator(x)  # operators cannot be copied, functions can
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.operator(self.first(x))).mean((2, 3)))


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    before, of_users = dict(rules.OPERATIONS), set(rules.OF_USERS)
    yield
    rules.OPERATIONS.clear()
    rules.OPERATIONS.update(before)
    rules.OF_USERS.clear()
    rules.OF_USERS.update(of_users)


def traced(operator: Callable[[torch.Tensor], torch.Tensor]) -> tuple[nn.Module, torch.Tensor, zp.graph.ChannelGraph]:
    torch.manual_seed(0)
    model, x = Net(operator).double().eval(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    return model, x, zp.trace(model, x)


def halves(call: Any) -> Any:
    result = []
    for field in call.fields(call.args[0]):
        left, right = np.split(field.labels, 2, 1)
        call.tie(left, right)
        result.append(np.concatenate([right, left], 1))
    return [result]


@pytest.mark.parametrize(('operator', 'name'), [(swap_halves, 'swap_halves'), (bent, 'view')])
def test_without_a_rule_it_is_locked_by_name(operator: Any, name: str) -> None:
    _, _, graph = traced(operator)
    assert f'no rule covers the operation zennit_prune_tests.{name}' in graph.locked['first']
    assert {group.name for group in graph.groups} == {'second'}


def test_with_a_rule_it_is_exact() -> None:
    zp.register_operation('zennit_prune_tests::swap_halves')(halves)
    model, x, graph = traced(swap_halves)
    assert {group.name: group.size for group in graph.groups} == {'first': 4, 'second': 6}
    plan = zp.Plan(graph, {'first': [1, 2], 'second': [0]})
    small = plan.apply(model, verify=False)
    silent = Net(swap_halves).double().eval()  # an oracle that knows nothing of the graph
    silent.load_state_dict(model.state_dict())
    with torch.no_grad():
        silent.second.weight[:, [1, 2, 5, 6]] = 0
        silent.head.weight[:, 0] = 0
        torch.testing.assert_close(small(x), silent(x), rtol=0, atol=1e-12)
    assert small.first.out_channels == 4


def test_pointwise_needs_no_rule() -> None:
    zp.register_operation('zennit_prune_tests::view', pointwise=True, zero='all')
    model, x, graph = traced(bent)
    plan = zp.Plan(graph, {'first': [1, 2, 7]})
    assert zp.verify(model, plan.apply(model), plan, x) < 1e-12


def test_wrong_rule_is_caught_by_the_replay() -> None:
    @zp.register_operation('zennit_prune_tests::swap_halves')
    def wrong(call: Any) -> Any:
        return [call.fields(call.args[0])]  # says that nothing moves

    model, _, graph = traced(swap_halves)
    with pytest.raises(zp.VerificationError, match='second'):
        zp.Plan(graph, {'first': [1]}).apply(model)


@pytest.mark.parametrize('answer', [
    lambda call: [], lambda call: [[np.zeros((1, 3, 1, 1), np.int64)]], lambda call: [[np.zeros(8, np.int64)]]])
def test_rule_that_does_not_fit_is_named(answer: Callable[[Any], Any]) -> None:
    zp.register_operation('zennit_prune_tests::swap_halves')(answer)
    with pytest.raises(zp.PruneError, match=r'the rule of zennit_prune_tests\.swap_halves'):
        traced(swap_halves)


def test_an_aten_operation_without_a_rule_can_be_taught() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.cummax(2)[0]

    _, _, graph = traced(forward)
    assert 'cummax' in graph.locked['first']
    zp.register_operation('aten::cummax')(lambda call: [list(call.fields(call.args[0]))] * 2)
    model, x, graph = traced(forward)
    plan = zp.Plan(graph, {'first': [1, 2, 7]})
    assert zp.verify(model, plan.apply(model), plan, x) < 1e-12


@pytest.mark.parametrize('name', ['scale', 'aten::add.Tensor', 3])
def test_names_have_a_namespace_and_no_overload(name: Any) -> None:
    with pytest.raises(zp.PruneError, match='is no operation'):
        zp.register_operation(name)


def test_rules_of_the_library_stay() -> None:
    with pytest.raises(zp.PruneError, match="'aten::add' has a rule already"):
        zp.register_operation('aten::add')
    with pytest.raises(zp.PruneError, match='zero='):
        zp.register_operation('zennit_prune_tests::view', zero='perhaps')
    with pytest.raises(zp.PruneError, match='no operation is named'):
        zp.register_operation()


def test_registering_again_replaces_the_own_rule() -> None:
    zp.register_operation('zennit_prune_tests::swap_halves')(lambda call: [[]])
    zp.register_operation('zennit_prune_tests::swap_halves')(halves)
    assert {group.name: group.size for group in traced(swap_halves)[2].groups} == {'first': 4, 'second': 6}

'''Applying plans in place: whoever holds a narrowed parameter holds its successor then.'''

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import chain, images, same, seeded, snapshot
from torch import nn
from torch.nn import functional as F

import zennit_prune as zp


@pytest.mark.parametrize('register', ['register_hook', 'register_post_accumulate_grad_hook'])
def test_parameters_with_hooks_are_refused(device: torch.device, register: str) -> None:
    model, x = chain().to(device), images().to(device)
    plan = zp.Plan(zp.trace(model, x), {'0': [1]})
    getattr(model[5].weight, register)(lambda *_: None)
    plan.apply_(model)  # whatever is not narrowed keeps its hooks
    plan = zp.Plan(zp.trace(model, x), {'2': [1]})
    before = snapshot(model)
    with pytest.raises(zp.PruneError, match=r"'5.weight' has hooks"):
        plan.apply_(model)
    assert same(before, snapshot(model))


Pair = collections.namedtuple('Pair', 'weight bias')


class Slotted:
    __slots__ = ('weight',)

    def __init__(self, weight: torch.Tensor):
        self.weight = weight


class Keeper:
    def __init__(self, weight: torch.Tensor):
        self.weight = weight

    def read(self) -> torch.Tensor:
        return self.weight


HOLDERS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]] = {
    'namespace': (lambda w: types.SimpleNamespace(w=w), lambda held: held.w),
    'deque': (lambda w: collections.deque([None, w]), lambda held: held[1]),
    'set': (lambda w: {w}, lambda held: next(iter(held))),
    'frozen set': (lambda w: frozenset([w]), lambda held: next(iter(held))),
    'named tuple': (lambda w: Pair(w, None), lambda held: held.weight),
    'tuple in a list': (lambda w: [(1, (w,))], lambda held: held[0][1][0]),
    'key': (lambda w: {w: 1, 'b': 2}, lambda held: next(iter(held))),
    'slots': (Slotted, lambda held: held.weight),
    'partial': (lambda w: functools.partial(lambda weight: weight, weight=w), lambda held: held()),
    'method': (lambda w: Keeper(w).read, lambda held: held()),
    'itself': (lambda w: [value := [w], value.append(value)][0], lambda held: held[0]),
}


class Held(nn.Module):
    '''Takes the weight of its convolution from somewhere else.'''

    def __init__(self, name: str) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        hold, self.read = HOLDERS[name]
        self.held = hold(self.conv.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.conv2d(x, self.read(self.held), self.conv.bias).mean((2, 3)))


@pytest.mark.parametrize('name', HOLDERS)
def test_holders_are_given_the_successors(name: str) -> None:
    model = seeded(Held(name))
    plan = zp.Plan(zp.trace(model, images()), {'conv': [0, 5]})
    small, held = plan.apply(model), model.held
    plan.apply_(model)
    assert model.read(model.held) is model.conv.weight and torch.equal(model(images()), small(images()))
    assert model.held is held or name in ('frozen set', 'named tuple')


def test_an_optimizer_that_the_network_keeps_is_not_left_behind() -> None:
    model = chain()
    plan = zp.Plan(zp.trace(model, images()), {'0': [1]})
    model.trainer = types.SimpleNamespace(optimizer=torch.optim.Adam(model.parameters()))
    before = snapshot(model)
    with pytest.raises(zp.PruneError, match=r'the network keeps an optimizer \(Adam\)'):
        plan.apply_(model, torch.optim.SGD(model.parameters()))
    assert same(before, snapshot(model))
    model(images()).sum().backward()
    model.trainer.optimizer.step()
    plan.apply_(model, model.trainer.optimizer)
    model(images()).sum().backward()
    model.trainer.optimizer.step()
    assert model.trainer.optimizer.state[model[0].weight]['exp_avg'].shape == model[0].weight.shape

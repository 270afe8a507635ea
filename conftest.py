'''Fixtures of all tests, and the names that examples in docstrings may use without making them.'''
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from zennit.composites import EpsilonPlus

import zennit_prune as zp

# the networks are tiny: threads cost more than they give
torch.set_num_threads(1)

DEVICES = ('cpu', *['cuda'] * torch.cuda.is_available())


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    '''Every device there is; a test that asks for it is marked ``device``.'''
    return torch.device(request.param)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    '''Mark the tests that run on every device.'''
    for item in items:
        if 'device' in getattr(item, 'fixturenames', ()):
            item.add_marker('device')


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    '''What a test draws does not depend on those that ran before it.'''
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def names_of_examples(request: pytest.FixtureRequest, seed: None) -> None:
    '''Give every example in a docstring a fresh network, reference images, and the usual imports.'''
    if not isinstance(request.node, pytest.DoctestItem):
        return
    model = nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(3, 8, 3, padding=1), relu1=nn.ReLU(), conv2=nn.Conv2d(8, 6, 3, padding=1), relu2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(6, 4))).eval()
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    graph = zp.trace(model, images[:1], progress=False)
    names: dict[str, Any] = request.getfixturevalue('doctest_namespace')
    names.update(np=np, torch=torch, nn=nn, zp=zp, EpsilonPlus=EpsilonPlus, model=model, example=images[:1],
                 images=images, labels=labels, loader=[(images, labels)], graph=graph)

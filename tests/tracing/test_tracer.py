'''What cannot be traced, planned or compared is refused with what to do.'''

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from small import chain, images
from torch import nn

import zennit_prune as zp


@dataclass
class Holder:
    x: torch.Tensor


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = chain()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def halved(x: torch.Tensor) -> torch.Tensor:
    width = x.shape[1] // 2
    return x[:, :width] * torch.sigmoid(x[:, width:])


PACKED = nn.utils.rnn.pack_sequence([torch.zeros(2, 3)])


@pytest.mark.parametrize(
    ('example', 'reason'),
    [
        (PACKED, 'PackedSequence.*padded'),
        (({'x': [PACKED]},), 'PackedSequence.*padded'),
        (Holder(images()), 'no tensor that was found, only Holder: .*wrap it in a module'),
        ((), 'only nothing'),
        ({'x': 3}, 'only int'),
    ],
)
def test_examples_that_cannot_be_used_are_refused_with_advice(example: Any, reason: str) -> None:
    with pytest.raises(zp.PruneError, match=reason):
        zp.trace(ByKeyword(), example)


def test_any_mapping_holds_keyword_arguments() -> None:
    assert zp.trace(ByKeyword(), UserDict(x=images())).group('inner.0').size == 6


@pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning', 'ignore:.*torch.jit:DeprecationWarning')
def test_compiled_functions_are_refused_with_where_they_failed() -> None:
    gate = torch.jit.script(halved)

    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(gate(self.conv(x)).mean((2, 3)))

    with pytest.raises(zp.PruneError, match=r'line \d+, in halved: .*PYTORCH_JIT=0'):
        zp.trace(Compiled(), images())


def test_lazy_layers_are_refused_until_they_have_run() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    with pytest.raises(zp.PruneError, match=r"'0' has no sizes yet .*LazyConv2d.*run the network once"):
        zp.trace(model, images())
    model(images())
    assert zp.trace(model, images()).group('0').size == 8


def test_networks_without_numbers_are_proven_but_not_compared() -> None:
    model = chain().to('meta')
    plan = zp.Plan(zp.trace(model, images().to('meta')), {'0': [1]})
    with pytest.raises(zp.PruneError, match=r"on 'meta'.*verify=False"):
        plan.apply(model)
    assert plan.apply(model, verify=False)[0].out_channels == 5


def test_plans_of_nothing_are_refused() -> None:
    graph = zp.trace(chain(), images())
    for positions in (torch.tensor(1), np.array(1), 1):
        with pytest.raises(zp.PruneError, match="positions of group '0' are a list"):
            zp.Plan(graph, {'0': positions})
    with pytest.raises(zp.PruneError, match=r'made for a ChannelGraph, which zp\.trace returns, not for None'):
        zp.Plan(None, {'0': [1]})

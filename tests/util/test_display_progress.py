'''Bars that are shown only where something takes long.'''
from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from small import Residual, images, seeded
from torch import nn

import zennit_prune as zp
from zennit_prune.util import _display as progress


class Slow(Residual):
    '''As on a network of many modules.'''

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.15)
        return super().forward(x)


@pytest.mark.parametrize('kind,shown', [(Slow, True), (Slow, False), (Residual, True)])
def test_what_takes_long_shows_that_it_goes_on(kind: Any, shown: bool, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, 'PATIENCE', 0.1 if kind is Slow else 60.0)
    model: nn.Module = seeded(kind())
    graph = zp.trace(model, images(), progress=shown)
    said = capsys.readouterr().err
    assert ('trace' in said and 'modules' in said) == (kind is Slow and shown)
    plan = zp.Plan(graph, {graph.groups[0].name: [0]})
    plan.apply(model, progress=shown)
    assert ('apply' in capsys.readouterr().err) == (kind is Slow and shown)
    pruner = zp.Pruner(model, None, images(), progress=shown)
    assert pruner.on(model).progress == shown
    assert (capsys.readouterr().err != '') == (kind is Slow and shown)


def test_nothing_waits_after_an_error() -> None:
    with pytest.raises(zp.PruneError):
        zp.trace(seeded(Residual()), torch.zeros(1, 2, 8, 8))
    assert progress._bar.get() is None

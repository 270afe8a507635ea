'''Files that were written before the package had rooms are read, and mean what they meant.'''
from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Residual, images, labels, seeded
from torch import nn
from zennit.composites import EpsilonPlus

import zennit_prune as zp
from zennit_prune.pipeline import Sweep
from zennit_prune.planning import LatencyTable

GOLDEN = Path(__file__).parents[1] / 'golden'
EXPECTED = json.loads((GOLDEN / 'expected.json').read_text())
BATCHES = [(images(12)[start:start + 4], labels(12)[start:start + 4]) for start in (0, 4, 8)]
HALVES = [(images(12)[start:start + 6], labels(12)[start:start + 6]) for start in (0, 6)]


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, list[float]]) -> bool:
    '''Whether scores by group are equal but for rounding.'''
    return found.keys() == expected.keys() and all(
        torch.allclose(values.double(), torch.tensor(expected[name], dtype=torch.float64), rtol=1e-5)
        for name, values in found.items())


def close(output: torch.Tensor, expected: Any) -> bool:
    '''Whether outputs are equal but for rounding.'''
    return torch.allclose(output, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.fixture
def model() -> nn.Module:
    return seeded(Residual())


@pytest.fixture
def pruner(model: nn.Module) -> zp.Pruner:
    return zp.Pruner(model, EpsilonPlus(), images(1), progress=False)


def removed(plan: zp.Plan) -> dict[str, list[int]]:
    return {name: list(positions) for name, positions in plan.removed.items()}


def test_plan(pruner: zp.Pruner) -> None:
    assert removed(zp.Plan.load(GOLDEN / 'plan.json', pruner.graph)) == EXPECTED['removed']


def test_network(model: nn.Module) -> None:
    small = zp.load(model, GOLDEN / 'network.safetensors').eval()
    with torch.no_grad():
        assert close(small(images(12)), EXPECTED['outputs'])


def test_relevance(pruner: zp.Pruner) -> None:
    relevance = zp.Relevance.load(GOLDEN / 'relevance.safetensors')
    assert same(dict(relevance.items()), EXPECTED['relevance'])
    assert relevance.exemplars is not None and relevance.reliability().samples == 12
    assert removed(pruner.plan(relevance, zp.Budget(flops=0.6))) == EXPECTED['removed']


def test_collector(pruner: zp.Pruner) -> None:
    assert same(dict(pruner.collector().load(GOLDEN / 'collector.safetensors').compute().items()),
                EXPECTED['collector'])


def test_interrupted_collection(pruner: zp.Pruner, tmp_path: Path) -> None:
    path = shutil.copy(GOLDEN / 'collect.safetensors', tmp_path)
    assert same(dict(pruner.collect(BATCHES, checkpoint=path, progress=False).items()), EXPECTED['collect'])
    assert not Path(path).exists()


def test_interrupted_run(pruner: zp.Pruner, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / 'run', tmp_path / 'run')
    seen: list[int] = []
    result = pruner.iterate(HALVES, zp.Budget(flops=0.5), step=0.15, checkpoint=tmp_path / 'run', progress=False,
                            callback=lambda step: seen.append(step.number))
    assert removed(result.plan) == EXPECTED['iterate']['removed'] and seen and min(seen) > 2
    with torch.no_grad():
        assert close(result.model(images(12)), EXPECTED['iterate']['outputs'])
    assert not (tmp_path / 'run').exists()


def test_latency_table(pruner: zp.Pruner) -> None:
    latencies = LatencyTable.load(GOLDEN / 'latencies.json')
    plan = pruner.plan(zp.Relevance.load(GOLDEN / 'relevance.safetensors'), zp.Budget(latency_fraction=0.95),
                       latencies=latencies)
    assert latencies.original > 0 and plan.removed


def test_sweep() -> None:
    sweep = Sweep.load(GOLDEN / 'sweep.json')
    assert len(sweep.rows) == 8 and 'relevance' in str(sweep)

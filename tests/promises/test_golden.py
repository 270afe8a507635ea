'''Files and plans of former versions: what was written is read and means what it meant, plans come out the same.'''
from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
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


PLANS = json.loads((GOLDEN / 'plans.json').read_text())
ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get('ZENNIT_PRUNE_DATA', ROOT.parent / 'shared' / 'data'))


def digest(plan: zp.Plan) -> str:
    data = plan.to_dict()
    return hashlib.sha256(json.dumps({key: data[key] for key in ('groups', 'removed')}, sort_keys=True).encode()
                          ).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize('name', PLANS['untrained'])
def test_plans_of_untrained_networks(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    pruner = zp.Pruner(model, None, torch.zeros(1, 3, 224, 224), progress=False)
    share = 0.8 if name in ('vit_b_16', 'swin_t') else 0.5
    plan = pruner.plan(pruner.collect((), 'random'), zp.Budget(flops=share))
    small = plan.apply(model, verify=False)
    assert digest(plan) == PLANS['untrained'][name]['random']
    assert digest(pruner.plan(pruner.collect((), 'l1'), zp.Budget(params=0.8))) == PLANS['untrained'][name]['l1']
    assert sum(parameter.numel() for parameter in small.parameters()) == PLANS['untrained'][name]['parameters']


def few_shot() -> ModuleType:
    spec = importlib.util.spec_from_file_location('few_shot', ROOT / 'benchmarks' / 'few_shot.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / 'loaders.py').exists(), reason='the pretrained networks are not at hand')
@pytest.mark.parametrize('case', PLANS['pretrained'])
def test_plans_and_accuracies_of_pretrained_networks(case: str) -> None:
    name, per_class, left = case.split()
    network, references, truth, accuracy = few_shot().setting(name, int(per_class), 0)
    pruner = zp.Pruner(network, None, references[:1], progress=False)
    plan = pruner.plan(pruner.collect((references, truth)), zp.Budget(flops=float(left)))
    assert digest(plan) == PLANS['pretrained'][case]['plan']
    repaired = zp.repair(network, plan.apply(network), plan, references, progress=False)
    assert round(accuracy(repaired), 2) == PLANS['pretrained'][case]['accuracy']

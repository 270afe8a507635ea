'''The table of docs/coverage.md holds: no network is less exact, or less within reach, than it says.'''
from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SAMPLE = ('swin_v2_t', 'regnet_x_400mf', 'lraspp_mobilenet_v3_large', 'r3d_18', 's3d',
          'retinanet_resnet50_fpn (backbone and heads)', 'fcos_resnet50_fpn', 'timm skresnet18', 'timm resnest14d',
          'timm levit_128s', 'timm edgenext_xx_small', 'timm hrnet_w18_small', 'timm convnextv2_atto')


def _benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location('coverage_benchmark', ROOT / 'benchmarks' / 'coverage.py')
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _table() -> dict[str, list[str]]:
    lines = (ROOT / 'docs' / 'coverage.md').read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if line.startswith('| ')]
    return {row[0]: row[1:] for row in cells if row[0] not in ('network', '---')}


TABLE = _table()
BENCHMARK = _benchmark()


def _holds(name: str) -> None:
    groups, parameters, _, verdict, _ = TABLE[name]
    case = next(case for kind in ('torchvision', 'segmentation', 'detection', 'video', 'timm')
                for case in BENCHMARK.cases(kind) if case.name == name)
    row, = BENCHMARK.measured([case])
    assert 'failure' not in row, row
    if groups and int(groups):
        assert 'refusal' not in row, row
        assert row['error'] <= 1e-10
        assert row['parameters'] >= float(parameters.rstrip('%')) / 100 - 0.01
    else:
        assert 'refusal' in row and verdict


def test_the_table_is_complete() -> None:
    names = {case.name for kind in ('torchvision', 'segmentation', 'detection', 'video', 'timm')
             for case in BENCHMARK.cases(kind)}
    assert names == set(TABLE)


@pytest.mark.parametrize('name', SAMPLE)
def test_sample(name: str) -> None:
    if name.startswith('timm'):
        pytest.importorskip('timm')
    _holds(name)


@pytest.mark.slow
@pytest.mark.parametrize('name', TABLE)
def test_sweep(name: str) -> None:
    if name.startswith('timm'):
        pytest.importorskip('timm')
    _holds(name)

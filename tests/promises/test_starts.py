'''Scores follow the true effect of removing channels, whatever kind of output relevance starts from.'''
from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _benchmark() -> Any:
    spec = importlib.util.spec_from_file_location('starts_benchmark', ROOT / 'benchmarks' / 'starts.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


starts = _benchmark()


@pytest.mark.parametrize('kind', starts.KINDS_OF_NETWORKS)
def test_scores_rank_channels_as_their_removal_does(kind: str) -> None:
    found = starts.correlations(starts.KINDS_OF_NETWORKS[kind], 0)
    assert found['right'] > 0.6
    for other in ('the other output', 'all numbers of a box'):
        assert found['right'] > found.get(other, 0)

'''How results look in notebooks and as pictures.'''
from __future__ import annotations

import re
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small import Residual, images, labels
from torch import nn

import zennit_prune as zp
from zennit_prune.util._display import Share, panel, table


@pytest.fixture(scope='module')
def results() -> dict[str, Any]:
    pruner = zp.Pruner(Residual(), None, images(1))
    relevance = pruner.collect((images(8), labels(8)), progress=False)
    return {'graph': pruner.graph, 'relevance': relevance, 'plan': pruner.plan(relevance, zp.Budget(flops=0.6)),
            'cost': zp.cost(pruner.model, images(1))}


def words(text: str) -> list[str]:
    return [word.strip(',.') for word in re.findall(r'[\w.,%<>#]+', text)]


@pytest.mark.parametrize('name', ['graph', 'relevance', 'plan', 'cost'])
def test_all_that_is_printed_is_there(results: dict[str, Any], name: str) -> None:
    drawn = results[name]._repr_html_()
    assert drawn.startswith('<style>') and 'http' not in drawn
    shown = unescape(re.sub(r'<style>.*?</style>|<[^>]*>', ' ', drawn, flags=re.DOTALL))
    printed = [word for word in words(str(results[name])) if not set(word) <= set('-.')]
    assert set(printed) <= set(words(shown))


def test_names_are_escaped() -> None:
    network = nn.Sequential()
    network.add_module('<b>&"', nn.Conv2d(3, 6, 3))
    network.add_module('pool', nn.AdaptiveAvgPool2d(1))
    network.add_module('flat', nn.Flatten())
    network.add_module('<i>', nn.Linear(6, 4))
    graph = zp.trace(network, images(1))
    plan = zp.Plan(graph).remove('<b>&"', [0])
    for result in (graph, plan, zp.Relevance({'<b>&"': torch.ones(6)}, info={'<i>': '<u>'})):
        drawn = result._repr_html_()
        assert '<b>&"' not in drawn and '<u>' not in drawn and '&lt;b&gt;&amp;&quot;' in drawn


def test_shares_are_bars() -> None:
    assert table(('share',), [(Share(0.256),)]).endswith('26%')
    assert '<i><span style="width:25.6%"></span></i>26%' in panel('', [(('share',), [(Share(0.256),)])])


@pytest.mark.parametrize('name', ['plan', 'relevance'])
def test_plots(results: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('matplotlib')
    figure = results[name].plot(tmp_path / 'plot.png')
    Image.open(tmp_path / 'plot.png').verify()
    groups = results['graph'].groups
    if name == 'plan':
        bars = [bar.get_height() for bar in figure.axes[0].patches]
        gone = results['plan'].removed
        assert bars == [group.size for group in groups] + [group.size - len(gone.get(group.name, ()))
                                                           for group in groups]
    else:
        assert [axes.get_title() for axes in figure.axes if axes.axison] == [group.name for group in groups]
    assert results[name].plot() is not None
    with pytest.raises(zp.PruneError, match='no folder for'):
        results[name].plot(tmp_path / 'nowhere' / 'plot.png')
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(zp.PruneError, match=r"plot\(\) needs matplotlib: pip install 'zennit-prune\[plot\]'"):
        results[name].plot()

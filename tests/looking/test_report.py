'''The report: complete, escaped, true to the plan, and written whole or not at all.'''
from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Residual, images, labels, lived_in, same, seeded, snapshot
from torch import nn

import zennit_prune as zp
from zennit_prune.looking import _sections
from zennit_prune.looking._findings import layer_costs
from zennit_prune.looking._sections import _box
from zennit_prune.pipeline._sweep import Row

pytest.importorskip('jinja2')

HOSTILE = '<img src=x onerror=alert(1)>'
CLOSING = '</script><script>alert(2)</script>'
VOID = {'meta', 'img', 'br', 'path', 'link', 'input', 'hr', 'base'}


class Page(HTMLParser):
    '''Tags with their attributes, and the texts, of a page.'''

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(path.read_text(encoding='utf-8'))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == 'script':
            self.scripts.append(data)
        elif self.open and self.open[-1] != 'style':
            self.texts.append(data)

    @property
    def text(self) -> str:
        '''All texts, in one.'''
        return re.sub(r'\s+', ' ', ' '.join(self.texts))

    def attributes(self, name: str) -> list[str]:
        '''The values of an attribute, wherever it is.'''
        return [found[name] or '' for _, found in self.tags if name in found]


def made_up_sweep(criterion: str = 'relevance') -> zp.pipeline.Sweep:
    rows = [Row(name, 'none', seed, budget, budget, value + 0.01 * seed, 1.0)
            for name, values in ((criterion, (0.9, 0.8)), ('random', (0.7, 0.3)))
            for seed in (0, 1) for budget, value in zip((0.8, 0.5), values)]
    return zp.pipeline.Sweep('flops', 0.95, rows, {'evaluate': 'accuracy (abc)'})


@pytest.fixture(scope='module')
def pruner() -> zp.Pruner:
    return zp.Pruner(Residual(), None, images(1))


@pytest.fixture(scope='module')
def relevance(pruner: zp.Pruner) -> zp.Relevance:
    return pruner.collect((images(8), labels(8)), progress=False)


@pytest.fixture(scope='module')
def plan(pruner: zp.Pruner, relevance: zp.Relevance) -> zp.Plan:
    return pruner.plan(relevance, zp.Budget(flops=0.6))


def test_everything(tmp_path: Path, pruner: zp.Pruner, plan: zp.Plan, relevance: zp.Relevance) -> None:
    x, target = images(5, seed=3), labels(5)
    zp.report(pruner, plan, relevance, x, target, tmp_path / 'report.html', class_names=['ant', 'bee', 'cow', 'dog'],
              image_names=[f'{name}.png' for name in 'vwxyz'], evaluation={'accuracy': (0.91234, '88 %')},
              sweep=made_up_sweep(), commands=['zennit-prune run net.py'], title='A plan', progress=False)
    page = Page(tmp_path / 'report.html')
    before, after = zp.cost(pruner.model, images(1)), zp.cost(plan.apply(pruner.model), images(1))
    for old, new in zip((before.params, before.flops, before.bytes), (after.params, after.flops, after.bytes)):
        assert f'{old:,} → {new:,}' in page.text
    for expected in ('A plan', 'ant', 'v.png', '0.9123', '88 %', 'zennit-prune run net.py', 'accuracy over FLOPs left',
                     torch.__version__, 'LGPL-3.0-or-later', 'may be covered by a patent', 'it is an output'):
        assert expected in page.text
    assert all(group.name in page.text for group in pruner.graph.groups)
    assert sum(tag == 'img' for tag, _ in page.tags) >= 4 * 5
    plan.save(tmp_path / 'plan.json')
    link = next(value for value in page.attributes('href') if value.startswith('data:'))
    assert base64.b64decode(link.partition(',')[2]) == (tmp_path / 'plan.json').read_bytes()
    assert hashlib.sha256((tmp_path / 'plan.json').read_bytes()).hexdigest() in page.text


def test_nothing_but_itself(tmp_path: Path, pruner: zp.Pruner, plan: zp.Plan) -> None:
    '''No address of anywhere else, and a script that the page's own policy lets run.'''
    zp.report(pruner, plan, path=tmp_path / 'report.html', x=images(2), progress=False)
    page = Page(tmp_path / 'report.html')
    assert not {tag for tag, _ in page.tags} & {'link', 'iframe', 'object', 'base', 'form'}
    for value in (*page.attributes('src'), *page.attributes('href')):
        assert value.startswith(('data:image/', 'data:application/json', '#')), value
    assert not re.search(r'(?:url\(|@import)', (tmp_path / 'report.html').read_text(encoding='utf-8'))
    policy = next(found['content'] for tag, found in page.tags if found.get('http-equiv') == 'Content-Security-Policy')
    digest = base64.b64encode(hashlib.sha256(page.scripts[-1].encode()).digest()).decode()
    assert policy is not None and f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    anchors = {value[1:] for value in page.attributes('href') if value.startswith('#')}
    assert anchors <= set(page.attributes('id')) and len(anchors) >= 11


def test_what_is_missing_is_asked_for(tmp_path: Path, pruner: zp.Pruner) -> None:
    plan = zp.Plan(pruner.graph).remove('block1.conv1', [1])
    zp.report(pruner, plan, path=tmp_path / 'report.html', progress=False)
    text = Page(tmp_path / 'report.html').text
    for name in ('x=', 'relevance=', 'exemplars=8', 'sweep=zp.sweep', 'evaluation=', 'commands='):
        assert name in text
    assert 'Read this first' not in text


def test_an_empty_plan(tmp_path: Path, pruner: zp.Pruner, relevance: zp.Relevance) -> None:
    zp.report(pruner, zp.Plan(pruner.graph), relevance, images(2), path=tmp_path / 'report.html', progress=False)
    text = Page(tmp_path / 'report.html').text
    assert 'The plan is empty' in text and '100.0% left' in text and 'fails' not in text


class Hostile(nn.Module):
    '''Layers called what would run in a browser.'''

    def __init__(self) -> None:
        super().__init__()
        self.add_module(HOSTILE, nn.Conv2d(3, 6, 3, padding=1))
        self.add_module(CLOSING, nn.Conv2d(6, 6, 3, padding=1))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in (HOSTILE, CLOSING):
            x = self.get_submodule(name)(x).relu()
        return self.fc(x.mean((2, 3)))


def hostile_report(path: Path) -> None:
    pruner = zp.Pruner(seeded(Hostile()), None, images(1))
    relevance = pruner.collect((images(8), labels(8)), progress=False)
    relevance.info[HOSTILE] = CLOSING
    zp.report(pruner, pruner.plan(relevance, zp.Budget(flops=0.6)), relevance, images(4), labels(4), path,
              class_names=[HOSTILE] * 4, image_names=[CLOSING] * 4, evaluation={HOSTILE: (HOSTILE, CLOSING)},
              sweep=made_up_sweep(HOSTILE), commands=[CLOSING, HOSTILE], title=HOSTILE, progress=False)


def test_hostile_names_are_texts(tmp_path: Path) -> None:
    hostile_report(tmp_path / 'report.html')
    page = Page(tmp_path / 'report.html')
    assert page.text.count(HOSTILE) > 8 and page.text.count(CLOSING) > 3
    assert not page.attributes('onerror') and all(value.startswith('data:') for value in page.attributes('src'))
    runs = [found for tag, found in page.tags if tag == 'script' and found.get('type') != 'application/json']
    assert len(runs) == 1
    said = [json.loads(script) for script in page.scripts[:-1]]
    assert any(HOSTILE in text for says in said for text in says)


def test_all_or_nothing(tmp_path: Path, pruner: zp.Pruner, plan: zp.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'report.html'
    path.write_text('the last one')
    with pytest.raises(zp.PruneError, match=r'shape \(2, 8, 8\) cannot be shown'):
        zp.report(pruner, plan, path=path, x=images(2), display=torch.ones(2, 2, 8, 8), progress=False)
    with pytest.raises(zp.PruneError, match='no folder for'):
        zp.report(pruner, plan, path=tmp_path / 'nowhere' / 'report.html', progress=False)
    monkeypatch.setitem(sys.modules, 'jinja2', None)
    with pytest.raises(zp.PruneError, match=r"report\(\) needs jinja2: pip install 'zennit-prune\[report\]'"):
        zp.report(pruner, plan, path=path, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ['report.html'] and path.read_text() == 'the last one'


def test_the_path_is_the_last_argument(tmp_path: Path, pruner: zp.Pruner, plan: zp.Plan, relevance: zp.Relevance,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (('a.html', pruner, plan), (tmp_path / 'a.html', pruner, plan, relevance),
                      (pruner, plan, 'a.html'), (pruner, plan, relevance, tmp_path / 'a.html')):
        with pytest.raises(zp.PruneError, match=r'the path last, call report\(pruner, plan, .*, path\)'):
            zp.report(*arguments, progress=False)
    assert not list(tmp_path.iterdir())
    zp.report(pruner, plan, relevance, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ['report.html']


@pytest.mark.parametrize('options, message', [
    ({'x': images(2)[0]}, r'x is shape \(3, 8, 8\): give images'),
    ({'x': [1]}, 'x is a list: give images'),
    ({'target': labels(2)}, 'give x= with them'),
    ({'x': images(2), 'target': labels(3)}, 'target has 3 entries for 2 images'),
    ({'x': images(2), 'image_names': ['a']}, 'image_names has 1 entries for 2 images'),
    ({'max_images': 0}, 'max_images=0: show at least one'),
    ({'evaluation': {'accuracy': 0.5}}, r"evaluation\['accuracy'\]=0.5: give two values"),
    ({'evaluation': [1]}, r'evaluation=\[1\]: give what was measured by name'),
    ({'sweep': zp.pipeline.Sweep('flops', 1.0)}, 'no value to draw'),
    ({'relevance': zp.Relevance({'conv': torch.ones(3)})}, '3 scores for group'),
])
def test_refused(tmp_path: Path, pruner: zp.Pruner, plan: zp.Plan, options: dict[str, Any], message: str) -> None:
    if 'relevance' in options:
        options = {'relevance': zp.Relevance({pruner.graph.groups[0].name: torch.ones(3)})}
    with pytest.raises(zp.PruneError, match=message):
        zp.report(pruner, plan, path=tmp_path / 'report.html', progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_a_plan_of_another_trace(tmp_path: Path, pruner: zp.Pruner) -> None:
    other = zp.Plan(zp.trace(Hostile(), images(1)))
    with pytest.raises(zp.PruneError, match='another trace'):
        zp.report(pruner, other, path=tmp_path / 'report.html', progress=False)


@pytest.mark.parametrize('fails', [False, True])
def test_the_network_is_left_as_it_is(tmp_path: Path, fails: bool) -> None:
    model = lived_in(Residual())
    pruner = zp.Pruner(model, None, images(1))
    plan = zp.Plan(pruner.graph).remove(pruner.graph.groups[0].name, [0])
    before = snapshot(model)
    if fails:
        with pytest.raises(zp.PruneError):
            zp.report(pruner, plan, path=tmp_path / 'report.html', x=images(2), display=torch.ones(2, 2, 8, 8))
    else:
        zp.report(pruner, plan, path=tmp_path / 'report.html', x=images(2), progress=False)
    assert same(before, snapshot(model))


def test_a_network_that_is_not_the_plans_fails_the_check(tmp_path: Path, pruner: zp.Pruner, plan: zp.Plan) -> None:
    zp.report(pruner, plan, path=tmp_path / 'report.html', small=pruner.model, progress=False)
    assert 'was not made by this plan' in Page(tmp_path / 'report.html').text


def test_what_changes_most_comes_first(tmp_path: Path, pruner: zp.Pruner, plan: zp.Plan,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    '''Those that keep their prediction and lose its explanation, then other predictions, then the rest.'''
    real = zp.agreement(pruner.model, plan.masked(pruner.model), None, images(5))
    moved, same_class = torch.tensor([0.1, 0.9, 0.6, 0.7, 0.3]), torch.tensor([True, False, True, True, False])
    found = dataclasses.replace(real, total_variation=moved, same=same_class, order=torch.tensor([3, 2, 0, 1, 4]),
                                predicted=(torch.zeros(5).long(), (~same_class).long()))
    monkeypatch.setattr(_sections, 'agreement', lambda *_, **__: found)
    zp.report(pruner, plan, path=tmp_path / 'report.html', x=images(5), class_names=['ant', 'bee'], max_images=4,
              image_names=[f'<{number}>' for number in range(5)], progress=False)
    page = Page(tmp_path / 'report.html')
    assert [name for name in page.attributes('alt') if name[1:-1].isdigit()] == ['<3>', '<2>', '<1>', '<4>']
    assert '3 of 5 predictions stay the same; for 2 of these' in page.text
    assert 'The 4 images that change most' in page.text
    assert page.text.count('explanation changes') == 2 + 1 and page.text.count('predicted ant, then bee') == 2


def test_layers_cost_what_the_pruned_layers_cost(pruner: zp.Pruner, plan: zp.Plan) -> None:
    '''FLOPs of a convolution on 8 by 8 pixels, from the shapes of the networks.'''
    small = plan.apply(pruner.model)
    layers = {layer.name: layer for layer in layer_costs(plan).layers}
    for side, network in enumerate((pruner.model, small)):
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d) and name in ('stem', 'block1.conv1', 'block1.conv2'):
                assert layers[name].flops[side] == 2 * module.weight.numel() * 8 * 8
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                assert layers[name].params[side] == sum(value.numel() for value in module.parameters())
    total = zp.cost(small, images(1))
    costs = layer_costs(plan)
    assert sum(layer.flops[1] for layer in costs.layers) == total.flops
    assert sum(layer.params[1] for layer in costs.layers) + costs.others[1] == total.params


def test_noise_of_full_size_fits_a_mail(tmp_path: Path) -> None:
    '''Sixteen images that no format makes small.'''
    pruner = zp.Pruner(Residual(), None, images(1, 224))
    plan = zp.Plan(pruner.graph).remove('block1.conv1', [1])
    zp.report(pruner, plan, path=tmp_path / 'report.html', x=images(16, 224), progress=False)
    assert 1e6 < (tmp_path / 'report.html').stat().st_size < 5e6


# --- what needs exemplars
@pytest.fixture(scope='module')
def collected(pruner: zp.Pruner) -> zp.Relevance:
    return pruner.collect((images(8), labels(8)), progress=False, exemplars=3)


def test_channels_at_risk(tmp_path: Path, pruner: zp.Pruner, plan: zp.Plan, collected: zp.Relevance) -> None:
    zp.report(pruner, plan, collected, path=tmp_path / 'report.html', references=(images(8), labels(8)),
              class_names=['ant', 'bee', 'cow', 'dog'], progress=False)
    page = Page(tmp_path / 'report.html')
    for risk in plan.at_risk(collected, 3).channels:
        name = ['ant', 'bee', 'cow', 'dog'][risk.class_]
        assert f'{risk.group}, channel {risk.channel}' in page.text
        assert f"{risk.value:.0%} of the group's relevance for reference {risk.sample} ({name})" in page.text
    assert page.text.count('removed Relevance') == min(5, sum(map(len, plan.removed.values())))
    assert any(f'loses most: {value:.0%}' in page.text for value in plan.at_risk(collected).classes.mean(1).tolist())


@pytest.mark.parametrize('order', ['reversed', 'shuffled', 'fewer', 'vectors'])
def test_references_that_are_others(tmp_path: Path, pruner: zp.Pruner, plan: zp.Plan, collected: zp.Relevance,
                                    order: str) -> None:
    x, target = images(8), labels(8)
    data = torch.utils.data.TensorDataset(x, target)
    references, message = {
        'reversed': ((x.flip(0), target.flip(0)), 'references are in another order'),
        'shuffled': (torch.utils.data.DataLoader(data, shuffle=True), 'references are shuffled'),
        'fewer': (x[:2], 'references hold 2 samples'),
        'vectors': (x.flatten(1), 'references are shown as images'),
    }[order]
    with pytest.raises(zp.PruneError, match=message):
        zp.report(pruner, plan, collected, path=tmp_path / 'report.html', references=references, progress=False)
    assert not list(tmp_path.iterdir())


def test_excerpts_hold_the_heatmap() -> None:
    values = torch.zeros(20, 30)
    values[4:8, 20:25] = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    rows, columns = _box(values)
    assert rows.start <= 4 and rows.stop >= 8 and columns.start <= 20 and columns.stop >= 25
    assert rows.stop - rows.start == columns.stop - columns.start == 5
    corner = torch.zeros(20, 30)
    corner[19, 29] = 1.0
    assert _box(corner) == (slice(15, 20), slice(25, 30))

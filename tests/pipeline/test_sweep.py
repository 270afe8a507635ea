'''Sweeps: every cell once, resumed, with reasons where there is no value.'''
from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from PIL import Image
from promises.test_pretrained import loaders, references  # noqa: F401  (a fixture)
from small import Residual, chain, images, labels, same, seeded, snapshot
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import zennit_prune as zp
from zennit_prune.pipeline import _sweep as sweeps
from zennit_prune.pipeline._sweep import Row

BUDGETS = [zp.Budget(flops=0.8), zp.Budget(flops=0.5)]
LOADER = (images(8), labels(8))


class Interrupted(Exception):
    '''What ends a sweep early.'''


class Evaluate:
    '''Counts its calls, and ends them all after so many.'''

    def __init__(self, most: float = float('inf')):
        self.sizes: list[int] = []
        self.most = most

    def __call__(self, model: nn.Module) -> float:
        if len(self.sizes) >= self.most:
            raise Interrupted
        self.sizes.append(zp.cost(model, images(1)).params)
        with torch.no_grad():
            return float(model(images(16, seed=1)).softmax(1).amax(1).mean())


@pytest.fixture
def pruner() -> zp.Pruner:
    return zp.Pruner(seeded(Residual()), None, images(1))


def run(pruner: zp.Pruner, evaluate: Any = None, **changes: Any) -> zp.pipeline.Sweep:
    arguments = {'loader': LOADER, 'evaluate': evaluate or Evaluate(), 'budgets': BUDGETS, 'seeds': range(2),
                 'criteria': ['relevance', 'l1', 'random'], 'progress': False}
    return zp.sweep(pruner, **{**arguments, **changes})


def test_every_cell_by_hand(pruner: zp.Pruner) -> None:
    before = snapshot(pruner.model)
    evaluate = Evaluate()
    found = run(pruner, evaluate)
    assert same(before, snapshot(pruner.model))
    assert found.unit == 'flops' and found.original == Evaluate()(pruner.model)
    assert [row.cell for row in found.rows] == [
        (criterion, 'none', seed, budget.value) for seed in range(2) for criterion in ('relevance', 'l1', 'random')
        for budget in BUDGETS]
    assert len(evaluate.sizes) == 1 + len(found.rows)
    whole = zp.cost(pruner.model, images(1)).flops
    for row in found.rows:
        relevance = pruner.collect(LOADER, row.criterion, seed=row.seed, progress=False)
        small = pruner.plan(relevance, zp.Budget(flops=row.budget)).apply(pruner.model)
        assert row.value == Evaluate()(small)
        assert row.left == pytest.approx(zp.cost(small, images(1)).flops / whole) and row.left <= row.budget
        assert row.seconds > 0 and not row.error


def test_relevance_is_collected_once_for_each_seed(pruner: zp.Pruner) -> None:
    drawn, seen = [], []

    def draw(seed: int) -> Iterator[Any]:
        drawn.append(seed)
        return iter([(images(8, seed=seed), labels(8))])  # a generator: to be gone through for every criterion

    def custom(graph: zp.graph.ChannelGraph, model: nn.Module, loader: Any) -> zp.Relevance:
        seen.append(float(next(iter(loader))[0].sum()))
        return zp.Relevance({group.name: torch.arange(group.size) for group in graph.groups})

    found = run(pruner, loader=draw, criteria={'a': custom, 'b': 'relevance', 'c': custom}, seeds=(3, 4))
    assert drawn == [3, 4]
    assert seen == [float(images(8, seed=seed).sum()) for seed in (3, 3, 4, 4)]
    assert not any(row.error for row in found.rows)
    relevance = pruner.collect([(images(8, seed=4), labels(8))], progress=False)
    small = pruner.plan(relevance, BUDGETS[1]).apply(pruner.model)
    assert next(row for row in found.rows if row.cell == ('b', 'none', 4, 0.5)).value == Evaluate()(small)


def test_relevance_that_is_there_and_options(pruner: zp.Pruner) -> None:
    ready = pruner.collect((), 'random', seed=7)
    found = run(pruner, criteria={'ready': ready}, seeds=[0], plan={'round_to': 2})
    assert found.rows[1].value == Evaluate()(pruner.plan(ready, BUDGETS[1], round_to=2).apply(pruner.model))
    signed = run(pruner, criteria=['relevance'], seeds=[0], collect={'aggregate': 'signed'})
    relevance = pruner.collect(LOADER, aggregate='signed', progress=False)
    assert signed.rows[1].value == Evaluate()(pruner.plan(relevance, BUDGETS[1]).apply(pruner.model))


def test_repairs_get_the_references(pruner: zp.Pruner, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def repair(model: nn.Module, small: nn.Module, plan: zp.Plan, data: Any, method: str, progress: bool) -> nn.Module:
        given.append((method, data is LOADER, model is pruner.model, plan.apply(model) is not small))
        repaired = chain()
        return repaired

    monkeypatch.setattr(sweeps, 'repaired', repair)
    found = run(pruner, criteria=['l1'], repairs=['none', 'refit'], seeds=[0])
    assert given == [('refit', True, True, True)] * 2
    assert [row.repair for row in found.rows] == ['none', 'refit'] * 2
    assert [row.value for row in found.rows[1::2]] == [Evaluate()(chain())] * 2


def test_evaluate_may_do_what_it_likes_to_its_network(pruner: zp.Pruner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, 'repaired', lambda model, small, *_, **__: small)
    before = snapshot(pruner.model)

    def spoil(model: nn.Module) -> float:
        value = Evaluate()(model)
        for parameter in model.parameters():
            parameter.data.fill_(1.0)
        return value

    found = run(pruner, spoil, criteria=['l1'], repairs=['none', 'bias'], seeds=[0])
    assert same(before, snapshot(pruner.model))
    assert found.rows[0].value == found.rows[1].value


def test_failing_cells_do_not_end_it(pruner: zp.Pruner) -> None:
    model = chain()
    found = run(zp.Pruner(model, None, images(1)), criteria=['batchnorm', 'l1'], seeds=[0],
                budgets=[zp.Budget(flops=0.6), zp.Budget(flops=1e-4)])
    errors = [row.error for row in found.rows]
    assert 'says nothing about any channel' in errors[0] == errors[1]
    assert not errors[2] and 'out of reach' in errors[3]
    assert [row.value is None for row in found.rows] == [True, True, False, True] == [
        row.left is None for row in found.rows]
    assert "2 without a value (batchnorm, none, seed 0, flops=0.6): criterion='batchnorm' says nothing" in str(found)
    assert 'Budget(flops=0.0001) is out of reach' in str(found)


def test_values_that_are_not_finite_are_failures(pruner: zp.Pruner) -> None:
    sizes = [zp.cost(pruner.model, images(1)).params]
    found = run(pruner, lambda model: 1.0 if zp.cost(model, images(1)).params in sizes else float('nan'), seeds=[0],
                criteria=['l1'])
    assert all('evaluate returned nan' in row.error and row.value is None and row.left for row in found.rows)
    with pytest.raises(zp.PruneError, match='evaluate returned inf'):
        run(pruner, lambda model: float('inf'))


# --- checkpoints


@pytest.mark.parametrize('most', [1, 2, 6, 12])
def test_an_interrupted_sweep_goes_on(pruner: zp.Pruner, most: int, tmp_path: Path) -> None:
    whole, path = run(pruner), tmp_path / 'sweep.json'
    with pytest.raises(Interrupted):
        run(pruner, Evaluate(most), checkpoint=path)
    assert len(zp.pipeline.Sweep.load(path).rows) == most - 1 if most > 1 else not path.exists()
    evaluate = Evaluate()
    fresh = zp.Pruner(seeded(Residual()), None, images(1))
    resumed = run(fresh, evaluate, checkpoint=path)
    assert len(evaluate.sizes) == len(whole.rows) - (most - 1) + (most == 1)
    assert [(row.cell, row.value, row.left) for row in resumed.rows] == [
        (row.cell, row.value, row.left) for row in whole.rows]
    assert list(tmp_path.iterdir()) == [path]
    again = Evaluate()
    assert run(fresh, again, checkpoint=path).rows == resumed.rows == zp.pipeline.Sweep.load(path).rows
    assert not again.sizes


def test_only_what_is_missing_is_collected(pruner: zp.Pruner, tmp_path: Path) -> None:
    seeds = []

    def draw(seed: int) -> Any:
        seeds.append(seed)
        return LOADER

    with pytest.raises(Interrupted):
        run(pruner, Evaluate(8), loader=draw, checkpoint=tmp_path / 'sweep.json')
    run(pruner, loader=draw, checkpoint=tmp_path / 'sweep.json')
    assert seeds == [0, 1, 1]


@pytest.mark.parametrize(('changes', 'what'), [
    ({'criteria': ['l1']}, 'criteria'), ({'seeds': [0, 2]}, 'seeds'), ({'repairs': ['bias']}, 'repairs'),
    ({'budgets': [zp.Budget(flops=0.8)]}, 'budgets'), ({'budgets': [zp.Budget(params=0.8)]}, 'budgets'),
    ({'plan': {'round_to': 2}}, 'options'), ({'loader': lambda seed: LOADER}, 'loader'),
    ({'evaluate': lambda model: 1.0}, 'evaluate'), ({'pruner': zp.Pruner(chain(), None, images(1))}, 'network'),
    ({'pruner': zp.Pruner(seeded(Residual(), 1), None, images(1))}, 'network'),
    ({'pruner': zp.Pruner(seeded(Residual()), None, images(1), ignore=['stem'])}, 'groups'),
    ({'criteria': {'relevance': 'l1', 'l1': 'l1', 'random': 'random'}}, 'criteria'),
])
def test_a_checkpoint_of_another_sweep(pruner: zp.Pruner, changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    run(pruner, checkpoint=tmp_path / 'sweep.json')
    before = (tmp_path / 'sweep.json').read_text()
    with pytest.raises(zp.PruneError, match=rf'sweep.json. is of another sweep: its {what} was .*remove this one'):
        run(**{'pruner': pruner, **changes}, checkpoint=tmp_path / 'sweep.json')
    assert (tmp_path / 'sweep.json').read_text() == before


def test_relevance_given_is_part_of_the_call(pruner: zp.Pruner, tmp_path: Path) -> None:
    scores = [pruner.collect((), 'random', seed=seed) for seed in range(2)]
    run(pruner, criteria={'ready': scores[0]}, checkpoint=tmp_path / 'sweep.json')
    with pytest.raises(zp.PruneError, match='of another sweep: its criteria'):
        run(pruner, criteria={'ready': scores[1]}, checkpoint=tmp_path / 'sweep.json')


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"format": "zennit_prune sweep", "version": 2}',
                                  '{"format": "zennit_prune sweep", "version": 1, "unit": "flops", "rows": [{}]}'])
def test_files_that_are_no_sweeps(pruner: zp.Pruner, text: str, tmp_path: Path) -> None:
    (tmp_path / 'sweep.json').write_text(text)
    for read in (zp.pipeline.Sweep.load, lambda path: run(pruner, checkpoint=path)):
        with pytest.raises(zp.PruneError, match=r'sweep.json. is no zennit_prune sweep'):
            read(tmp_path / 'sweep.json')


@pytest.mark.parametrize(('changes', 'message'), [
    ({'budgets': []}, 'budgets=.*at least one'), ({'criteria': {}}, 'criteria=.*at least one'),
    ({'criteria': 'l1'}, "criteria='l1': give a list"), ({'seeds': []}, 'seeds='), ({'repairs': 'refit'}, 'repairs='),
    ({'criteria': ['l1', 'l1']}, 'criteria: l1 is given twice'), ({'seeds': [1, 1]}, 'seeds: 1 is given twice'),
    ({'budgets': [zp.Budget(flops=0.5), zp.Budget(flops=0.5)]}, r'Budget\(flops=0.5\) is given twice'),
    ({'budgets': [zp.Budget(flops=0.5), zp.Budget(params=0.5)]}, 'one unit.*flops, params'),
    ({'budgets': [0.5]}, r'one unit.*0\.5'),
    ({'checkpoint': '/nowhere/sweep.json'}, 'there is no folder'),
    ({'repairs': ['none', 'refitt']}, "repairs='refitt' is unknown: use one of 'refit'.*did you mean 'refit'"),
    ({'criteria': ['l1', 'luck']}, "criterion='luck' is unknown: use one of 'relevance'"),
    ({'collect': {'agregate': 'abs'}}, "sweep: collect: option='agregate' is unknown.*did you mean 'aggregate'"),
    ({'collect': {'criterion': 'l1'}}, "sweep: collect: option='criterion' is unknown"),
    ({'plan': {'rounds_to': 8}}, "sweep: plan: option='rounds_to' is unknown.*did you mean 'round_to'"),
    ({'plan': {'aggregate': 'abs'}}, "'aggregate' is an option of .*Pruner.col"),
    ({'budget': []}, "sweep: option='budget' is unknown: .*did you mean 'budgets'"),
])
def test_calls_that_make_no_sense(pruner: zp.Pruner, changes: dict[str, Any], message: str) -> None:
    evaluate = Evaluate()
    with pytest.raises(zp.PruneError, match=message):
        run(pruner, evaluate, **changes)
    assert not evaluate.sizes


def test_evaluate_returns_a_number(pruner: zp.Pruner) -> None:
    with pytest.raises(zp.PruneError, match='evaluate returned None: return a number'):
        run(pruner, lambda network: None)


def test_what_a_loader_shuffles_depends_on_the_seed_alone(pruner: zp.Pruner) -> None:
    loader, found = DataLoader(TensorDataset(images(24), labels(24)), 4, shuffle=True), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(run(pruner, loader=loader, criteria=['taylor'], repairs=['bias'], plan={}))
        assert torch.equal(before, torch.get_rng_state())
    assert [row.value for row in found[0].rows] == [row.value for row in found[1].rows]


# --- what comes out


def made_up(repairs: tuple[str, ...] = ('none', 'refit')) -> zp.pipeline.Sweep:
    rows = [Row(criterion, repair, seed, budget, budget - 0.01, 0.95 - (1 - budget) ** 2 * (3 - 2 * (repair == 'refit'))
                * (1 + number) / 4 + 0.02 * (seed - 1) * (1 - budget), 1.5)
            for seed in range(3) for number, criterion in enumerate(('relevance', 'l1', 'random'))
            for budget in (0.8, 0.65, 0.5, 0.35) for repair in repairs]
    return zp.pipeline.Sweep('flops', 0.95, rows, {'evaluate': 'accuracy (12ab)'})


def test_the_table_has_means_and_spreads() -> None:
    found = made_up()
    text = str(found)
    assert text == found.table()
    for criterion in ('relevance', 'l1', 'random'):
        for repair in ('none', 'refit'):
            values = [row.value for row in found.rows if (row.criterion, row.repair, row.budget)
                      == (criterion, repair, 0.5) and row.value is not None]
            assert f'{fmean(values):.4g} ± {stdev(values):.2g}' in text
    assert 'original: 0.95; mean and standard deviation over 3 seeds' in text
    assert text.splitlines()[0].split() == ['criterion', 'repair', 'flops=0.8', 'flops=0.65', 'flops=0.5', 'flops=0.35']


def test_the_table_says_how_many_seeds_have_a_value() -> None:
    rows = [Row('l1', 'none', seed, 0.5, *((0.5, 0.25 + 0.25 * seed) if seed < 2 else (None, None)), 1.0,
                '' if seed < 2 else 'it did not') for seed in range(3)]
    text = str(zp.pipeline.Sweep('flops', 1.0, [*rows, Row('l2', 'none', 0, 0.5, None, None, 1.0, 'it did not')]))
    assert '0.375 ± 0.18 (2 of 3)' in text and '2 without a value (l1, none, seed 2, flops=0.5): it did not' in text
    assert text.splitlines()[3].split() == ['l2', 'none', '-']


def test_saved_and_loaded(pruner: zp.Pruner, tmp_path: Path) -> None:
    found = run(pruner)
    found.save(tmp_path / 'sweep.json')
    again = zp.pipeline.Sweep.load(tmp_path / 'sweep.json')
    assert (again.rows, again.unit, again.original, again.settings) == (
        found.rows, found.unit, found.original, found.settings)
    assert str(again) == str(found) and repr(again) == 'Sweep(12 rows over flops)'
    json.loads((tmp_path / 'sweep.json').read_text())


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip('matplotlib')
    for found in (made_up(), made_up(('none',))):
        figure = found.plot(tmp_path / 'sweep.png')
        assert [axes.get_ylabel() for axes in figure.axes] == ['accuracy'] and len(found.plot().axes) == 1
        image = Image.open(tmp_path / 'sweep.png').convert('RGB')
        colours = {colour for count, colour in image.getcolors(2 ** 20) if count > 50}
        assert {(0, 114, 178), (213, 94, 0), (0, 158, 115)} <= colours
    found.plot(tmp_path / 'sweep.svg')
    assert {'relevance', 'l1', 'random', 'original', 'accuracy', 'FLOPs left'} <= {
        part.split('-->')[0].strip() for part in (tmp_path / 'sweep.svg').read_text().split('<!--')}


def test_nothing_to_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('matplotlib')
    with pytest.raises(zp.PruneError, match='nothing to plot'):
        zp.pipeline.Sweep('flops', 1.0, [Row('l1', 'none', 0, 0.5, None, None, 1.0, 'no')]).plot(tmp_path / 'sweep.png')
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(zp.PruneError, match=r"needs matplotlib: pip install 'zennit-prune\[plot\]'"):
        made_up().plot(tmp_path / 'sweep.png')
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings('ignore:the plan misses its budget')
def test_latency_budgets(pruner: zp.Pruner) -> None:
    pruner.latencies(0.1, progress=False)
    found = run(pruner, budgets=[zp.Budget(latency_fraction=0.95)], seeds=[0])
    assert found.unit == 'latency_fraction'
    assert all(row.error or (row.left and row.left > 0) for row in found.rows)


def test_a_pretrained_network(loaders: Any) -> None:  # noqa: F811
    '''Relevance is ahead of chance on the average of draws.'''
    network, preprocess = loaders.load('resnet20_cifar10')
    kept, truth = references(loaders, 'resnet20_cifar10', 40)
    test, answers = (part[:400] for part in loaders.cifar10('test_5k'))

    def draw(seed: int) -> Any:
        chosen = torch.cat([torch.nonzero(truth == label).flatten()[10 * seed:10 * seed + 10] for label in range(10)])
        return preprocess(kept[chosen]), truth[chosen]

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(preprocess(test)).argmax(1) == answers).float().mean())

    pruner = zp.Pruner(network, None, preprocess(kept[:1]))
    found = zp.sweep(pruner, draw, accuracy, [zp.Budget(flops=0.85)], ['relevance', 'random'], seeds=range(3),
                     progress=False)
    curves = found.curves()
    assert found.original > 0.88
    assert curves['relevance', 'none'][0.85].mean > curves['random', 'none'][0.85].mean + 0.1

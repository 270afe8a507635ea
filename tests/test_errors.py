'''Unknown names are answered with the nearest known one.'''
from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import chain, images, labels
from zennit.composites import EpsilonPlus, LayerMapComposite

import zennit_prune as zp
from zennit_prune.errors import nearest, unknown
from zennit_prune.looking import receptive_field
from zennit_prune.pipeline import Preset
from zennit_prune.relevance import Collector

HALF = zp.Budget(flops=0.5)


@pytest.mark.parametrize('value, expected', [
    ('sum_abs', "; did you mean 'sumabs'?"), ('ABS', "; did you mean 'abs'?"), ('magic', ''), (None, ''), (3, ''),
])
def test_the_nearest_name(value: object, expected: str) -> None:
    assert nearest(value, ('abs', 'sumabs', 'signed')) == expected
    assert nearest(value, iter(('abs', 'sumabs', 'signed'))) == expected


def test_the_error_says_what_was_given_what_is_allowed_and_what_is_near() -> None:
    error = unknown('aggregate', 'sum_abs', iter(('abs', 'sumabs')))
    assert isinstance(error, zp.PruneError)
    assert str(error) == "aggregate='sum_abs' is unknown: use one of 'abs', 'sumabs'; did you mean 'sumabs'?"
    assert str(unknown('initial', 7, ('one-hot',), ' or a function')) == (
        "initial=7 is unknown: use one of 'one-hot' or a function.")


class Made:
    '''A network, its graph and everything that calls need, made once.'''

    def __init__(self) -> None:
        self.model, self.x, self.y = chain(), images(8), labels(8)
        self.pruner = zp.Pruner(self.model, None, self.x[:1], progress=False)
        self.graph = self.pruner.graph
        self.relevance = self.pruner.collect((self.x, self.y))
        self.plan = zp.Plan(self.graph, {'0': [0, 1]})
        self.small = self.plan.apply(self.model)


@pytest.fixture(scope='module')
def made() -> Made:
    return Made()


MISSPELT: dict[str, tuple[Callable[[Made], object], str, str]] = {
    'repair': (lambda m: zp.repair(m.model, m.small, m.plan, m.x, metod='bias'), 'repair', 'method'),
    'heatmap': (lambda m: zp.heatmap(m.model, None, m.x, chanel=('0', 1)), 'heatmap', 'channel'),
    'agreement': (lambda m: zp.agreement(m.model, m.small, None, m.x, targt=0), 'agreement', 'target'),
    'report': (lambda m: zp.report(m.pruner, m.plan, titel='A'), 'report', 'title'),
    'heatmap_image': (lambda m: zp.heatmap_image(m.x, {}, 'a.png', caption=()), 'heatmap_image', 'captions'),
    'receptive_field': (lambda m: receptive_field(m.model, m.x, grop='0'), 'receptive_field', 'group'),
    'trace': (lambda m: zp.trace(m.model, m.x, ignor=()), 'trace', 'ignore'),
    'cost': (lambda m: zp.cost(m.model, exampel=m.x), 'cost', 'example'),
    'latency': (lambda m: zp.latency(m.model, m.x, repeat=3), 'latency', 'repeats'),
    'verify': (lambda m: zp.verify(m.model, m.small, m.plan, exampel=m.x), 'verify', 'example'),
    'save': (lambda m: zp.save(m.small, m.plan, pth='a'), 'save', 'path'),
    'load': (lambda m: zp.load(m.model, paht='a'), 'load', 'path'),
    'Plan': (lambda m: zp.Plan(m.graph, removd={}), 'Plan', 'removed'),
    'apply': (lambda m: m.plan.apply(m.model, verfy=False), 'Plan.apply', 'verify'),
    'apply_': (lambda m: m.plan.apply_(m.model, optimiser=None), 'Plan.apply_', 'optimizer'),
    'at_risk': (lambda m: m.plan.at_risk(m.relevance, counts=3), 'Plan.at_risk', 'count'),
    'Plan.load': (lambda m: zp.Plan.load('a', grap=m.graph), 'Plan.load', 'graph'),
    'on': (lambda m: m.pruner.on(m.small, progres=False), 'Pruner.on', 'progress'),
    'Collector': (lambda m: Collector(m.graph, m.model, EpsilonPlus(), agregate='abs'), 'Collector', 'aggregate'),
    'Relevance': (lambda m: zp.Relevance(score={}), 'Relevance', 'scores'),
    'GraphCanonizer': (lambda m: zp.GraphCanonizer(m.model, exampel=m.x), 'GraphCanonizer', 'example'),
    'register_operation': (lambda m: zp.register_operation('a::b', pointwse=True), 'register_operation', 'pointwise'),
}


@pytest.mark.parametrize('call', MISSPELT)
def test_a_misspelt_argument_is_refused_by_the_function_that_was_called(call: str, made: Made) -> None:
    function, called, meant = MISSPELT[call]
    with pytest.raises(zp.PruneError, match=f"^{called}: option='.*' is unknown: .*did you mean '{meant}'"):
        function(made)


def test_arguments_by_position_are_counted(made: Made) -> None:
    refused: dict[str, Callable[[], object]] = {
        "report: 'relevance' is given twice, by position and by name: call report(pruner, plan, relevance, x, ":
            lambda: zp.report('a.html', made.pruner, made.plan, relevance=made.relevance),  # type: ignore
        "heatmap: 'x' is not given: call heatmap(model, composite, x, target, initial, ...)":
            lambda: zp.heatmap(made.model, made.x),  # type: ignore[call-arg]
        'cost: there are more arguments without a name than it takes: call cost(model, example)':
            lambda: zp.cost(made.model, made.x, made.x),  # type: ignore[call-arg]
        "Plan.remove: 'positions' is not given: call Plan.remove(name, positions)":
            lambda: made.plan.remove('0'),  # type: ignore[call-arg]
        "heatmap_image: option='images' is unknown: use one of 'x', 'maps', 'path'":
            lambda: zp.heatmap_image(path='a', images=made.x, heatmaps={}),  # type: ignore[call-arg]
    }
    for message, call in refused.items():
        with pytest.raises(zp.PruneError, match=f'^{re.escape(message)}'):
            call()


def test_functions_stay_what_they_are() -> None:
    functions: tuple[Any, ...] = (zp.repair, zp.trace, zp.heatmap, zp.Plan.apply, zp.Plan.load, zp.finetune)
    for function in functions:
        assert pickle.loads(pickle.dumps(function)) == function and function.__doc__
    assert list(inspect.signature(zp.trace).parameters) == [
        'model', 'example', 'ignore', 'layernorm', 'progress', 'examples']
    assert list(inspect.signature(zp.Budget).parameters)[:2] == ['flops', 'params']
    assert list(inspect.signature(Collector).parameters)[:3] == ['graph', 'model', 'composite']
    assert torch.is_tensor(zp.heatmap(x=images(1), composite=None, model=chain()))


ORDERS: dict[str, tuple[Callable[[Made], object], str]] = {
    'agreement': (lambda m: zp.agreement(m.small, m.model, None, m.x),
                  r'given in the other order: .* parameters, .*agreement\(model, small, composite, x\)'),
    'report': (lambda m: zp.report(m.plan, m.pruner), r'a Plan stands in the place of pruner: .*report\(pruner, p'),
    'report with relevance': (lambda m: zp.report(m.pruner, m.relevance, m.plan), 'a Relevance stands in the place of'),
    'Plan.load': (lambda m: zp.Plan.load(m.graph, 'plan.json'),
                  r'a path is needed, not a ChannelGraph: .*Plan.load\(path, graph\)'),
    'Plan.load with a pruner': (lambda m: zp.Plan.from_dict(m.plan.to_dict(), m.pruner),
                                r'a ChannelGraph is needed, which zp.trace returns, not a Pruner. Give its .graph'),
    'sweep': (lambda m: zp.sweep(m.pruner, len, (m.x, m.y), [HALF], ['l1']),
              r'evaluate=a tuple is no function: call sweep\(pruner, loader, evaluate, budgets, criteria\)'),
    'sweep of a model': (lambda m: zp.sweep(m.model, (m.x, m.y), len, [HALF], ['l1']), 'a Pruner is needed, not a Seq'),
    'prune': (lambda m: zp.prune(m.model, None, HALF, [(m.x, m.y)]), 'a Budget is needed, not a list: e.g. Budget'),
    'Plan': (lambda m: zp.Plan(m.model), 'made for a ChannelGraph, which zp.trace returns, not for a Sequential'),
    'remove': (lambda m: m.plan.remove([0], '0'), 'a group is given by its name, a text, not by a list'),
    'compose': (lambda m: m.plan.compose(None), r'a Plan is needed, not None: .*plan.compose\(later\)'),
    'heatmap': (lambda m: zp.heatmap(m.model, None, m.x, graph=m.pruner), 'a ChannelGraph is needed.*Give its .graph'),
}
VALUES: dict[str, tuple[Callable[[Made], object], str]] = {
    'plan of scores': (lambda m: m.pruner.plan({'0': [1.0]}, HALF),
                       'relevance gives a dict where a Relevance is needed'),
    'plan of None': (lambda m: m.pruner.plan(None, HALF), 'relevance gives None where a Relevance is needed'),
    'criterion': (lambda m: m.pruner.collect((), lambda *_: {}),
                  'criterion=.*<lambda>.* gives a dict where a Relevance'),
    'evaluate': (lambda m: m.pruner.iterate((), HALF, evaluate=3), 'evaluate=3 is no function: give a function'),
    'finetune': (lambda m: m.pruner.iterate((), HALF, finetune=3), 'finetune=3 is no function'),
    'callback': (lambda m: m.pruner.iterate((), HALF, callback=3), 'callback=3 is no function'),
    'sweep': (lambda m: zp.sweep(m.pruner, (), None, [HALF], ['l1']), 'evaluate=None is no function'),
    'at_risk': (lambda m: m.plan.at_risk(m.relevance, -1), 'count=-1 is no number of channels'),
    'latency': (lambda m: zp.latency(m.model, m.x, 'gpu'), "device='gpu' is no device: give e.g. 'cpu' or 'cuda'"),
    'repeats': (lambda m: zp.latency(m.model, m.x, repeats='a'), "repeats='a': measure at least once"),
    'latencies': (lambda m: m.pruner.latencies(-1), 'seconds=-1: give a number of seconds'),
    'table': (lambda m: m.pruner.prune((), HALF, latencies='t.json'),
              r"latencies='t.json' is no LatencyTable: .*load\("),
    'seed of prune': (lambda m: m.pruner.prune((), HALF, 'l1', seed=0.5), 'seed=0.5 is no whole number'),
    'seed of iterate': (lambda m: m.pruner.iterate((), HALF, criterion='l1', seed='a'), "seed='a' is no whole number"),
    'composite': (lambda m: zp.heatmap(m.model, 'epsilon_gamma_box', m.x),
                  r"not 'epsilon_gamma_box': e.g. EpsilonGammaB"),
    'class': (lambda m: zp.heatmap(m.model, EpsilonPlus, m.x), r'not the class EpsilonPlus: e.g. EpsilonPlus\(\) from'),
    'agreement': (lambda m: zp.agreement(m.model, m.small, m.pruner, m.x),
                  'a Zennit composite is needed.*not a Pruner'),
    'channel': (lambda m: zp.heatmap(m.model, m.x, m.x, channel=('0', 1)),
                'a Zennit composite is needed.*not a Tensor'),
    'Collector': (lambda m: Collector(m.graph, m.model, 'epsilon_plus'), 'a Zennit composite is needed, an instance'),
    'Pruner': (lambda m: zp.Pruner(m.model, 'epsilon_plus', m.x), 'a Zennit composite is needed, an instance'),
    'Preset': (lambda m: Preset(EpsilonPlus()), r'not an EpsilonPlus: e.g. Preset\(EpsilonPlus\), without brackets'),
}


@pytest.mark.parametrize('call', [*ORDERS, *(f'value of {name}' for name in VALUES)])
def test_other_orders_and_wrong_values_are_refused_in_a_few_words(call: str, made: Made) -> None:
    function, message = VALUES[call.removeprefix('value of ')] if call.startswith('value of ') else ORDERS[call]
    with pytest.raises(zp.PruneError, match=message) as caught:
        function(made)
    assert len(str(caught.value)) < 300


def test_a_preset_gives_pictures_its_rules(made: Made) -> None:
    expected = zp.heatmap(made.model, zp.presets.paper.composite(), made.x)
    assert zp.heatmap(made.model, zp.presets.paper, made.x).equal(expected)
    found = zp.agreement(made.model, made.small, zp.presets.paper, made.x)
    assert found.before.equal(zp.heatmap(made.model, zp.presets.zplus(), made.x))
    assert isinstance(Collector(made.graph, made.model, zp.presets.paper).composite, LayerMapComposite)
    assert dir(zp.presets) == ['Preset', 'paper', 'recommended', 'zplus']


def test_numbers_of_numpy_are_numbers(made: Made, tmp_path: Path) -> None:
    loader = (made.x, made.y)
    plain = made.pruner.prune(loader, HALF, repair='bias', seed=3, min_channels=2, round_to=1)
    numpy = made.pruner.prune(loader, HALF, repair='bias', seed=np.int64(3), min_channels=np.int64(2),
                              round_to=np.int32(1))
    assert plain.plan == numpy.plan
    for seed, file in ((3, tmp_path / 'a'), (np.int64(3), tmp_path / 'b')):
        result = made.pruner.iterate((), HALF, 0.3, 'random', 'none', seed=seed, min_channels=np.int64(2),
                                     checkpoint=file)
        assert result.plan == made.pruner.iterate((), HALF, 0.3, 'random', 'none', seed=3, min_channels=2).plan


def test_pictures_and_reports_are_as_quiet_as_they_are_told(made: Made, tmp_path: Path,
                                                           capfd: pytest.CaptureFixture[str]) -> None:
    for setting in (True, False):
        pruner = zp.Pruner(made.model, None, made.x[:1], progress=setting)
        capfd.readouterr()
        zp.report(pruner, zp.Plan(pruner.graph, {'0': [1]}), path=tmp_path / 'a.html')
        assert bool(capfd.readouterr().err) == setting
        zp.report(pruner, zp.Plan(pruner.graph, {'0': [1]}), path=tmp_path / 'a.html', progress=not setting)
        assert bool(capfd.readouterr().err) != setting
    model = chain()
    assert made.plan.apply_(model, None, True, progress=False) is model

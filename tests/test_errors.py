'''Unknown names are answered with the nearest known one.'''
from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import chain, images, labels
from zennit.composites import EpsilonPlus

import zennit_prune as zp
from zennit_prune.errors import nearest, unknown
from zennit_prune.looking import receptive_field
from zennit_prune.relevance import Collector


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
    assert list(inspect.signature(zp.trace).parameters) == ['model', 'example', 'ignore', 'layernorm', 'progress']
    assert list(inspect.signature(zp.Budget).parameters)[:2] == ['flops', 'params']
    assert list(inspect.signature(Collector).parameters)[:3] == ['graph', 'model', 'composite']
    assert torch.is_tensor(zp.heatmap(x=images(1), composite=None, model=chain()))

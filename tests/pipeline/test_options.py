'''Options are checked where a method is called, before the first batch is read.'''
from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from small import Residual, chain, images, labels, seeded
from zennit.composites import EpsilonPlus

import zennit_prune as zp
from zennit_prune.errors import options_of

HALF = zp.Budget(flops=0.5)


def never() -> Iterator[Any]:
    '''A loader that must not be read.'''
    raise AssertionError('a batch was read')
    yield


def pruner() -> zp.Pruner:
    return zp.Pruner(chain(), None, images(1), progress=False)


CALLS: dict[str, Callable[..., Any]] = {
    'zp.prune': lambda **options: zp.prune(chain(), None, never(), HALF, **options),
    'prune': lambda **options: pruner().prune(never(), HALF, **options),
    'iterate': lambda **options: pruner().iterate(never(), HALF, **options),
}


@pytest.mark.parametrize('call', CALLS)
@pytest.mark.parametrize(('options', 'message'), [
    ({'agregate': 'abs'}, "option='agregate' is unknown: use one of .*; did you mean 'aggregate'"),
    ({'rounds_to': 8}, "option='rounds_to' is unknown.*; did you mean 'round_to'"),
    ({'exemplar': 8}, "option='exemplar' is unknown.*; did you mean 'exemplars'"),
    ({'floor': 0.5}, "option='floor' is unknown"),
    ({'lr': 0.1}, "option='lr' is unknown.* 'lr' is an option of finetune"),
    ({'criterion': 'relevanse'}, "criterion='relevanse' is unknown.* or a function of .*; did you mean 'relevance'"),
    ({'repair': 'refitt'}, "repair='refitt' is unknown.*; did you mean 'refit'"),
])
def test_unknown_names_are_refused_before_a_batch_is_read(call: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(zp.PruneError, match=message) as caught:
        CALLS[call](**options)
    if 'option=' in str(caught.value):
        assert str(caught.value).startswith({'zp.prune': 'prune: ', 'prune': 'Pruner.prune: ',
                                             'iterate': 'Pruner.iterate: '}[call])


def test_an_option_of_another_method_is_named_with_that_method() -> None:
    with pytest.raises(zp.PruneError, match=r"^Pruner.prune: option='step' is unknown.*'step' is an option of "
                                            r'Pruner.iterate\.'):
        pruner().prune(never(), HALF, step=0.1)
    with pytest.raises(zp.PruneError, match=r"'callback' is an option of finetune, Pruner.iterate\."):
        pruner().prune(never(), HALF, callback=print)


@pytest.mark.parametrize(('call', 'message'), [
    (lambda: zp.Pruner(chain(), None, images(1), ignored=[]), "^Pruner: option='ignored'.*did you mean 'ignore'"),
    (lambda: pruner().collect(never(), initals='one-hot'), "^Pruner.collect: option='initals'.*mean 'initial'"),
    (lambda: pruner().collector(atributor=None), "^Pruner.collector: option='atributor'.*mean 'attributor'"),
    (lambda: pruner().plan(zp.Relevance({}), HALF, min_chanels=2), "^Pruner.plan: .*did you mean 'min_channels'"),
    (lambda: pruner().preflight(images(1), inital='one-hot'), "^Pruner.preflight: .*did you mean 'initial'"),
    (lambda: pruner().latencies(second=1), "^Pruner.latencies: .*did you mean 'seconds'"),
    (lambda: zp.finetune(chain(), never(), 1, optimiser='sgd'), "^finetune: .*did you mean 'optimizer'"),
    (lambda: zp.finetune(chain(), never(), 1, optimizer='adam'), "optimizer='adam' is unknown.*did you mean 'adamw'"),
])
def test_every_method_names_the_nearest_option(call: Callable[[], object], message: str) -> None:
    with pytest.raises(zp.PruneError, match=message):
        call()


@pytest.mark.parametrize('call', ['prune', 'iterate'])
@pytest.mark.parametrize(('budget', 'options', 'message'), [
    (zp.Budget(flops=1e-4), {}, r'Budget\(flops=0.0001\) is out of reach'),
    (zp.Budget(channels=0.2), {'min_share': 0.5}, 'out of reach: with min_channels=1, min_share=0.5'),
    (zp.Budget(channels=0.2), {'min_channels': 4}, 'out of reach: with min_channels=4'),
    (zp.Budget(params=0.2), {'round_to': 8}, 'out of reach: .*round_to=8'),
    (zp.Budget(flops=10 ** 12), {}, 'leaves the network as it is'),
    (HALF, {'min_channels': 0}, 'min_channels=0'), (HALF, {'min_share': 2}, 'min_share=2'),
    (HALF, {'round_to': 0.5}, 'round_to=0.5'), (0.5, {}, 'a Budget is needed, not 0.5'),
])
def test_what_is_out_of_reach_is_said_before_a_batch_is_read(call: str, budget: Any, options: dict[str, Any],
                                                             message: str) -> None:
    with pytest.raises(zp.PruneError, match=message):
        getattr(pruner(), call)(never(), budget, **options)


def test_the_budget_is_checked_again_where_scores_are_missing() -> None:
    def few(graph: Any, model: Any, loader: Any) -> zp.Relevance:
        return zp.Relevance({'0': range(6)})

    one, read = pruner(), []
    least = one.prune((), zp.Budget(channels=0.3), 'l1', 'none')
    assert least.history[1].left['channels'] <= 0.3
    with pytest.raises(zp.PruneError, match='out of reach'):
        one.iterate((), zp.Budget(channels=0.3), 0.1, few, 'none', read.append)
    assert not read


def test_wrong_values_of_collect_are_said_before_a_batch_is_read() -> None:
    for options in ({'aggregate': 'sum_abs'}, {'nonfinite': 'ignore'}, {'exemplars': -1}, {'classes': 'all'}):
        with pytest.raises(zp.PruneError, match=next(iter(options))):
            pruner().prune(never(), HALF, **options)


def test_one_call_takes_the_options_of_all_steps() -> None:
    known = options_of(zp.prune)
    for method in (zp.Pruner.collect, zp.Pruner.plan, zp.Pruner.prune):
        assert {*options_of(method)} <= {*known}
    assert {'ignore', 'layernorm', 'progress'} <= {*known} and not {'step', 'finetune', 'min_score'} & {*known}
    assert {*options_of(zp.Pruner.collect), *options_of(zp.Pruner.plan)} <= {*options_of(zp.Pruner.iterate)}


def test_least_channels_and_least_shares() -> None:
    one = pruner()
    relevance = one.collect((images(8), labels(8)))
    assert one.plan(relevance, HALF) == one.plan(relevance, HALF, min_channels=1) == one.plan(
        relevance, HALF, min_channels=None, min_share=0.0)
    result = one.iterate((images(8), labels(8)), zp.Budget(channels=0.6), 0.2, repair='none', min_share=0.5)
    assert all(2 * len(gone) <= one.graph.group(name).size for name, gone in result.plan.removed.items())


@pytest.mark.parametrize('call', ['prune', 'iterate', 'resumed'])
def test_exemplars_come_along(call: str, tmp_path: Any) -> None:
    one = zp.Pruner(seeded(Residual()), None, images(1), progress=False)
    loader = (images(8), labels(8))
    expected = one.collect(loader, exemplars=3).exemplars
    if call == 'prune':
        result = one.prune(loader, HALF, repair='none', exemplars=3)
    else:
        def stop(step: Any) -> None:
            if call == 'resumed' and step.number == 2:
                raise KeyboardInterrupt

        def run(callback: Any) -> Any:
            return one.iterate(loader, HALF, 0.2, repair='none', exemplars=3, callback=callback,
                               checkpoint=tmp_path / 'run')
        if call == 'resumed':
            with pytest.raises(KeyboardInterrupt):
                run(stop)
        result = run(None)
        assert len(result.history) > 2
    found = result.relevance.exemplars
    assert found is not None and expected is not None and found.samples.keys() == expected.samples.keys()
    assert all(found.samples[name].equal(expected.samples[name]) for name in found.samples)


# --- progress
@pytest.mark.parametrize('setting', [True, False])
def test_progress_is_one_setting_that_methods_inherit(setting: bool, capfd: pytest.CaptureFixture[str]) -> None:
    one, loader = zp.Pruner(chain(), None, images(1), progress=setting), (images(8), labels(8))
    for call in (lambda **more: one.collect(loader, **more),
                 lambda **more: one.prune(loader, HALF, **more),
                 lambda **more: one.iterate(loader, HALF, 0.3, **more),
                 lambda **more: zp.sweep(one, loader, lambda network: 1.0, [HALF], ['taylor'], **more),
                 lambda **more: one.latencies(0.05, **more)):
        capfd.readouterr()
        call()
        assert bool(capfd.readouterr().err) == setting
        call(progress=None)
        assert bool(capfd.readouterr().err) == setting
        call(progress=not setting)
        assert bool(capfd.readouterr().err) != setting
    assert one.on(one.model).progress == setting and one.on(one.model, not setting).progress != setting


@pytest.mark.parametrize(('options', 'text'), [
    ({'layernorm': 'keep'}, "layernorm='keep'"), ({'aggregate': 'sum_abs'}, "did you mean 'sumabs'"),
    ({'nonfinite': 'drop'}, "nonfinite='drop'"), ({'exemplars': -1}, 'exemplars=-1'), ({'classes': ()}, 'classes='),
    ({'initial': 'one_hot'}, "did you mean 'one-hot'"), ({'min_share': 2}, 'min_share=2'),
    ({'round_to': 0}, 'round_to=0'), ({'min_channels': 0}, 'min_channels=0'), ({'seed': 'a'}, "seed='a'"),
    ({'criterion': 'taylor', 'attributor': int}, "attributor= is for criterion='relevance'"),
])
def test_values_are_refused_before_the_first_batch_is_the_example(options: dict[str, Any], text: str) -> None:
    with pytest.raises(zp.PruneError, match=re.escape(text)):
        zp.prune(seeded(Residual()), None, never(), HALF, **options)
    with pytest.raises(zp.PruneError, match='a Zennit composite is needed'):
        zp.prune(seeded(Residual()), EpsilonPlus, never(), HALF)


def test_warnings_point_at_the_users_line() -> None:
    one = zp.Pruner(seeded(Residual()), None, images(1), progress=False)
    for call in (one.prune, one.iterate, partial(zp.prune, one.model, None)):
        with pytest.warns(zp.PruneWarning, match='the references show 1 of the 4') as caught:
            call(loader=[(images(8), labels(8))], budget=HALF)
        assert {warning.filename for warning in caught} == {__file__}
    with pytest.warns(zp.PruneWarning, match="aggregate='signed' does not suit") as caught:
        one.prune((images(8), labels(8)), HALF, aggregate='signed', repair='none')
    assert caught[0].filename == __file__
    values = iter([1.0, 0.0])
    with pytest.warns(zp.PruneWarning, match='is not reached') as caught:
        one.iterate((), HALF, 0.2, 'l1', 'none', evaluate=lambda network: next(values), min_score=0.5)
    assert caught[0].filename == __file__


@pytest.mark.parametrize('criterion', ['auto', 'relevance', 'l1'])
@pytest.mark.parametrize('options', [{'aggregate': 'sum_abs'}, {'initial': 'onehot'}, {'nonfinite': 'ignore'},
                                     {'target': 'predictd'}, {'exemplars': 'a'}, {'min_share': 3}])
def test_no_criterion_hides_a_wrong_value(criterion: str, options: dict[str, Any]) -> None:
    for method in (pruner().prune, pruner().iterate):
        with pytest.raises(zp.PruneError, match=next(iter(options))):
            method(never(), HALF, criterion=criterion, **options)


def test_a_sweep_refuses_wrong_values_before_it_reads() -> None:
    for options in ({'collect': {'aggregate': 'foo'}}, {'plan': {'min_share': 3}}):
        with pytest.raises(zp.PruneError, match=r'foo|min_share'):
            zp.sweep(pruner(), never(), lambda network: 1.0, [HALF], ['relevance'], **options)

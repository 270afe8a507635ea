'''A criterion is chosen by what it does to outputs that nothing was fitted to.'''
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Residual, chain, images, same, seeded, snapshot
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import zennit_prune as zp
from zennit_prune.pipeline import Choice, _step
from zennit_prune.pipeline._choose import CANDIDATES
from zennit_prune.pipeline._choose import choose as chosen
from zennit_prune.repairs._trial import Divergence, divergence, outputs

QUIET: Any = {'progress': False}
HALF = zp.Budget(flops=0.5)


def data(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    return images(count, seed=3), torch.arange(count) % 4


def pruner() -> zp.Pruner:
    return zp.Pruner(seeded(Residual()), None, images())


def choose(one: zp.Pruner, loader: Any, criteria: Any = CANDIDATES, method: str = 'refit', seed: int = 0) -> Choice:
    '''As ``criterion='auto'`` does, with other candidates.'''
    def planned(references: Any, criterion: Any) -> zp.Plan:
        return one.plan(one.collect(references, criterion, seed=seed, **QUIET), HALF)

    return chosen(one.model, loader, planned, method, seed, False, criteria)


def upside_down(graph: zp.graph.ChannelGraph, model: nn.Module, loader: Any) -> zp.Relevance:
    '''The most relevant channels go first.'''
    found = zp.Pruner(model, None, images()).collect(data(), **QUIET)
    return zp.Relevance({name: -values for name, values in found.items()})


def broken(graph: zp.graph.ChannelGraph, model: nn.Module, loader: Any) -> zp.Relevance:
    raise zp.PruneError('it says nothing here')


@pytest.mark.parametrize('criteria', [('relevance', upside_down), (upside_down, 'relevance')])
def test_the_better_criterion_is_chosen(criteria: Any) -> None:
    one = pruner()
    before = snapshot(one.model)
    choice = choose(one, data(), criteria, 'none')
    assert choice.criterion == 'relevance' and same(before, snapshot(one.model))
    assert choice.divergences['relevance'].error < min(  # type: ignore[union-attr]
        found.error for name, found in choice.divergences.items() if name != 'relevance')  # type: ignore[union-attr]
    assert 'chosen' in str(choice) and 'upside_down' in str(choice)


def test_what_is_judged_was_held_out() -> None:
    seen: list[int] = []

    def counting(graph: zp.graph.ChannelGraph, model: nn.Module, loader: Any) -> zp.Relevance:
        seen.append(sum(len(inputs) for inputs, _ in loader))
        return zp.Relevance({group.name: torch.arange(group.size) for group in graph.groups})

    choice = choose(pruner(), data(40), [counting])
    assert seen == [30] and choice.criterion is counting


def test_one_that_fails_is_named_and_the_others_go_on() -> None:
    choice = choose(pruner(), data(), [broken, 'l1'], 'none')
    assert choice.criterion == 'l1' and 'it says nothing here' in str(choice)
    with pytest.raises(zp.PruneError, match=r'no criterion works: .*it says nothing here'):
        choose(pruner(), data(), [broken])


@pytest.mark.parametrize('loader', [data(), iter([data(20), data(20)]),
                                    [(images(20), [0, 1, 2, 3] * 5), (images(20, seed=1), [0, 1, 2, 3] * 5)]])
def test_auto_prunes_by_the_choice(loader: Any) -> None:
    one = pruner()
    expected = None if hasattr(loader, '__next__') else choose(one, loader, method='none')
    result = one.prune(loader, HALF, 'auto', 'none', **QUIET)
    assert result.choice is not None and result.relevance.info['criterion'] == result.choice.criterion
    assert list(result.choice.divergences) == list(CANDIDATES) and 'chosen' in str(result.choice)
    assert expected is None or expected == result.choice
    named = pruner().prune(data(), HALF, 'l1', 'none', **QUIET)
    assert named.choice is None


def test_auto_in_one_call_and_in_steps() -> None:
    model = seeded(Residual())
    small = zp.prune(model, None, data(), HALF, criterion='auto', repair='none', progress=False)
    assert zp.cost(small, images()).flops <= 0.5 * zp.cost(model, images()).flops
    result = pruner().iterate(data(), HALF, 0.25, 'auto', 'none', **QUIET)
    assert len(result.history) == 3 and result.choice is not None
    assert result.choice.criterion == result.relevance.info['criterion']


def test_what_cannot_be_chosen() -> None:
    with pytest.raises(zp.PruneError, match="criterion='auto' depends on the budget"):
        pruner().collect(data(), 'auto', **QUIET)
    with pytest.raises(zp.PruneError, match=r'there are 7 references.*takes 8 at least'):
        pruner().prune(data(7), HALF, 'auto', **QUIET)
    with pytest.raises(zp.PruneError, match="repair='lsq' is unknown"):
        pruner().prune(data(), HALF, 'auto', 'lsq', **QUIET)


def test_a_loader_that_shuffles_is_read_alike() -> None:
    loader, one, seen = DataLoader(TensorDataset(*data(24)), 4, shuffle=True), pruner(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        seen.append(choose(one, loader, ('relevance', 'l1'), 'none').divergences)
        assert torch.equal(before, torch.get_rng_state())
    assert seen[0] == seen[1]
    assert seen[0] != choose(one, loader, ('relevance', 'l1'), 'none', seed=1).divergences


def between(found: Sequence[torch.Tensor], original: Sequence[torch.Tensor]) -> Divergence:
    return divergence([[tensor] for tensor in found], [[tensor] for tensor in original])


def test_every_output_counts() -> None:
    one, two = torch.randn(6, 3).double(), torch.randn(6, 2, 4).double()
    moved = two + torch.randn(6, 2, 4).double()
    loss = torch.ones(()).double()
    found = divergence([[one[:4], moved[:4], loss], [one[4:], moved[4:], loss]], [[one[:4], two[:4], loss],
                                                                            [one[4:], two[4:], loss]])
    assert found.error == pytest.approx(between([moved], [two]).error / 3) and found.kl == 0


def test_divergence_in_closed_form() -> None:
    original = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    found = torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    one = between([found], [original])
    p, q = torch.full((3,), 1 / 3), torch.tensor([1.0, 0, 0]).softmax(0)
    assert one.kl == pytest.approx(float((p * (p / q).log()).sum()) / 2)
    assert one.error == pytest.approx((1 / 6) / float((original - original.mean(0)).square().mean()))
    assert one == between(found.split(1), original.split(1))
    assert between([original], [original]) == (0, 0)
    assert between([found[:, :2]], [original[:, :2]]).kl == 0  # two may be anything
    assert between([found[1:] + 1], [original[1:]]).error == pytest.approx(3 / 14)  # one has no variance
    assert one.worse_than(between([original], [original])) and not one.worse_than(one)
    broken = between([found * float('nan')], [original])
    assert broken.worse_than(one) and broken.worse_than(broken)


@pytest.mark.parametrize('error,kl,worse', [(0.5, 1.9, False), (0.5, 2.1, True), (2.1, 0.5, True), (1.9, 0.5, False),
                                            (1.01, 1, True), (1, 1, False)])
def test_the_clearer_of_two_measures_counts(error: float, kl: float, worse: bool) -> None:
    assert Divergence(0.3 * error, 0.02 * kl).worse_than(Divergence(0.3, 0.02)) == worse
    assert Divergence(0.3 * error, 0).worse_than(Divergence(0.3, 0)) == (error > 1)


def test_outputs_of_several_batches() -> None:
    model = chain()
    parts = images(10).split(4)
    with torch.no_grad():
        found = torch.cat([tensor for tensor, in outputs(model, parts)])
        assert torch.allclose(found, model(images(10)).double(), atol=1e-6)


class Stopped(Exception):
    pass


def test_a_resumed_run_keeps_the_choice_that_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, budget = zp.Pruner(seeded(Residual()), None, images(1), progress=False), zp.Budget(flops=0.6)

    def stop(step: zp.pipeline.Step) -> None:
        if step.number == 2:
            raise Stopped

    whole = one.iterate(data(), budget, 0.12, 'auto')
    with pytest.raises(Stopped):
        one.iterate(data(), budget, 0.12, 'auto', checkpoint=tmp_path / 'run', callback=stop)
    monkeypatch.setattr(_step, 'choose', None)  # measured once
    resumed = one.iterate(data(), budget, 0.12, 'auto', checkpoint=tmp_path / 'run')
    assert resumed.choice == whole.choice and dict(resumed.plan.removed) == dict(whole.plan.removed)


@pytest.mark.filterwarnings('ignore::zennit_prune.PruneWarning')
def test_reference_samples_do_not_change_the_choice() -> None:
    results = [pruner().prune(data(), HALF, 'auto', exemplars=count, **QUIET) for count in (0, 2)]
    assert results[0].choice == results[1].choice


def test_a_choice_without_samples_has_no_reference_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_step, 'choose', lambda *_: Choice('l1', {}))
    with pytest.warns(zp.PruneWarning, match="chose 'l1', which scores no samples"):
        result = pruner().prune(data(), HALF, 'auto', exemplars=2, **QUIET)
    assert result.relevance.exemplars is None


def test_candidates_that_do_not_work_are_named() -> None:
    one = zp.Pruner(seeded(Residual()), None, images(1), progress=False)
    with pytest.warns(zp.PruneWarning, match="leaves out 'taylor', which does not work here: there are no labels"):
        one.prune([images(16)], zp.Budget(flops=0.6), 'auto')

'''A batch is made once, where it enters: its values are checked once, and what is cut from it is known to be finite.'''
from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small import Residual, chain, images, labels, seeded
from torch.utils.data import DataLoader, TensorDataset

import zennit_prune as zp
from zennit_prune.util._loaders import Batch, batches

NAN = float('nan')


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    '''The shapes of the tensors that ``torch.isfinite`` is asked about.'''
    shapes: list[tuple[int, ...]] = []
    original = torch.isfinite

    def isfinite(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return original(tensor)

    monkeypatch.setattr(torch, 'isfinite', isfinite)
    return shapes


def broken(count: int = 6) -> torch.Tensor:
    x = images(count)
    x[2, 0, 1, 1], x[4] = NAN, float('inf')
    return x


KINDS: dict[str, Any] = {
    'pair': lambda x, y: (x, y), 'list': lambda x, y: [x, y], 'inputs': lambda x, y: x, 'single': lambda x, y: (x,),
    'dict': lambda x, y: {'x': x, 'flag': True},
}


@pytest.mark.parametrize('kind', KINDS)
def test_batches_of_any_kind(kind: str) -> None:
    x, y = images(), labels()
    batch = Batch.of(KINDS[kind](x, y))
    inputs, target = batch  # it unpacks like the pair it stands for
    assert batch.size == 4 and (target is y) == (kind in ('pair', 'list'))
    assert (inputs['x'] if kind == 'dict' else inputs) is x
    assert Batch.of(batch) is batch and batch.finite.all()


@pytest.mark.parametrize('value', [3, 'x', (1, 2, 3), None])
def test_what_is_no_batch(value: Any) -> None:
    with pytest.raises(zp.PruneError, match=f'a batch is.*{type(value).__name__}'):
        Batch.of(value)


def test_values_are_checked_once_and_whatever_is_cut_keeps_the_result(checked: list[Any]) -> None:
    batch = Batch.of(((broken(), labels(6)), list(range(6))))
    assert batch.finite.tolist() == [True, True, False, True, False, True]
    for samples in (slice(1, 4), torch.tensor([1, 2, 3]), torch.tensor([False, True, True, True, False, False])):
        part = batch.only(samples)
        assert part.finite.tolist() == [True, False, True] and part.target.tolist() == [1, 2, 3]
        assert torch.equal(part.inputs[1], labels(6)[1:4]) and part.only(slice(1)).finite.all()
    assert batch.with_target(None).finite is batch.finite and batch.to(torch.device('cpu')) is batch
    assert batch.zeroed().finite.all() and batch.joined([batch.only(slice(2))]).finite.tolist() == [
        True, True, False, True, False, True, True, True]
    assert checked == [(6, 3, 8, 8)]


def test_batches_that_are_not_finite_are_zeroed_or_refused(checked: list[Any]) -> None:
    batch = Batch(broken())
    whole = batch.zeroed().inputs
    assert torch.equal(whole[[0, 1, 3, 5]], broken()[[0, 1, 3, 5]]) and not whole[[2, 4]].any()
    with pytest.raises(zp.PruneError, match=r'\(6, 3, 8, 8\).*not finite.*check the data'):
        batch.check_finite()
    batch.zeroed().check_finite()
    shared = Batch({'x': images(), 'scale': torch.tensor(NAN), 'rows': torch.full((7,), NAN)})
    assert shared.finite.all()
    for one in (shared, shared.only(slice(2)), shared.zeroed()):
        with pytest.raises(zp.PruneError, match=r'shape \(\).*not finite'):
            one.check_finite()
    assert not Batch(torch.complex(broken(), broken())).finite[2] and Batch(labels()).finite.all()


@pytest.mark.parametrize('target', [[3, 1, 2, 0], torch.tensor([3, 1, 2, 0]), torch.tensor([3, 1, 2, 0]).numpy(),
                                    [torch.tensor(number) for number in (3, 1, 2, 0)]], ids=str)
def test_labels_of_any_kind_are_cut_with_their_samples(target: Any) -> None:
    assert Batch.of((images(), target)).only(slice(1, 3)).target.tolist() == [1, 2]


def test_targets_that_are_no_labels_stay() -> None:
    boxes = (torch.arange(4), torch.arange(16).view(4, 4))
    cut = Batch(images(), boxes).only(slice(1, 3)).target
    assert cut[0].tolist() == [1, 2] and cut[1].shape == (2, 4)
    assert Batch(images(), 'predicted').only(slice(1)).target == 'predicted'
    assert Batch(images(), torch.sigmoid).only(slice(1)).target is torch.sigmoid


def test_batches_go_to_other_processes_with_what_is_known(checked: list[Any]) -> None:
    batch = Batch(broken(), labels(6))
    assert not batch.finite.all()
    again = pickle.loads(pickle.dumps(batch))
    assert isinstance(again, Batch) and torch.equal(again.finite, batch.finite) and len(checked) == 1


def test_loaders_yield_batches_as_they_are() -> None:
    loader = DataLoader(TensorDataset(images(5), labels(5)), 2)
    found = list(batches(loader))
    assert [batch.size for batch in found] == [2, 2, 1] and all(isinstance(batch, Batch) for batch in found)
    assert all(one is other for one, other in zip(batches(found), found, strict=True))


# --- one check for all steps
def generated() -> Iterator[Any]:
    yield images(12), labels(12)


LOADERS: dict[str, Any] = {'tensors': lambda: (images(12), labels(12)), 'list': lambda: [(images(12), labels(12))],
                           'generator': generated}


@pytest.mark.parametrize('loader', LOADERS)
def test_one_prune_checks_a_batch_once(loader: str, checked: list[Any]) -> None:
    zp.prune(seeded(Residual()), None, LOADERS[loader](), zp.Budget(flops=0.6), progress=False)
    assert [shape for shape in checked if shape[1:] == (3, 8, 8)] == [(12, 3, 8, 8)]


def test_labels_in_a_list_are_labels() -> None:
    pruner = zp.Pruner(chain(), None, images())
    one, other = (pruner.collect([(images(), target)], classes=(1, 2), progress=False)
                  for target in (labels(), labels().tolist()))
    assert all(torch.equal(one[name], other[name]) for name in one) and one.info == other.info

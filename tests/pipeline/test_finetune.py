'''Training a pruned network on.'''

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from small import Residual, chain, images, labels, lived_in, same, seeded, snapshot
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

import zennit_prune as zp
from zennit_prune.pipeline._finetune import _Cosine
from zennit_prune.util._loaders import held_out, many_times


def task(count: int = 96, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    '''Images whose class is a colour.'''
    x, target = images(count, seed=seed), labels(count, 3)
    x[torch.arange(count), target] += 1.5
    return x, target


def network() -> nn.Module:
    return seeded(Residual(8, classes=3))


def tune(model: nn.Module | None = None, data: Any = None, epochs: int = 3, **options: Any) -> nn.Module:
    return zp.finetune(model or network(), task() if data is None else data, epochs, progress=False, **options)


def accuracy(model: nn.Module) -> float:
    x, target = (part.to(next(model.parameters()).device) for part in task(seed=1))
    with torch.no_grad():
        return float((model(x).argmax(1) == target).float().mean())


def equal(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw'])
def test_a_pruned_network_learns(device: torch.device, optimizer: str) -> None:
    pruner = zp.Pruner(network().to(device), None, images(1).to(device))
    small = pruner.prune(task(), zp.Budget(flops=0.5), repair='none', progress=False)
    tuned = tune(small.model, epochs=8, optimizer=optimizer, lr=0.05 if optimizer == 'sgd' else 0.01)
    assert accuracy(tuned) > 0.9 > accuracy(small.model) + 0.2
    assert not tuned.training and all(parameter.grad is None for parameter in tuned.parameters())
    assert small.plan.graph._prove(tuned, small.plan.removed) is None


def test_the_network_and_the_random_states_survive() -> None:
    model, teacher = lived_in(network()), network()
    before, states = snapshot(model), (random.getstate(), np.random.get_state()[1].copy())
    tuned = tune(model, teacher=teacher, validation=0.25)
    tuned = tune(model)
    assert same(before, snapshot(model)) and not equal(model, tuned)
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    for (name, old), new in zip(model.named_parameters(), tuned.parameters()):
        assert new.requires_grad == old.requires_grad and (old.requires_grad or torch.equal(old, new)), name


def test_seeds_decide() -> None:
    class Dropped(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(F.dropout(x, 0.2, self.training))

    one, again, other = (tune(seeded(Dropped(8, classes=3)), seed=seed, epochs=1, validation=0.2) for seed in (0, 0, 1))
    assert equal(one, again) and not equal(one, other)


def test_it_learns_the_outputs_of_a_teacher_without_labels() -> None:
    model = network()
    small = zp.Pruner(model, None, images(1)).prune(task(), zp.Budget(flops=0.5), repair='none', progress=False).model
    x = task()[0]

    def distance(student: nn.Module) -> float:
        with torch.no_grad():
            p, q = model(x).softmax(1), student(x).softmax(1)
            return float((p * (p / q).log()).sum(1).mean())

    for data in (x, [(part, None) for part in x.split(32)], (x, torch.full((96,), 99))):
        assert distance(tune(small, data, 5, teacher=model)) < 0.5 * distance(small)
    with pytest.raises(zp.PruneError, match='no labels to learn: give'):
        tune(small, x)


def test_the_loss_of_distillation() -> None:
    said: list[dict[str, float]] = []
    model, other, x = chain(), chain(), images(5)
    with torch.no_grad():
        other[-1].bias.add_(torch.arange(4.0))
        p, q = ((one(x) / 2).softmax(1) for one in (other, model))
    tune(model, [x], 1, teacher=other, temperature=2.0, callback=said.append)
    assert said[0]['loss'] == pytest.approx(float((p * (p / q).log()).sum(1).mean() * 4), rel=1e-4)


def test_any_loss() -> None:
    wanted = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    said: list[dict[str, float]] = []
    tune(chain(), (images(40), wanted), 8, loss=F.mse_loss, lr=0.05, callback=said.append)
    assert said[-1]['loss'] < 0.95 * said[0]['loss'] and [one['epoch'] for one in said] == list(range(1, 9))


# --- held-out references
def test_the_best_epoch_is_returned_and_training_stops() -> None:
    said: list[dict[str, float]] = []
    x, target = task()
    noise = target[torch.randperm(96, generator=torch.Generator().manual_seed(0))]  # nothing to learn but by heart
    tuned = tune(network(), (x[:64], noise[:64]), 40, validation=(x[64:], noise[64:]), patience=2, lr=0.1,
                 callback=said.append)  # fmt: skip
    losses = [one['validation'] for one in said]
    with torch.no_grad():
        start, found = (float(F.cross_entropy(one(x[64:]), noise[64:])) for one in (network(), tuned))
    assert found == pytest.approx(min(start, *losses), rel=1e-5) and len(losses) < 40
    assert min(losses[-2:]) >= min(start, *losses[:-2])


def test_it_never_gets_worse_on_what_is_held_out() -> None:
    model, x = network(), task()[0]
    with torch.no_grad():
        target = model(x).argmax(1)
    wrong = (target + 1) % 3
    assert equal(tune(model, (x, wrong), 3, validation=(x, target), patience=1), model)


@pytest.mark.parametrize('kind', ['tensors', 'loader', 'sequential', 'list', 'generator'])
def test_a_share_is_held_out(kind: str) -> None:
    x, target = torch.arange(40.0).view(-1, 1), torch.arange(40)
    data = {
        'tensors': lambda: (x, target),
        'loader': lambda: DataLoader(TensorDataset(x, target), 4, shuffle=True),
        'sequential': lambda: DataLoader(TensorDataset(x, target), 4),
        'list': lambda: list(zip(x.split(4), target.split(4))),
        'generator': lambda: iter(list(zip(x.split(4), target.split(4)))),
    }[kind]()
    parts = [[torch.cat([y for _, y in part]).tolist() for _ in range(2)] for part in held_out(many_times(data), 0.2)]
    (rest, again), (held, held_again) = parts
    assert held == held_again and len(held) == 8 and sorted(rest + held) == list(range(40)) == sorted(again + held)
    assert (rest == again) == (kind not in ('tensors', 'loader'))


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        yield from zip(*task(8))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    'optimizer': ({'optimizer': 'lion'}, "optimizer='lion' is unknown: use one of 'sgd', 'adamw'"),
    'epochs': ({'epochs': 0}, 'epochs=0: give a whole number'),
    'lr': ({'lr': 0.0}, 'lr=0.0: give a number above 0'),
    'lr text': ({'lr': 'a'}, "lr='a': give a number above 0"),
    'clip': ({'clip': -1}, 'clip=-1'),
    'no clip': ({'clip': None}, 'clip=None: give a number above 0'),
    'temperature': ({'temperature': None}, 'temperature=None'),
    'patience': ({'patience': 0}, 'patience=0: give a whole number of epochs from 1 on'),
    'label': ({'data': (images(4), labels(4, 3) + 1)}, 'label 3 is out of range: the network has 3 classes, from 0'),
    'outputs': ({'model': nn.Sequential(nn.Flatten(), nn.Linear(192, 1), nn.Flatten(0))}, 'without classes: give'),
    'share': ({'validation': 1.5}, 'validation=1.5: hold out a share between 0 and 1'),
    'too few': ({'validation': 0.1, 'data': [task(4)]}, 'of 1 batches leaves nothing'),
    'stream': ({'validation': 0.1, 'data': DataLoader(Stream(), 4)}, 'a share of this DataLoader: give validation='),
    'sampler': ({'validation': 0.1, 'data': DataLoader(TensorDataset(*task()), batch_sampler=BatchSampler(
        RandomSampler(range(96)), 4, False))}, 'a share of this DataLoader'),
    'empty': ({'data': []}, 'the loader is empty'),
    'nothing to validate on': ({'validation': []}, 'the loader is empty'),
    'lengths': ({'data': (images(4), labels(3))}, 'there are 4 inputs and 3 labels'),
    'nan': ({'data': (images(4) / 0, labels(4, 3))}, 'the loss is nan: training diverged, or the data are not finite'),
    'frozen': ({'model': network().requires_grad_(False)}, 'no trainable parameter'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_be_honoured_is_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(zp.PruneError, match=message):
        tune(**options)


def test_labels_in_a_list_and_no_grad_around_it() -> None:
    x, target = task()
    expected = tune(data=[(x, target)])
    with torch.no_grad():
        assert equal(expected, tune(data=[(x, target.tolist())]))
    with torch.inference_mode():
        assert equal(expected, tune(data=[(x, target.tolist())]))


@pytest.mark.parametrize('flat', [False, True])
def test_one_output_is_learnt_by_its_value(flat: bool) -> None:
    teacher, model = (seeded(nn.Sequential(nn.Flatten(), nn.Linear(192, 1), *[nn.Flatten(0)] * flat)) for _ in range(2))
    x = images(64)
    with torch.no_grad():
        model[1].weight += 0.1
        before = (model(x) - teacher(x)).square().mean()
        after = (tune(model, [x], epochs=30, teacher=teacher)(x) - teacher(x)).square().mean()
    assert after < 0.5 * before


@pytest.mark.parametrize('data', [task(8), DataLoader(Stream(), 4), iter([task(8)]), [task(4), task(4)]],
                         ids=['tensors', 'stream', 'generator', 'list'])  # fmt: skip
def test_loaders_are_read_in_every_epoch(data: Any) -> None:
    said: list[dict[str, float]] = []
    tune(data=data, epochs=4, callback=said.append)
    assert len(said) == 4 and len({one['loss'] for one in said}) == 4


# --- what keeps training from going wrong
def test_frozen_batch_norm_stays() -> None:
    model = network()
    for parameter in model.bn.parameters():
        parameter.requires_grad_(False)
    tuned = tune(model, epochs=1)
    assert torch.equal(tuned.bn.running_mean, model.bn.running_mean)
    assert not torch.equal(tuned.block1.bn1.running_mean, model.block1.bn1.running_mean)


def test_single_samples_do_not_enter_the_statistics() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.bn, self.fc2 = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(self.bn(self.fc1(x.mean((2, 3)))).relu())

    x, target = task(33)
    model = seeded(Pooled())
    tuned = tune(model, [(x[:1], target[:1])], 2)
    assert torch.equal(tuned.bn.running_mean, model.bn.running_mean)
    assert not torch.equal(tuned.fc1.weight, model.fc1.weight)
    tune(model, (x, target), 1)  # 32 and 1


def test_gradients_are_clipped() -> None:
    model, said = network(), []
    with torch.no_grad():
        model.fc.weight.mul_(300)  # what a fold of BatchNorm may leave behind
    tuned = tune(model, epochs=4, lr=0.05, callback=said.append)
    assert said[-1]['loss'] < said[0]['loss'] and all(torch.isfinite(value).all() for value in tuned.parameters())
    moved = tune(chain(), (1e4 * images(8), labels(8)), 1, lr=1.0, clip=1e-3)
    for before, after in zip(chain().parameters(), moved.parameters()):
        assert float((after - before).detach().norm()) < 1e-2


def test_the_learning_rate_warms_up_and_falls_to_nearly_nothing() -> None:
    cosine = _Cosine(100)
    factors = [cosine(update) for update in range(100)]
    assert factors.index(max(factors)) == 5 and max(factors) == 1
    assert factors[0] == pytest.approx(1 / 6) and factors[-1] < 0.01
    assert factors[5:] == sorted(factors[5:], reverse=True) and [_Cosine(1)(0), _Cosine(1)(1)] == [0.5, 1]


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    x, target = task(16)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        tuned = tune(network().to(dtype), (x.to(dtype), target), 1)
    assert {value.dtype for value in tuned.parameters()} == {dtype}


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('teach', [False, True])
def test_mixed_precision_on_a_gpu(teach: bool) -> None:
    model = network().cuda()
    tuned = tune(model, epochs=8, lr=0.05, teacher=model if teach else None)
    assert all(value.dtype == torch.float32 and value.is_cuda for value in tuned.parameters())
    assert teach or accuracy(tuned) > 0.9


def test_it_serves_the_loop() -> None:
    data = task()

    def train(model: nn.Module) -> nn.Module:
        return tune(model, data, 6, lr=0.05)

    check: Callable[[nn.Module], float] = accuracy
    result = zp.Pruner(network(), None, images(1)).iterate(data, zp.Budget(flops=0.4), 0.3, repair='none',
                                                           finetune=train, evaluate=check, progress=False)  # fmt: skip
    assert result.history[-1].evaluation == accuracy(result.model) > 0.9


@pytest.mark.parametrize('kind', ['sigmoid', 'several labels', 'several labels, whole numbers', 'masks with 255',
                                  'all outputs'])
def test_losses_that_fit_the_output(kind: str) -> None:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    several = (x[:, :3] > 0).float()
    networks: dict[str, tuple[nn.Module, Any, dict[str, Any]]] = {
        'sigmoid': (nn.Sequential(nn.Linear(6, 1), nn.Sigmoid()), several[:, 0], {}),
        'several labels': (nn.Linear(6, 3), several, {}),
        'several labels, whole numbers': (nn.Linear(6, 3), several.long(), {}),
        'masks with 255': (nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 2, 1)),
                           torch.where(x[:, 1] > 2, 255, several[:, 0].long())[:, None, None], {}),
        'all outputs': (Both(), several[:, :1], {'loss': lambda outputs, y: F.mse_loss(outputs['a'], y)
                                                 + F.mse_loss(outputs['b'], 1 - y)})}
    model, target, options = networks[kind]
    trained = zp.finetune(seeded(model), [(x, target)], 200, lr=0.3, progress=False, **options)
    with torch.no_grad():
        found = trained(x)
    if kind == 'all outputs':
        assert float((found['a'] - target).square().mean()) < 0.2 > float((found['b'] + target - 1).square().mean())
        return
    middle = 0.5 if kind == 'sigmoid' else 0
    right = found.argmax(1) == target if kind == 'masks with 255' else (found > middle) == target.reshape(found.shape)
    known = target != 255 if kind == 'masks with 255' else torch.ones_like(right)
    assert right[known].float().mean() > 0.95


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 1), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {'a': self.a(x), 'b': self.b(x)}


def test_values_of_a_regression_are_no_probabilities() -> None:
    with pytest.raises(zp.PruneError, match=r'neither 0 and 1 nor probabilities.*loss='):
        zp.finetune(nn.Linear(6, 3), [(torch.randn(8, 6), torch.randn(8, 3))], 1, progress=False)


def test_masks_of_bytes_are_refused_and_sigmoids_are_validated_as_they_are_trained() -> None:
    x, masks = torch.randn(8, 3, 4, 4), torch.randint(0, 2, (8, 4, 4), generator=torch.Generator().manual_seed(0))
    with pytest.raises(zp.PruneError, match='hold 255 and no 1'):
        zp.finetune(nn.Conv2d(3, 2, 1), [(x, masks * 255)], 1, progress=False)
    said: list[dict[str, float]] = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 1), nn.Sigmoid())
    zp.finetune(model, [(x, masks[:, 0, 0])], 1, lr=1e-9, validation=[(x, masks[:, 0, 0])], callback=said.append,
                progress=False)
    assert said[0]['validation'] == pytest.approx(said[0]['loss'], rel=1e-4)

'''Files of pruned networks and of relevance.'''

from __future__ import annotations

import json
import math
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small import Mixed, Residual, chain, composite, drawn_of, images, labels, same, seeded, snapshot
from torch import nn
from torch.nn import functional as F

import zennit_prune as zp
from zennit_prune.relevance._relevance import spearman


class Tied(nn.Module):
    '''Two convolutions that share their weight, and a buffer that is not in the state.'''

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.a, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.b.weight = self.a.weight
        self.register_buffer('scale', torch.linspace(0.5, 2, 6).view(6, 1, 1), persistent=False)
        self.register_buffer('steps', torch.tensor(7))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x)) * self.scale
        return self.fc(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


class Depthwise(nn.Module):
    '''Depthwise separable units with a group norm behind.'''

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.deep, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 6, 1)
        self.norm, self.fc = nn.GroupNorm(2, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.norm(self.point(F.relu(self.deep(F.relu(self.bn(self.stem(x)))))))).mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {
    'chain': chain,
    'residual': lambda: seeded(Residual()),
    'mixed': lambda: seeded(Mixed()),
    'tied': lambda: seeded(Tied()),
    'depthwise': lambda: seeded(Depthwise()),
}


def pruned(net: str, model: nn.Module | None = None) -> tuple[nn.Module, zp.Plan]:
    model = model or NETS[net]()
    graph = zp.trace(model, images(dtype=next(model.parameters()).dtype))
    random = np.random.default_rng(0)
    plan = zp.Plan(graph, {group.name: drawn_of(group, random, max(group.step, group.size // 3))
                           for group in graph.groups})
    return plan.apply(model), plan


# --- networks


@pytest.mark.parametrize('net', NETS)
def test_saved_networks_load_bit_for_bit(net: str, tmp_path: Path) -> None:
    small, plan = pruned(net)
    before = snapshot(small)
    zp.save(small, plan, tmp_path / 'small.safetensors')
    assert same(before, snapshot(small))
    fresh = NETS[net]()
    with torch.no_grad():
        for tensor in fresh.parameters():
            tensor.normal_()
    before = snapshot(fresh)
    loaded = zp.load(fresh, tmp_path / 'small.safetensors')
    assert same(before, snapshot(fresh))
    assert type(loaded) is type(small)
    for (name, tensor), (other, expected) in zip(
        [*loaded.named_parameters(remove_duplicate=False), *loaded.named_buffers()],
        [*small.named_parameters(remove_duplicate=False), *small.named_buffers()],
        strict=True,
    ):
        assert name == other and tensor.dtype == expected.dtype and torch.equal(tensor, expected)
    assert torch.equal(loaded(images()), small(images()))
    assert str(loaded) == str(small)
    if net == 'tied':
        assert loaded.b.weight is loaded.a.weight
    assert zp.verify(NETS[net](), loaded, plan, images()) <= 1e-4


def test_networks_are_saved_trained_on_and_pruned_again(tmp_path: Path) -> None:
    small, plan = pruned('residual')
    optimizer = torch.optim.SGD(small.train().parameters(), 0.1)
    F.cross_entropy(small(images()), labels()).backward()
    optimizer.step()
    zp.save(small, plan, tmp_path / 'small.safetensors')
    loaded = zp.load(NETS['residual'](), tmp_path / 'small.safetensors')
    assert torch.equal(loaded(images()), small.eval()(images()))
    later = zp.Plan(zp.trace(loaded, images())).remove('stem', [1])
    smaller, whole = later.apply(loaded), plan.compose(later)
    zp.save(smaller, whole, tmp_path / 'smaller.safetensors')
    again = zp.load(NETS['residual'](), tmp_path / 'smaller.safetensors')
    assert torch.equal(again(images()), smaller(images()))
    optimizer = torch.optim.Adam(again.parameters(), 0.01)
    before = [tensor.detach().clone() for tensor in again.parameters()]
    F.cross_entropy(again.train()(images()), labels()).backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, again.parameters()))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_types_are_those_of_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    small, plan = pruned('chain', chain().to(dtype))
    zp.save(small, plan, tmp_path / 'small.safetensors')
    loaded = zp.load(chain(), tmp_path / 'small.safetensors')
    assert {tensor.dtype for tensor in loaded.parameters()} == {dtype}
    assert torch.equal(loaded(images(dtype=dtype)), small(images(dtype=dtype)))


def test_flags_of_the_fresh_network_are_kept(tmp_path: Path) -> None:
    small, plan = pruned('residual')
    zp.save(small, plan, tmp_path / 'small.safetensors')
    fresh = NETS['residual']().train()
    fresh.stem.weight.requires_grad_(False)
    loaded = zp.load(nn.DataParallel(fresh), tmp_path / 'small.safetensors')
    assert loaded.training and isinstance(loaded, Residual)
    assert [tensor.requires_grad for tensor in loaded.parameters()] == [
        tensor.requires_grad for tensor in fresh.parameters()
    ]


def test_files_hold_tensors_and_json_only(tmp_path: Path) -> None:
    small, plan = pruned('mixed')
    zp.save(small, plan, tmp_path / 'small.safetensors')
    with safe_open(tmp_path / 'small.safetensors', 'pt') as file:
        metadata, names = file.metadata(), set(file.keys())
        assert all(isinstance(file.get_tensor(name), torch.Tensor) for name in names)
    assert names == set(small.state_dict())
    assert zp.Plan.from_dict(json.loads(metadata['plan']), plan.graph) == plan
    for key in ('shapes', 'group_sizes'):
        json.loads(metadata[key])
    content = (tmp_path / 'small.safetensors').read_bytes()
    assert not content.startswith(b'PK')
    with pytest.raises(ValueError):
        list(pickletools.genops(content))


@pytest.mark.parametrize(
    ('fresh', 'message'),
    [
        (lambda: seeded(Residual(width=7)), r"'stem\.weight' was \(6, 3, 3, 3\).*is \(7, 3, 3, 3\)"),
        (lambda: seeded(Residual(classes=5)), r"'fc\.weight' was \(4, 6\).*is \(5, 6\)"),
        (chain, "'stem.weight' was .*absent"),
        (lambda: nn.Sequential(seeded(Residual())), 'absent'),
    ],
)
def test_files_of_another_architecture(fresh: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    zp.save(*pruned('residual'), tmp_path / 'small.safetensors')
    with pytest.raises(zp.PruneError, match=message) as error:
        zp.load(fresh(), tmp_path / 'small.safetensors')
    assert 'small.safetensors' in str(error.value)


def test_networks_with_more_tensors_than_the_file(tmp_path: Path) -> None:
    zp.save(*pruned('residual'), tmp_path / 'small.safetensors')
    fresh = NETS['residual']()
    fresh.extra = nn.Linear(2, 2)
    with pytest.raises(zp.PruneError, match=r"'extra\.weight' was absent before pruning, but is \(2, 2\)"):
        zp.load(fresh, tmp_path / 'small.safetensors')


def _foreign(path: Path) -> None:
    save_file({'a': torch.ones(2)}, path)


def _relevance(path: Path) -> None:
    zp.Relevance({'a': torch.ones(2)}).save(path)


def _newer(path: Path) -> None:
    save_file({'a': torch.ones(2)}, path, {'format': 'zennit_prune network', 'version': '2'})


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    'foreign': (_foreign, 'no zennit_prune network'),
    'relevance': (_relevance, 'no zennit_prune network'),
    'newer': (_newer, "version '2'"),
    'text': (lambda path: path.write_text('hello'), 'no zennit_prune network'),
    'empty': (lambda path: path.write_bytes(b''), 'no zennit_prune network'),
    'pickle': (lambda path: torch.save(chain(), path), 'no zennit_prune network'),
}


@pytest.mark.parametrize('kind', FILES)
def test_files_that_are_something_else(kind: str, tmp_path: Path) -> None:
    write, message = FILES[kind]
    write(tmp_path / 'file')
    with pytest.raises(zp.PruneError, match=message) as error:
        zp.load(chain(), tmp_path / 'file')
    assert str(tmp_path / 'file') in str(error.value)


@pytest.mark.parametrize('share', [0.001, 0.1, 0.5, 0.99])
def test_truncated_files(share: float, tmp_path: Path) -> None:
    zp.save(*pruned('chain'), tmp_path / 'small.safetensors')
    content = (tmp_path / 'small.safetensors').read_bytes()
    (tmp_path / 'small.safetensors').write_bytes(content[: math.ceil(share * len(content))])
    with pytest.raises(zp.PruneError, match='no zennit_prune network'):
        zp.load(chain(), tmp_path / 'small.safetensors')


def test_missing_files(tmp_path: Path) -> None:
    for load in (lambda path: zp.load(chain(), path), zp.Relevance.load):
        with pytest.raises((zp.PruneError, FileNotFoundError), match='nowhere'):
            load(tmp_path / 'nowhere')


class Tempered(nn.Sequential):
    '''Divides by a temperature, which is no tensor; whatever it was set to is its extra state.'''

    temperature: Any = 1.0

    def get_extra_state(self) -> Any:
        return {'temperature': self.temperature}

    def set_extra_state(self, state: Any) -> None:
        self.temperature = state['temperature']

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / self.temperature


def tempered() -> tuple[nn.Module, zp.Plan]:
    model = Tempered(chain())
    model.temperature = 4.0
    graph = zp.trace(model, images())
    return model, zp.Plan(graph, {graph.groups[0].name: [0]})


def test_extra_states_are_saved(tmp_path: Path) -> None:
    model, plan = tempered()
    small = plan.apply(model)
    zp.save(small, plan, tmp_path / 'small')
    found = zp.load(Tempered(chain()), tmp_path / 'small')
    assert found.temperature == 4.0 and torch.equal(found(images()), small(images()))
    with pytest.raises(zp.PruneError, match="saved from another network: module '' has an extra state there, but no"):
        zp.load(nn.Sequential(chain()), tmp_path / 'small')


@pytest.mark.parametrize('temperature', [torch.ones(1), (1, 2), {1: 2}, object()])
def test_extra_states_that_no_file_holds_are_named(temperature: object, tmp_path: Path) -> None:
    model, plan = tempered()
    small = plan.apply(model)
    small.temperature = temperature
    with pytest.raises(zp.PruneError, match=r"state of module '' cannot be saved: .* register tensors as buffers"):
        zp.save(small, plan, tmp_path / 'small')
    assert not list(tmp_path.iterdir())


def test_a_network_that_the_plan_does_not_make_is_not_saved(tmp_path: Path) -> None:
    small, plan = pruned('chain')
    other = plan.keep('0', plan.removed['0'][:1])
    for network in (chain(), seeded(Residual()), small):
        with pytest.raises(zp.PruneError, match='not made by this plan'):
            zp.save(network, other, tmp_path / 'small.safetensors')
    assert list(tmp_path.iterdir()) == []


def test_parameters_that_were_tied_after_pruning_are_not_saved(tmp_path: Path) -> None:
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    plan = zp.Plan(zp.trace(model, torch.ones(2, 3)), {'0': [0], '2': [0]})
    small = plan.apply(model)
    small[2].bias = small[0].bias
    with pytest.raises(zp.PruneError, match=r"not made by this plan: '2\.bias' is shared"):
        zp.save(small, plan, tmp_path / 'small.safetensors')


def test_arguments_in_another_order_are_refused(tmp_path: Path) -> None:
    small, plan = pruned('chain')
    path = tmp_path / 'small.safetensors'
    for act in (lambda: zp.save(small, path, plan), lambda: zp.save(path, small, plan)):  # type: ignore[arg-type]
        with pytest.raises(zp.PruneError, match=r'is needed, not a .*save\(small, plan, path\)'):
            act()
    with pytest.raises(zp.PruneError, match=r'a path is needed, not a Sequential.*load\(model, path\)'):
        zp.load(path, chain())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_behind_when_saving_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, plan = pruned('chain')
    target = tmp_path / 'small.safetensors'
    zp.save(small, plan, target)
    content = target.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError('no space left')

    with monkeypatch.context() as patched:
        patched.setattr('os.replace', fail)
        with pytest.raises(OSError, match='no space'):
            zp.save(small, plan, target)
    assert [path.name for path in tmp_path.iterdir()] == ['small.safetensors']
    assert target.read_bytes() == content
    with pytest.raises(Exception, match='no folder'):
        zp.save(small, plan, tmp_path / 'nowhere' / 'small.safetensors')
    (tmp_path / 'folder').mkdir()
    with pytest.raises(OSError):
        zp.save(small, plan, tmp_path / 'folder')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['folder', 'small.safetensors']


def test_saving_overwrites(tmp_path: Path) -> None:
    first, second = pruned('chain'), pruned('residual')
    for small, plan in (first, second):
        zp.save(small, plan, str(tmp_path / 'small.safetensors'))
    assert torch.equal(zp.load(NETS['residual'](), str(tmp_path / 'small.safetensors'))(images()), second[0](images()))


# --- relevance


def collected() -> zp.Relevance:
    return zp.Pruner(chain(), composite(), images()).collect([(images(6), labels(6))], progress=False)


def test_relevance_survives_files(tmp_path: Path) -> None:
    relevance = collected()
    relevance.save(tmp_path / 'relevance.safetensors')
    loaded = zp.Relevance.load(str(tmp_path / 'relevance.safetensors'))
    assert list(loaded) == list(relevance)
    assert all(torch.equal(loaded[name], relevance[name]) for name in relevance)
    assert loaded.info == relevance.info and loaded.reliability().groups == relevance.reliability().groups
    assert str(loaded) == str(relevance) and repr(loaded) == repr(relevance)


@pytest.mark.parametrize('kind', ['foreign', 'text', 'empty', 'pickle', 'network'])
def test_files_that_are_no_relevance(kind: str, tmp_path: Path) -> None:
    path = tmp_path / 'file'
    if kind == 'network':
        zp.save(*pruned('chain'), path)
    else:
        FILES[kind][0](path)
    with pytest.raises(zp.PruneError, match='relevance') as error:
        zp.Relevance.load(path)
    assert str(path) in str(error.value)


def test_truncated_relevance(tmp_path: Path) -> None:
    collected().save(tmp_path / 'file')
    (tmp_path / 'file').write_bytes((tmp_path / 'file').read_bytes()[:-8])
    with pytest.raises(zp.PruneError, match='no zennit_prune relevance'):
        zp.Relevance.load(tmp_path / 'file')


def test_relevance_of_strided_scores_is_saved(tmp_path: Path) -> None:
    scores = torch.rand(6, dtype=torch.float64)[::2]
    zp.Relevance({'a': scores}).save(tmp_path / 'file')
    assert torch.equal(zp.Relevance.load(tmp_path / 'file')['a'], scores)


def test_relevance_of_shared_scores_is_saved(tmp_path: Path) -> None:
    scores = torch.rand(6, dtype=torch.float64)
    zp.Relevance({'a': scores, 'b': scores}).save(tmp_path / 'file')
    assert torch.equal(zp.Relevance.load(tmp_path / 'file')['b'], scores)


def test_relevance_does_not_share_its_callers_scores() -> None:
    scores = torch.zeros(3, dtype=torch.float64)
    relevance = zp.Relevance({'a': scores})
    scores[0] = float('nan')
    assert relevance['a'].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    'values',
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        np.array([1, 2, 3]),
        torch.tensor([1, 2, 3], dtype=torch.float16),
        torch.tensor([1.0, 2, 3], requires_grad=True),
    ],
)
def test_scores_from_anywhere(values: Any) -> None:
    relevance = zp.Relevance({'a': values}, info={'from': 'me'})
    assert (
        relevance['a'].dtype == torch.float64
        and relevance['a'].tolist() == [1, 2, 3]
        and not relevance['a'].requires_grad
    )
    assert (
        'a' in relevance
        and 'b' not in relevance
        and len(relevance) == 1
        and dict(relevance.items()) == {'a': relevance['a']}
    )
    assert '3 channels of 1 groups' in repr(relevance) and "from='me'" in repr(relevance)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        (torch.ones(2, 2), r"'a' have shape \(2, 2\)"),
        (torch.tensor(1.0), r"'a' have shape \(\)"),
        ([0.0, float('nan'), 1.0, float('inf')], r"'a' are not finite at positions \[1, 3\]"),
    ],
)
def test_scores_that_are_none(values: Any, message: str) -> None:
    with pytest.raises(zp.PruneError, match=message):
        zp.Relevance({'a': values})


def test_missing_scores_and_missing_halves() -> None:
    relevance = zp.Relevance({'a': [1.0, 2.0]})
    with pytest.raises(zp.PruneError, match=r"no scores for 'b'.*a"):
        relevance['b']
    with pytest.raises(zp.PruneError, match='two samples'):
        relevance.reliability()
    one = zp.Pruner(chain(), None, images()).collect([(images(1), labels(1))], progress=False)
    with pytest.raises(zp.PruneError, match='two samples'):
        one.reliability()
    assert 'a' in str(relevance) and '0' in str(one)


def test_reliability_is_the_rank_correlation_of_two_halves() -> None:
    '''Every other sample, collected apart.'''
    model, x, target = chain().double(), images(7, dtype=torch.float64), labels(7)
    pruner = zp.Pruner(model, composite(), x)
    whole = pruner.collect(list(zip(x.split(3), target.split(3))), progress=False)
    even, odd = (pruner.collect([(x[start::2], target[start::2])], progress=False) for start in (0, 1))
    for name, value in whole.reliability().groups.items():
        assert value == pytest.approx(by_hand(even[name].tolist(), odd[name].tolist()))
    assert set(whole.reliability().groups) == {'0', '2', '5', '9'}


# --- rank correlation


def by_hand(left: list[float], right: list[float]) -> float:
    '''The correlation of average ranks, from their definition.'''
    ranks = [
        [sum(other < value for other in side) + (sum(other == value for other in side) - 1) / 2 for value in side]
        for side in (left, right)
    ]
    centred = [[rank - sum(side) / len(side) for rank in side] for side in ranks]
    norms = [math.sqrt(sum(rank * rank for rank in side)) for side in centred]
    return sum(a * b for a, b in zip(*centred)) / (norms[0] * norms[1])


@pytest.mark.parametrize(
    ('left', 'right', 'expected'),
    [
        ([1, 2, 3, 4], [10, 20, 30, 1000], 1),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1),
        ([1, 2, 3], [1, 3, 2], 0.5),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 1 - 6 * 4 / (5 * 24)),
        ([1, 1, 2], [1, 2, 3], math.sqrt(3) / 2),
        ([1, 1, 2, 2], [1, 2, 1, 2], 0),
        ([1, 1, 1], [1, 2, 3], 0),
        ([0, -0.0, 1], [5, 5, 6], 1),
    ],
)
def test_spearman_closed_forms(left: list[float], right: list[float], expected: float) -> None:
    found = spearman(torch.tensor(left, dtype=torch.float64), torch.tensor(right, dtype=torch.float64))
    assert found == pytest.approx(expected, abs=1e-12)


def test_spearman_with_ties_at_random() -> None:
    random = np.random.default_rng(0)
    for size in (2, 3, 5, 20):
        for levels in (2, 3, 50):
            left, right = random.integers(0, levels, (2, size)).astype(float)
            if np.ptp(left) and np.ptp(right):
                assert spearman(torch.from_numpy(left), torch.from_numpy(right)) == pytest.approx(
                    by_hand(left.tolist(), right.tolist())
                )

'''Weights that are computed (``torch.nn.utils.parametrize``) are pruned, and stay computed in the same way.'''

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import apart, images, seeded, snapshot
from small import same as unchanged
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from zennit.canonizers import NamedMergeBatchNorm
from zennit.composites import EpsilonPlus
from zennit.core import Composite

import zennit_prune as zp
from zennit_prune.planning._cost import CostModel

Register = Callable[[nn.Module], Any]


class Positive(nn.Module):
    '''A weight above zero.'''

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.softplus(x)

    def right_inverse(self, y: torch.Tensor) -> torch.Tensor:
        return y + torch.log(-torch.expm1(-y))


class Doubled(nn.Module):
    '''Twice as large.'''

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def right_inverse(self, y: torch.Tensor) -> torch.Tensor:
        return y / 2


class Standard(nn.Module):
    '''A filter of mean zero and deviation one.'''

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.flatten(1).mean(1).view(-1, *[1] * (x.dim() - 1))
        return centred / centred.flatten(1).std(1).view(-1, *[1] * (x.dim() - 1))


class Sparse(nn.Module):
    '''A weight with a fixed mask.'''

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.register_buffer('mask', (torch.rand(weight.shape) > 0.3).to(weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask


def positive(layer: Any) -> None:
    with torch.no_grad():
        layer.weight.abs_().add_(0.01)
    parametrize.register_parametrization(layer, 'weight', Positive())


EXACT: dict[str, Register] = {
    'weight_norm': parametrizations.weight_norm,
    'weight_norm of inputs': lambda layer: parametrizations.weight_norm(layer, dim=1),
    'weight_norm of all': lambda layer: parametrizations.weight_norm(layer, dim=None),
    'positive': positive,
    'sparse': lambda layer: parametrize.register_parametrization(layer, 'weight', Sparse(layer.weight)),
    'weight_norm, then doubled': lambda layer: parametrize.register_parametrization(
        parametrizations.weight_norm(layer), 'weight', Doubled()),
    'a bias': lambda layer: parametrize.register_parametrization(layer, 'bias', Sparse(layer.bias)),
}


class Net(nn.Module):
    def __init__(self, groups: int):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.c, self.fc = nn.Conv2d(8, 12, 3, groups=groups), nn.Conv2d(12, 6, 1), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.c(F.relu(self.b(F.relu(self.norm(self.a(x)))))))
        return self.fc(x.mean((2, 3)))


def built(register: Register, groups: int = 1, layers: str = 'abc') -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = seeded(Net(groups)).double()
        for name in layers:
            register(getattr(model, name))
        with torch.no_grad():
            for name, tensor in model.named_parameters():  # not what the registration makes of a plain weight
                if name.endswith('original0'):
                    tensor.mul_(1.7).add_(0.3)
    return model


def x(count: int = 4, seed: int = 0) -> torch.Tensor:
    return images(count, 6, seed, torch.float64)


def silenced(model: Any, removed: dict[str, list[int]]) -> torch.Tensor:
    '''The original, where what each layer reads of removed channels is zero; by hand, without the graph.'''
    readers = {'a': model.b, 'b': model.c, 'c': model.fc}
    handles = [readers[name].register_forward_pre_hook(
        lambda _, args, at=at: args[0].index_fill(1, torch.tensor(at), 0)) for name, at in removed.items()]
    with torch.no_grad():
        result = model(x())
    for handle in handles:
        handle.remove()
    return result


pytestmark = pytest.mark.filterwarnings('ignore:the references show')


@pytest.mark.parametrize('groups', [1, 2, 4])
@pytest.mark.parametrize('name', EXACT)
def test_pruned_exactly_and_still_parametrized(name: str, groups: int) -> None:
    model = built(EXACT[name], groups)
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    graph = zp.trace(model, x())
    removed = {'a': [1, 6] if groups == 2 else [1, 2, 4, 7] if groups == 4 else [3],
               'b': [0, 5, 7, 11] if groups != 4 else [1, 3, 7, 9], 'c': [2]}
    if name == 'weight_norm of inputs' and groups > 1:  # one factor for an input of all groups
        assert 'a weight is computed from it' in graph.why('b')
        del removed['a']
    assert {group.name for group in graph.groups} == set(removed)
    plan = zp.Plan(graph, removed)
    small = plan.apply(model)
    assert apart(small(x()), silenced(model, removed)) <= 1e-12
    assert apart(plan.masked(model)(x()), silenced(model, removed)) <= 1e-12
    assert apart(model(x()), silenced(model, removed)) > 1e-3
    for layer in ('a', 'b', 'c'):
        assert type(getattr(small, layer)) is type(getattr(model, layer))
        assert parametrize.is_parametrized(getattr(small, layer))
    assert small.c.in_channels == 12 - len(removed['b']) and small.b.groups == groups
    assert unchanged(before, snapshot(model))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    costs, found = CostModel(graph), zp.cost(small, x())
    predicted = [costs(unit, costs.counts(removed)) for unit in ('params', 'flops')]
    assert predicted == pytest.approx([found.params, found.flops], rel=1e-12)
    again = zp.trace(small, x())  # and again
    assert zp.verify(small, zp.Plan(again, {'c': [0, 1]}).apply(small), zp.Plan(again, {'c': [0, 1]}), x()) <= 1e-12


def test_kernels_with_a_constraint_of_their_own_lose_whole_kernels() -> None:
    model = built(parametrizations.orthogonal)
    plan = zp.Plan(zp.trace(model, x()), {'a': [0, 3], 'b': [2]})
    small = plan.apply(model)
    assert apart(small(x()), silenced(model, {'a': [0, 3], 'b': [2]})) <= 1e-12
    weight = small.b.weight
    assert torch.allclose(weight @ weight.mT, torch.eye(3, dtype=weight.dtype).expand(11, 6, 3, 3))


def test_directions_are_sliced_and_lengths_corrected() -> None:
    model = built(parametrizations.weight_norm)
    small = zp.Plan(zp.trace(model, x()), {'a': [1, 6], 'b': [0, 4]}).apply(model)
    kept, rows = [0, 2, 3, 4, 5, 7], [1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    length, direction = model.b.parametrizations.weight.original0, model.b.parametrizations.weight.original1
    found = small.b.parametrizations.weight
    assert torch.equal(found.original1, direction[rows][:, kept])
    whole, part = (tensor[rows].flatten(1).norm(dim=1).view(-1, 1, 1, 1) for tensor in (direction, direction[:, kept]))
    torch.testing.assert_close(found.original0, length[rows] * part / whole, rtol=1e-12, atol=0)
    assert torch.equal(small.a.parametrizations.weight.original0, model.a.parametrizations.weight.original0[kept])


def test_training_goes_on_with_the_parametrization_and_the_optimizer() -> None:
    model = built(parametrizations.weight_norm)
    model.a.parametrizations.weight.original0.requires_grad_(False)
    optimizer = torch.optim.SGD([tensor for tensor in model.parameters() if tensor.requires_grad], 0.05, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x(8)), torch.arange(8) % 4).backward()
        optimizer.step()

    step()
    plan = zp.Plan(zp.trace(model, x()), {'a': [1, 6]})
    expected = silenced(model, {'a': [1, 6]})
    momentum = optimizer.state[model.b.parametrizations.weight.original1]['momentum_buffer'].clone()
    lengths = optimizer.state[model.b.parametrizations.weight.original0]['momentum_buffer'].clone()
    old = model.b.parametrizations.weight.original0
    plan.apply_(model, optimizer)
    assert apart(model(x()), expected) <= 1e-12
    found = model.b.parametrizations.weight
    kept = [0, 2, 3, 4, 5, 7]
    assert torch.equal(optimizer.state[found.original1]['momentum_buffer'], momentum[:, kept])
    assert torch.equal(optimizer.state[found.original0]['momentum_buffer'], lengths)
    assert found.original0 is not old  # a graph that is still alive keeps its tensor
    held = {id(tensor) for group in optimizer.param_groups for tensor in group['params']}
    assert held == {id(tensor) for tensor in model.parameters() if tensor.requires_grad}
    assert not model.a.parametrizations.weight.original0.requires_grad
    before = found.original0.detach().clone()
    step()
    assert parametrize.is_parametrized(model.b) and not torch.equal(found.original0, before)
    torch.testing.assert_close(model.b.weight.detach().flatten(1).norm(dim=1), found.original0.detach().flatten())


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = built(parametrizations.weight_norm, 2)
    plan = zp.Plan(zp.trace(model, x()), {'a': [1, 6], 'c': [0]})
    plan.save(tmp_path / 'plan.json')
    small = zp.Plan.load(tmp_path / 'plan.json', zp.trace(model, x())).apply(model)
    zp.save(small, plan, tmp_path / 'small.safetensors')
    fresh = Net(2).double()
    for name in 'abc':
        parametrizations.weight_norm(getattr(fresh, name))
    loaded = zp.load(fresh, tmp_path / 'small.safetensors').eval()
    assert torch.equal(loaded(x()), small(x()))
    assert [*loaded.state_dict()] == [*small.state_dict()]
    loaded.load_state_dict(small.state_dict())


@pytest.mark.parametrize('composite', [
    None, EpsilonPlus(canonizers=[NamedMergeBatchNorm([(['a'], 'norm')])])], ids=['recommended', 'merging'])
def test_scores_and_repairs_are_those_of_the_plain_network(composite: Composite | None) -> None:
    model = built(parametrizations.weight_norm, 2)
    plain = copy.deepcopy(seeded(Net(2)).double())
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if 'parametrizations' not in key}
                          | {f'{name}.weight': getattr(model, name).weight for name in 'abc'})
    data = [(x(32), torch.arange(32) % 4)]
    pruners = [zp.Pruner(network, composite, x()) for network in (model, plain)]
    for criterion in ('relevance', 'l1', 'fpgm', 'taylor', 'taylor-weights', 'wanda'):
        found, expected = (pruner.collect(data, criterion, progress=False) for pruner in pruners)
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-12)
    found, expected = (pruner.prune(data, zp.Budget(flops=0.7), progress=False).model for pruner in pruners)
    assert apart(found(x()), expected(x())) <= 1e-10
    unrepaired = pruners[0].prune(data, zp.Budget(flops=0.7), repair='none', progress=False).model
    assert apart(unrepaired(x()), expected(x())) > 1e-3
    assert parametrize.is_parametrized(found.b)


def test_in_a_loop_values_are_carried_on() -> None:
    model = built(parametrizations.weight_norm)

    def finetune(network: nn.Module) -> None:
        with torch.no_grad():
            for name, tensor in network.named_parameters():
                if name.endswith('original0'):
                    tensor.mul_(0.9)

    data = [(x(32), torch.arange(32) % 4)]
    result = zp.Pruner(model, None, x()).iterate(data, zp.Budget(flops=0.5), step=0.25, finetune=finetune,
                                                 repair='none', progress=False)
    assert len(result.history) == 3
    small = result.plan.apply(model)
    for name, times in (('a', 2), ('b', 2), ('c', 2)):
        expected = getattr(small, name).weight * 0.9 ** times
        torch.testing.assert_close(getattr(result.model, name).weight, expected, rtol=1e-12, atol=1e-14)


def test_heads_and_scales_that_are_shared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.same = nn.Linear(3, 6), parametrizations.weight_norm(nn.Linear(6, 6))
            self.head = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.same(F.relu(self.same(F.relu(self.into(x.mean((2, 3))))))))

    model: Any = seeded(Twice()).double()
    graph = zp.trace(model, x())
    assert {group.name: group.size for group in graph.groups} == {'into': 6}
    small: Any = zp.Plan(graph, {'into': [1, 4]}).apply(model)
    kept = [0, 2, 3, 5]
    with torch.no_grad():
        h = F.relu(model.into(x().mean((2, 3)))[:, kept])
        for activation in (F.relu, lambda h: h):
            h = activation(h @ model.same.weight[kept][:, kept].T + model.same.bias[kept])
        expected = h @ model.head.weight[:, kept].T + model.head.bias
    assert apart(small(x()), expected) <= 1e-12


@pytest.mark.parametrize(('register', 'reason'), [
    (parametrizations.spectral_norm, r'parametrization \(SpectralNorm\).*remove_parametrizations'),
    (lambda layer: parametrize.register_parametrization(layer, 'weight', Standard()), r'\(Standard\)'),
    (nn.utils.weight_norm, 'remove_weight_norm.*parametrizations.weight_norm'),
    (nn.utils.spectral_norm, 'remove_spectral_norm'),
], ids=['spectral_norm', 'standardised', 'hook of weight_norm', 'hook of spectral_norm'])
def test_what_cannot_be_narrowed_is_locked_by_name(register: Register, reason: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)
        model = built(register, layers='b')
    model(x()).sum().backward()  # weights made by hooks have a history now
    before = snapshot(model)
    graph = zp.trace(model, x())
    with pytest.raises(zp.PruneError, match=reason):
        zp.Plan(graph).remove('a', [0])
    small = zp.Plan(graph, {'c': [0, 4]}).apply(model)
    assert apart(small(x()), silenced(model, {'c': [0, 4]})) <= 1e-12
    assert unchanged(before, snapshot(model))


def test_without_right_inverse_filters_go_where_slices_will_do() -> None:
    model = built(lambda layer: parametrize.register_parametrization(layer, 'weight', Standard()), layers='a')
    small = zp.Plan(zp.trace(model, x()), {'a': [1, 6]}).apply(model)
    assert apart(small(x()), silenced(model, {'a': [1, 6]})) <= 1e-12


def test_values_that_cannot_be_narrowed_are_an_error() -> None:
    model = built(parametrizations.weight_norm)
    graph = zp.trace(model, x())
    with torch.no_grad():  # a filter of which nothing is left has no direction
        model.b.parametrizations.weight.original1[2, 1:] = 0
    with pytest.raises(zp.PruneError, match=r"'b\.weight' cannot be narrowed with its parametrization \(WeightNorm\)"):
        zp.Plan(graph, {'a': [0]}).apply(model)
    assert zp.Plan(graph, {'a': [3]}).apply(model).a.out_channels == 7


def test_only_a_repair_that_can_be_written_back_is_made() -> None:
    model = built(positive)
    data = [(x(64), torch.arange(64) % 4)]
    found = zp.Pruner(model, None, x()).prune(data, zp.Budget(flops=0.7), progress=False)
    plan = found.plan
    assert all((getattr(found.model, name).weight > 0).all() for name in 'abc')
    assert torch.equal(found.model.b.weight, plan.apply(model).b.weight)

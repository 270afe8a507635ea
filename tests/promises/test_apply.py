'''Applying plans, with and without an optimizer; and what pruned networks can do.'''

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import (
    Injected,
    Mixed,
    Residual,
    Tripwire,
    apart,
    chain,
    composite,
    images,
    labels,
    lived_in,
    same,
    seeded,
    snapshot,
)
from torch import nn
from torch.nn import functional as F

import zennit_prune as zp

NETS: dict[str, Callable[[], nn.Module]] = {
    'chain': chain,
    'residual': lambda: seeded(Residual()),
    'mixed': lambda: seeded(Mixed()),
}
CUTS = {
    'chain': {'0': [1, 4], '5': [0, 6], '9': [2]},
    'residual': {'stem': [0, 3], 'block1.conv1': [2], 'block2.conv1': [6, 1]},
    'mixed': {'stem': [0], 'point': [1, 3], 'left': [4, 2], 'right': [1, 6]},
}


def planned(net: str, model: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, zp.Plan]:
    model = (model or NETS[net]()).to(dtype)
    return model, zp.Plan(zp.trace(model, images(dtype=dtype)), CUTS[net])


# --- what is kept


@pytest.mark.parametrize('net', NETS)
def test_class_flags_and_types_are_kept(net: str) -> None:
    model = lived_in(NETS[net]())
    next(iter(model.parameters())).requires_grad_(False)
    _, plan = planned(net, model)
    before = snapshot(model)
    small = plan.apply(model)
    assert same(before, snapshot(model))
    assert type(small) is type(model)
    for (name, module), (other, original) in zip(small.named_modules(), model.named_modules(), strict=True):
        assert (name, type(module), module.training) == (other, type(original), original.training)
    for (name, tensor), (other, original) in zip(small.named_parameters(), model.named_parameters(), strict=True):
        assert (name, tensor.requires_grad, tensor.dtype, tensor.device) == (
            other,
            original.requires_grad,
            original.dtype,
            original.device,
        )
        assert tensor.is_leaf and tensor.grad is None
    assert list(small.state_dict()) == list(model.state_dict())
    kept = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    assert not kept & {id(tensor) for tensor in small.state_dict(keep_vars=True).values()}
    assert not {tensor.data_ptr() for tensor in model.parameters()} & {
        tensor.data_ptr() for tensor in small.parameters()
    }


def test_modules_state_the_sizes_they_have() -> None:
    model, plan = planned('mixed')
    small = plan.apply(model)
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean.shape == (module.num_features,)
        elif isinstance(module, nn.GroupNorm):
            assert module.weight.shape == (module.num_channels,)
    rebuilt = [
        nn.Conv2d(m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, groups=m.groups)
        for m in small.modules()
        if isinstance(m, nn.Conv2d)
    ]
    assert [m.weight.shape for m in rebuilt] == [m.weight.shape for m in small.modules() if isinstance(m, nn.Conv2d)]


def test_weights_are_sliced_as_by_hand() -> None:
    model, plan = planned('chain')
    small = plan.apply(model)
    kept0, kept5, kept9 = [0, 2, 3, 5], [1, 2, 3, 4, 5], [0, 1, 3, 4, 5, 6, 7, 8]
    assert torch.equal(small[0].weight, model[0].weight[kept0])
    assert torch.equal(small[2].weight, model[2].weight[:, kept0])
    assert torch.equal(small[5].bias, model[5].bias[kept5])
    assert torch.equal(small[9].weight, model[9].weight.view(9, 7, 4)[kept9][:, kept5].flatten(1))
    assert torch.equal(small[11].weight, model[11].weight[:, kept9])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('net', NETS)
def test_other_types(net: str, dtype: torch.dtype) -> None:
    model, plan = planned(net, dtype=dtype)
    small = plan.apply(model)
    assert {tensor.dtype for tensor in small.parameters()} == {dtype}
    assert (
        zp.verify(model, small, plan, images(dtype=dtype))
        <= {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-10}[dtype]
    )
    assert small(images(dtype=dtype)).dtype == dtype


@pytest.mark.parametrize('net', NETS)
def test_pruned_networks_are_ordinary_modules(net: str) -> None:
    model, plan = planned(net)
    small, x = plan.apply(model), images()
    expected = small(x)
    twin = copy.deepcopy(small)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for tensor in twin.parameters():
            tensor.zero_()
    twin.load_state_dict(small.state_dict())
    assert torch.equal(twin(x), expected)
    assert torch.equal(small(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(small))(x), expected)
    assert torch.equal(torch.export.export(small, (x,)).module()(x), expected)
    with torch.autocast('cpu', torch.bfloat16):
        assert apart(small(x).float(), expected) < 0.1
    assert small(images(7)).shape == (7, 4)


@pytest.mark.slow
def test_pruned_networks_compile() -> None:
    model, plan = planned('residual')
    small = plan.apply(model)
    assert apart(torch.compile(small)(images()), small(images())) <= 1e-5


@pytest.mark.parametrize('net', NETS)
def test_pruned_networks_are_pruned_again(net: str) -> None:
    model, plan = planned(net, dtype=torch.float64)
    x, small = images(dtype=torch.float64), plan.apply(model)
    for _ in range(2):
        pruner = zp.Pruner(small, composite(), x)
        small = pruner.plan(pruner.collect([(x, labels())], progress=False), zp.Budget(flops=0.75)).apply(small)
    assert zp.cost(small, x).flops <= 0.75**2 * zp.cost(plan.apply(model), x).flops
    assert small(x).shape == (4, 4) and torch.isfinite(zp.heatmap(small, composite(), x)).all()


# --- in place

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    'SGD': lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-3),
    'Adam': lambda parameters: torch.optim.Adam(parameters, 0.01),
    'AdamW amsgrad': lambda parameters: torch.optim.AdamW(parameters, 0.01, amsgrad=True),
    'RMSprop': lambda parameters: torch.optim.RMSprop(parameters, 0.01, momentum=0.5, centered=True),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    model.train()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images(8, seed=seed)), labels(8))
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _taken(index: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda value: value.flatten()[index]


def slices(model: nn.Module, small: nn.Module, plan: zp.Plan) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    '''How each parameter was sliced, found from a network whose weights are their own flat indices.'''
    numbered = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in numbered.parameters():
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
    flat = dict(plan.apply(numbered, verify=False).named_parameters())
    return {name: _taken(flat[name].long()) for name, _ in small.named_parameters()}


@pytest.mark.parametrize('kind', OPTIMIZERS)
@pytest.mark.parametrize('net', NETS)
def test_optimizers_go_on(net: str, kind: str) -> None:
    '''State is sliced as the parameters are, and training goes on as it would by hand.'''
    model = NETS[net]()
    groups = [{'params': list(model.parameters())[::2]}, {'params': list(model.parameters())[1::2], 'lr': 0.002}]
    optimizer = OPTIMIZERS[kind](groups)
    for seed in range(3):
        step(model, optimizer, seed)
    _, plan = planned(net, model)
    old = dict(model.named_parameters())
    states = {name: dict(optimizer.state[tensor]) for name, tensor in old.items()}
    copied = plan.apply(model)
    cut = slices(model, copied, plan)
    optimizer.zero_grad()

    assert plan.apply_(model, optimizer) is model
    by_hand = OPTIMIZERS[kind](
        [{'params': list(copied.parameters())[::2]}, {'params': list(copied.parameters())[1::2], 'lr': 0.002}]
    )
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, dict(copied.named_parameters())[name])
        found, expected = optimizer.state[tensor], {}
        for key, value in states[name].items():
            sliced = isinstance(value, torch.Tensor) and value.shape == old[name].shape and value.dim() > 0
            expected[key] = cut[name](value).clone() if sliced else copy.deepcopy(value)
            assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(expected[key])), (name, key)
        by_hand.state[dict(copied.named_parameters())[name]] = expected
    live = {id(tensor) for tensor in model.parameters()}
    assert {id(tensor) for group in optimizer.param_groups for tensor in group['params']} == live
    assert {id(tensor) for tensor in optimizer.state} == live
    assert [group['lr'] for group in optimizer.param_groups] == [group['lr'] for group in by_hand.param_groups]

    before = [tensor.detach().clone() for tensor in model.parameters()]
    losses = [(step(model, optimizer, seed), step(copied, by_hand, seed)) for seed in range(3, 7)]
    assert all(a == pytest.approx(b, rel=1e-6) for a, b in losses)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer, 8)


@pytest.mark.skipif(not hasattr(torch.optim, 'Adafactor'), reason='this torch has no Adafactor')
def test_optimizers_with_factored_state_are_refused() -> None:
    model, plan = planned('chain')
    optimizer = torch.optim.Adafactor(model.parameters())
    step(model, optimizer, 0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(zp.PruneError, match='Adafactor'):
        plan.apply_(model, optimizer)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_in_place_equals_apply() -> None:
    model, plan = planned('residual', lived_in(NETS['residual']()))
    small, modules = plan.apply(model), [id(module) for module in model.modules()]
    flags = [module.training for module in model.modules()]
    hooks = [list(module._forward_hooks.items()) for module in model.modules()]
    plan.apply_(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), small.state_dict().values(), strict=True))
    assert modules == [id(module) for module in model.modules()]
    assert flags == [module.training for module in model.modules()]
    assert hooks == [list(module._forward_hooks.items()) for module in model.modules()]
    assert [tensor.requires_grad for tensor in model.parameters()] == [
        tensor.requires_grad for tensor in small.parameters()
    ]


def test_gradients_are_narrowed_along() -> None:
    model, plan = planned('chain')
    model(images()).sum().backward()
    gradients = {name: tensor.grad.clone() for name, tensor in model.named_parameters()}
    cut = slices(model, plan.apply(model), plan)
    plan.apply_(model)
    assert all(torch.equal(tensor.grad, cut[name](gradients[name])) for name, tensor in model.named_parameters())


def test_a_live_graph_survives() -> None:
    '''A loss computed before still gives gradients to the parameters it was computed with.'''
    model, plan = planned('residual')
    old = list(model.parameters())
    loss = F.cross_entropy(model(images()), labels())
    expected = torch.autograd.grad(loss, old, retain_graph=True)
    versions = [tensor._version for tensor in old]
    plan.apply_(model)
    assert [tensor._version for tensor in old] == versions
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, old), expected))


class Trapped(Residual):
    '''A residual network that can be made to fail while a plan is applied.'''

    def __init__(self) -> None:
        super().__init__()
        self.trip = Tripwire()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trip(super().forward(x))


def _state(optimizer: torch.optim.Optimizer) -> list[Any]:
    entries: list[Any] = [[id(tensor) for group in optimizer.param_groups for tensor in group['params']]]
    for tensor, state in optimizer.state.items():
        entries.append((id(tensor), sorted(state)))
        entries += [torch.as_tensor(value).clone() for _, value in sorted(state.items())]
    return entries


@pytest.mark.parametrize('when', ['run', 'values', 'copy', 'optimizer'])
def test_nothing_changes_when_applying_in_place_fails(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(Trapped())
    optimizer = OPTIMIZERS['Adam'](model.parameters())
    step(model, optimizer, 0)
    plan = zp.Plan(zp.trace(model, images()), CUTS['residual'])
    stranger = OPTIMIZERS['Adam'](chain().parameters())
    before, state = snapshot(model), _state(optimizer)
    if when != 'optimizer':
        monkeypatch.setattr(Tripwire, 'armed', when)
    with pytest.raises((Injected, zp.PruneError)):
        plan.apply_(model, stranger if when == 'optimizer' else optimizer)
    assert same(before, snapshot(model))
    assert same(state, _state(optimizer))


def test_an_optimizer_of_some_parameters() -> None:
    '''Frozen parts are pruned with the rest.'''
    model, plan = planned('chain')
    optimizer = torch.optim.SGD(list(model[9].parameters()) + list(model[11].parameters()), 0.1, momentum=0.9)
    step(model, optimizer, 0)
    plan.apply_(model, optimizer)
    assert {id(tensor) for tensor in optimizer.param_groups[0]['params']} == {
        id(t) for i in (9, 11) for t in model[i].parameters()
    }
    step(model, optimizer, 1)


def test_tied_parameters_stay_tied() -> None:
    def tied() -> nn.Module:
        model = seeded(
            nn.Sequential(
                nn.Conv2d(3, 6, 1),
                nn.ReLU(),
                nn.Conv2d(6, 6, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(6, 6, 3, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(384, 4),
            )
        )
        model[4].weight = model[2].weight
        return model

    model, x = tied().double(), images(dtype=torch.float64)
    plan = zp.Plan(zp.trace(model, x)).remove('0', [1, 4])
    small = plan.apply(model)
    assert small[4].weight is small[2].weight and small[4].weight.shape == (4, 4, 3, 3)
    assert [small[4].in_channels, small[4].out_channels] == [4, 4]
    optimizer = OPTIMIZERS['SGD'](model.parameters())
    plan.apply_(model, optimizer)
    assert model[4].weight is model[2].weight
    assert [model[4].in_channels, model[4].out_channels] == [4, 4]
    assert torch.equal(model(x), small(x))


def test_whole_groups_of_group_norm_are_removable() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 2, 1)))
    graph = zp.trace(model, images())
    assert [group.size for group in graph.groups] == [4]
    small = zp.Plan(graph).remove('0', [1]).apply(model)
    kept = [0, 1, 4, 5, 6, 7]
    assert torch.equal(small[0].weight, model[0].weight[kept])
    assert (small[1].num_groups, small[1].num_channels) == (3, 6)


class Named(nn.Parameter):
    def __new__(cls, data: torch.Tensor, name: str) -> Named:
        return torch.Tensor._make_subclass(cls, data, True)


def test_the_layout_of_weights_and_their_class_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, groups=2), nn.Flatten(1, 2),
                          nn.Conv1d(64, 6, 3), nn.Flatten(), nn.Linear(36, 4)).to(memory_format=torch.channels_last)
    model[4].weight = Named(model[4].weight.data, 'weight')
    with torch.no_grad():
        model[6].weight.set_(model[6].weight.t().contiguous().t())
    model(images()).sum().backward()
    graph = zp.trace(model, images())
    plan = zp.Plan(graph, {group.name: [0, group.size - 1] for group in graph.groups})
    small, before = plan.apply(model), copy.deepcopy(model)
    assert small[0].weight.shape == (6, 3, 3, 3) and small[4].weight.shape[0] == 4
    plan.apply_(model)
    for network in (small, model):
        assert [network[i].weight.is_contiguous(memory_format=torch.channels_last) for i in (0, 2)] == [True, True]
        assert type(network[4].weight) is Named and isinstance(network.state_dict(), dict)
        assert network[6].weight.t().is_contiguous() and not network[6].weight.is_contiguous()
    assert before[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(('norm', 'shape'), [
    (nn.InstanceNorm2d(8), (4, 3, 6, 6)),
    (nn.InstanceNorm2d(8), (3, 6, 6)),
    (nn.BatchNorm2d(8, affine=False, track_running_stats=False), (4, 3, 6, 6))])
def test_norms_without_parameters_state_what_they_see(norm: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 2, 1)).eval(), torch.randn(shape)
    plan = zp.Plan(zp.trace(model, x), {'0': [1, 7]})
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        small = plan.apply(model)
        small(x)
    assert small[1].num_features == small[0].out_channels == 6 and model[1].num_features == 8
    zp.save(small, plan, tmp_path / 'small')
    assert zp.load(model, tmp_path / 'small')[1].num_features == 6
    assert [group.size for group in zp.trace(small, x).groups] == [6]
    assert plan.apply_(model)[1].num_features == 6


# --- verifying

LAYERS = {
    'chain': ['0', '2', '5', '9', '11'],
    'residual': ['stem', 'block1.conv1', 'block1.bn2', 'block2.conv2', 'fc'],
    'mixed': ['stem', 'depthwise', 'point', 'left', 'right', 'join', 'fc'],
}


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize(('net', 'layer'), [(net, layer) for net, layers in LAYERS.items() for layer in layers])
def test_corrupted_weights_are_found_and_named(net: str, layer: str, dtype: torch.dtype) -> None:
    model, plan = planned(net, dtype=dtype)
    small = plan.apply(model)
    assert zp.verify(model, small, plan, images(dtype=dtype)) <= {torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    with torch.no_grad():
        small.get_submodule(layer).weight[0] += 3
    with pytest.raises(zp.VerificationError, match=f"first layer that differs is '{layer}'"):
        zp.verify(model, small, plan, images(dtype=dtype))


@pytest.mark.parametrize(('dtype', 'error'), [(torch.float64, 1e-8), (torch.float32, 1e-2)])
def test_tolerance_suits_the_type(dtype: torch.dtype, error: float) -> None:
    model, plan = planned('chain', dtype=dtype)
    small = plan.apply(model)
    with torch.no_grad():
        small[11].weight.mul_(1 + error)
    with pytest.raises(zp.VerificationError, match=str(dtype)):
        zp.verify(model, small, plan, images(dtype=dtype))
    with torch.no_grad():
        small[11].weight.mul_((1 + error * 1e-4) / (1 + error))
    assert zp.verify(model, small, plan, images(dtype=dtype)) > 0


def test_networks_that_return_other_shapes_do_not_verify() -> None:
    model, plan = planned('chain')
    with pytest.raises(zp.VerificationError, match=r'\(4, 5\).*\(4, 4\)'):
        zp.verify(model, seeded(nn.Sequential(*list(chain().children())[:-1], nn.Linear(9, 5))), plan, images())


def test_weights_that_are_not_finite_do_not_verify() -> None:
    model, plan = planned('chain')
    with torch.no_grad():
        model[5].bias.fill_(float('nan'))
    with pytest.raises(zp.VerificationError, match='not finite'):
        plan.apply(model)
    assert isinstance(plan.apply(model, verify=False), nn.Sequential)


class TwoHeads(nn.Module):
    '''One stem, two outputs.'''

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 3), nn.Conv2d(6, 3, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.stem(x).relu()
        return self.first(x), self.second(x)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('layer', ['first', 'second'])
def test_a_pruned_network_that_is_not_finite_does_not_verify(layer: str, value: float) -> None:
    '''In whichever of several outputs: no comparison with a NaN is true.'''
    model = seeded(TwoHeads())
    plan = zp.Plan(zp.trace(model, images())).remove('stem', [0, 4])
    small = plan.apply(model)
    with torch.no_grad():
        small.get_submodule(layer).bias[0] = value
    with pytest.raises(zp.VerificationError, match=f"not finite.*the first layer that differs is '{layer}'"):
        zp.verify(model, small, plan, images())


def test_the_other_order_does_not_verify() -> None:
    model, plan = planned('residual')
    small = plan.apply(model)
    with pytest.raises(zp.PruneError, match=r'other order.*verify\(model, small, plan, example\): the original first'):
        zp.verify(small, model, plan, images())
    with pytest.raises(zp.PruneError, match=r'a Plan is needed, not a Tensor.*verify\(model, small, plan, example\)'):
        zp.verify(model, small, images(), plan)  # type: ignore[arg-type]


def test_verify_is_repeatable_and_quiet() -> None:
    model, plan = planned('residual')
    small = plan.apply(model)
    before = torch.get_rng_state()
    assert zp.verify(model, small, plan, images()) == zp.verify(model, small, plan, images(seed=9))
    assert torch.equal(before, torch.get_rng_state())


# --- wrapped and unsuitable networks


def test_wrapped_networks() -> None:
    model, plan = planned('residual')
    expected = plan.apply(model).state_dict()
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        assert [group.name for group in zp.trace(wrapped, images()).groups] == [
            group.name for group in plan.graph.groups
        ]
        found = plan.apply(wrapped)
        assert type(found) is Residual
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
        assert zp.cost(wrapped, images()) == zp.cost(model, images())
    wrapped = nn.DataParallel(model)
    assert plan.apply_(wrapped) is wrapped
    assert all(torch.equal(tensor, expected[name]) for name, tensor in wrapped.module.state_dict().items())


def quantized() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore:torch.quantize:UserWarning')
@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (lambda: torch.jit.script(chain()), 'scripted'),
        (lambda: torch.jit.trace(chain(), images()), 'scripted'),
        (lambda: nn.Sequential(torch.jit.script(chain())), "'0' is scripted"),
        (quantized, 'quantized'),
        (lambda: nn.Conv2d, 'type'),
        (lambda: torch.export.export(chain(), (images(),)), 'ExportedProgram'),
    ],
)
def test_networks_that_cannot_be_pruned_are_refused_by_name(build: Callable[[], Any], message: str) -> None:
    network = build()
    plan = planned('chain')[1]
    for act in (
        lambda: zp.trace(network, images()),
        lambda: zp.Pruner(network, None, images()),
        lambda: plan.apply(network),
        lambda: zp.cost(network, images()),
        lambda: zp.heatmap(network, None, images()),
    ):
        with pytest.raises(zp.PruneError, match=message):
            act()

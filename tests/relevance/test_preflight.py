'''The preflight says where relevance is created, lost or absorbed, and by what.'''

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from relevance.test_canonize import conserving
from small import Mixed, Residual, apart, chain, images, labels, lived_in, same, seeded, snapshot
from torch import nn
from torch.nn import functional as F
from zennit.composites import EpsilonPlus, LayerMapComposite, layer_map_base
from zennit.core import Composite
from zennit.layer import Sum
from zennit.rules import Epsilon, Pass, ZPlus
from zennit.types import Activation, Linear

import zennit_prune as zp
from zennit_prune.relevance._attribute import recommended_composite
from zennit_prune.relevance._initial import Origin
from zennit_prune.relevance._preflight import Preflight, preflight


def checked(
    model: nn.Module, rules: Composite | None = None, x: Any = None, target: Any = 'predicted', initial: Any = 'one-hot'
) -> Preflight:
    x = images(3) if x is None else x
    origin = Origin(target, initial, inputs=x)
    found = preflight(model, rules or recommended_composite(), zp.trace(model, x)._recording, x, origin)
    begin = found.stages[0].sum
    assert found.stages[0].name == 'output'
    for stage in found.stages:
        expected = begin - stage.absorbed + stage.conservation_error
        assert stage.sum == pytest.approx(expected, abs=1e-4 * max(1, stage.l1_norm))
        assert stage.l1_norm >= abs(stage.sum) - 1e-4 * max(1, stage.l1_norm)
    assert found.sound == (not found.problems)
    return found


class Step(nn.Module):
    '''A convolution, some step, two layers.'''

    def __init__(self, step: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 6, 3, padding=1), Inner(step)
        self.conv, self.fc = nn.Conv2d(6, 5, 3), nn.LazyLinear(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.conv(self.inner(F.softplus(self.stem(x))))).flatten(1))


class Inner(nn.Module):
    def __init__(self, step: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.step(x)


def _moves(x: torch.Tensor) -> torch.Tensor:
    shuffled = F.pixel_unshuffle(F.pixel_shuffle(F.pad(x[:, :4], (1, 1, 1, 1)), 2), 2)[..., 1:-1, 1:-1]
    return torch.cat([x[:, 4:], shuffled], 1).flip(3).roll(2, 1).movedim(2, 3)


def stepping(step: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    model = Step(step)
    model(images(3))
    return seeded(model)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    'chain': chain,
    'residual': lambda: seeded(Residual()),
    'mixed': lambda: seeded(Mixed()),
    'resnet18': lambda: seeded(torchvision.models.resnet18(num_classes=4)),
    'gated': lambda: stepping(lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True))),
    'normed': lambda: stepping(lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)),
    'moves': lambda: stepping(_moves),
    'logsumexp': lambda: stepping(lambda x: x.logsumexp(1, keepdim=True).expand(-1, 6, -1, -1)),
    'interpolated': lambda: stepping(lambda x: F.interpolate(x, scale_factor=2, mode='bilinear')),
    'interpolated, bicubic': lambda: stepping(lambda x: F.interpolate(x, size=7, mode='bicubic')),
    'chosen': lambda: stepping(lambda x: x.topk(3, 1).values.repeat(1, 2, 1, 1)),
    'sorted': lambda: stepping(lambda x: x.sort(1).values),
    'maximum': lambda: stepping(lambda x: torch.maximum(x, x.flip(1)).minimum(2 * x)),
    'in place': lambda: stepping(lambda x: x.clone().add_(1).mul_(2).sub_(x).relu_()),
}


@pytest.mark.parametrize('double', [False, True])
@pytest.mark.parametrize('name', NETWORKS)
def test_sound_networks_have_no_problems(name: str, double: bool) -> None:
    dtype = torch.float64 if double else torch.float32
    model, x = NETWORKS[name]().to(dtype), images(3, 32 if name == 'resnet18' else 8, dtype=dtype)
    found = checked(model, conserving() if double else recommended_composite(), x)
    scale = max(1.0, *(stage.l1_norm for stage in found.stages))
    assert all(abs(stage.conservation_error) <= (1e-8 if double else 1e-4) * scale for stage in found.stages)
    assert not any('unsound' in problem for problem in found.problems)
    if scale < 1e4:  # else a problem of its own
        assert found.sound and 'Relevance is sound.' in str(found)
    assert 'input' in str(found) and len(found.stages) > 2 and found.stages[-1].name == 'input'


UNSOUND: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    'cumsum': ('cumsum', lambda x: x.cumsum(2)),
    'var': ('var', lambda x: x + x.var(1, keepdim=True)),
    'product': ('prod', lambda x: 3 * x.prod(1, keepdim=True).expand(-1, 6, -1, -1)),
    'norm': ('norm', lambda x: x + x.norm(dim=1, keepdim=True) ** 2),
    'fourier': ('fft_fft2', lambda x: torch.fft.fft2(x).real),
    'fold': ('fold', lambda x: F.fold(F.unfold(x, 3), (8, 8), 3)),
}


@pytest.mark.parametrize('name', UNSOUND)
def test_operations_without_a_rule_are_named(name: str) -> None:
    function, step = UNSOUND[name]
    found = checked(stepping(step).double(), conserving(), images(3, dtype=torch.float64))
    assert not found.sound
    assert 'unsound' in found.problems[0] and f"{function} in 'inner'" in found.problems[0]
    account = next(account for account in found.accounts if account.function == function)
    assert account.module == 'inner' and account.conservation_error == pytest.approx(account.passed - account.received)
    assert abs(account.conservation_error) > 0.01


def test_without_a_rule_for_sums_additions_are_named() -> None:
    rules = LayerMapComposite([entry for entry in layer_map_base() if entry[0] is not Sum] + [(Linear, Epsilon())])
    found = checked(seeded(Residual()).double(), rules, images(3, dtype=torch.float64))
    assert not found.sound and "add in 'block" in found.problems[0] and 'created' in found.problems[0]


def test_without_rules_for_activations_they_are_named() -> None:
    rules = LayerMapComposite(
        [entry for entry in layer_map_base() if entry[0] is not Activation] + [(Linear, Epsilon())]
    )
    model = stepping(lambda x: F.gelu(x * 2))
    assert checked(model, conserving()).sound
    found = checked(model, rules)
    assert not found.sound and "gelu in 'inner'" in found.problems[0]


def test_what_layers_absorb_is_told_apart() -> None:
    '''Biases take a share by the epsilon rule; none with ``zero_params``.'''
    model, x = chain().double(), images(3, dtype=torch.float64)
    found = checked(model, None, x, labels(3))
    assert found.sound
    assert max(abs(stage.absorbed) for stage in found.stages) > 0.01
    with torch.no_grad():
        _, relevance = model(x), zp.heatmap(model, None, x, labels(3))
    assert found.stages[-1].sum == pytest.approx(float(relevance.sum()) / 3, rel=1e-6)
    absorbed = 1 - float(relevance.sum()) / 3
    assert found.stages[-1].absorbed == pytest.approx(absorbed, abs=1e-5)  # pools have stabilizers


CONSTANTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    'cat': lambda x: torch.cat([torch.ones_like(x[:, :1]).detach(), x[:, 1:]], 1),
    'token': lambda x: torch.cat([torch.ones(len(x), 1, 8, 8).to(x), x[:, 1:]], 1),
    'where': lambda x: torch.where(x > 0.7, x, torch.tensor(0.7).to(x)),
    'masked_fill': lambda x: x.masked_fill(torch.ones(8, 8).tril().bool(), 1.0),
    'pad': lambda x: F.pad(x[..., 1:], (1, 0), value=1.0),
}


@pytest.mark.parametrize('name', CONSTANTS)
def test_constants_beside_the_input_take_their_share(name: str) -> None:
    '''Class tokens, say.'''
    found = checked(stepping(CONSTANTS[name]).double(), conserving(), images(3, dtype=torch.float64))
    assert found.sound and abs(found.stages[-1].absorbed) > 1e-3


@pytest.mark.parametrize('kind', [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_named(kind: Any) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.fc = kind(3, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.rnn(x.flatten(2).mT)[0].mean(1))

    found = checked(seeded(Recurrent()).double(), conserving(), images(3, dtype=torch.float64))
    assert not found.sound and "in 'rnn'" in found.problems[0]


def test_stages_are_what_is_read_at_modules() -> None:
    model, x = chain().double(), images(3, dtype=torch.float64)
    found = checked(model, EpsilonPlus(), x, labels(3))
    read: dict[str, tuple[float, float]] = {}
    modified = copy.deepcopy(model)
    with EpsilonPlus().context(modified):
        for name in ('0', '2', '5', '9'):
            modified.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: (
                    output.register_hook(
                        lambda grad: read.__setitem__(name, (float(grad.sum()) / 3, float(grad.abs().sum()) / 3))
                    )
                    and None
                )
            )
        leaf = x.clone().requires_grad_()
        modified(leaf).backward(F.one_hot(labels(3), 4).double())
        read['input'] = float(leaf.grad.sum()) / 3, float(leaf.grad.abs().sum()) / 3
    assert [stage.name for stage in found.stages] == ['output', '10', '8', '4', '1', 'input'] or len(found.stages) > 4
    stages = {stage.name: stage for stage in found.stages}
    assert (stages['input'].sum, stages['input'].l1_norm) == pytest.approx(read['input'])
    layers = {account.module: account for account in found.accounts}
    for name in ('0', '2', '5', '9'):
        assert (layers[name].received, layers[name].received_l1) == pytest.approx(read[name])
        assert layers[name].is_layer


def test_fading_relevance_is_named() -> None:
    model = chain()
    with torch.no_grad():
        model[2].bias.fill_(10000.0)
    rules = LayerMapComposite([*layer_map_base(), (Linear, ZPlus())])
    found = checked(model, rules)
    assert not found.sound and 'fades' in found.problems[-1] and "'2'" in found.problems[-1]
    assert 'unsound' not in found.problems[0]


def test_exploding_relevance_is_named() -> None:
    '''Shares that cancel, in a layer that sums to almost nothing.'''
    model = seeded(nn.Sequential(nn.Conv2d(3, 6, 8), nn.Softplus(), nn.Flatten(), nn.Linear(6, 4))).double()
    with torch.no_grad():
        model[0].weight[3:], model[0].bias[3:] = model[0].weight[:3] * (1 + 1e-6), model[0].bias[:3]
        model[3].weight[:, 3:] = -model[3].weight[:, :3]
        model[3].bias.zero_()
    found = checked(model, conserving(), images(3, dtype=torch.float64))
    (problem,) = found.problems
    assert 'cancel' in problem and 'grows most in' in problem and "'3' (1 becomes 1)" in problem
    assert max(found.stages, key=lambda stage: stage.l1_norm).name in problem
    assert max(stage.l1_norm for stage in found.stages) > 1e4


class Dividing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(216, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        return self.fc(torch.where(x > 0, (x * 1).rsqrt(), x).sqrt().flatten(1))


def test_relevance_that_is_not_finite_is_refused_by_name() -> None:
    model = seeded(Dividing())
    with pytest.raises(zp.PruneError, match=r"not finite.*(sqrt|where).*'|not finite.*behind") as caught:
        checked(model, LayerMapComposite([(Linear, Epsilon())]))
    assert 'sqrt' in str(caught.value)


def test_a_rule_that_makes_nan_is_named() -> None:
    class Broken(Epsilon):
        def __init__(self) -> None:
            super().__init__(epsilon=lambda output: output * 0)

    model = chain()
    rules = LayerMapComposite([*layer_map_base(), (nn.Linear, Epsilon()), (Linear, Broken())])
    with pytest.raises(zp.PruneError, match="not finite any more behind '5'"):
        checked(model, rules)


def test_a_network_that_decides_nothing_is_refused() -> None:
    model = chain()
    nn.init.zeros_(model[11].weight)
    nn.init.zeros_(model[11].bias)
    with pytest.raises(zp.PruneError, match='initial relevance'):
        checked(model, initial='logit')


@pytest.mark.parametrize('initial', ['contrastive', 'softmax', 'cross-entropy', 'logit', lambda output: output**2])
def test_other_starts(initial: Any) -> None:
    found = checked(
        stepping(lambda x: x + 1).double(), conserving(), images(3, dtype=torch.float64), labels(3), initial
    )
    assert found.sound, found.problems
    cancels = initial in ('contrastive', 'softmax', 'cross-entropy')
    assert found.stages[0].sum == pytest.approx(0 if cancels else 1, abs=1e-9) and found.stages[0].l1_norm == 1
    assert found.stages[-1].sum == pytest.approx(found.stages[0].sum, abs=1e-5)


def test_numbers_are_over_the_initial_relevance() -> None:
    model, x = stepping(lambda x: x), images(3)
    one = checked(model, None, x, torch.ones_like)
    more = checked(model, None, x, lambda output: torch.full_like(output, -50))
    for left, right in zip(one.stages, more.stages):
        assert left[1:] == pytest.approx(right[1:], rel=1e-3, abs=1e-4)


class Inputs(nn.Module):
    '''Several inputs, some of which are keywords.'''

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, left: torch.Tensor, right: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        x = F.relu(self.left(left)) + F.silu(self.right(right))
        return self.fc((x if scale is None else x * scale).mean((2, 3)))


def test_tuples_and_dicts_of_inputs() -> None:
    model, x, y = seeded(Inputs()).double(), images(3, dtype=torch.float64), images(3, dtype=torch.float64, seed=1)
    forms: list[Any] = [(x, y), {'left': x, 'right': y}, {'right': y, 'left': x, 'scale': 2 * torch.ones(3, 1, 1, 1)}]
    found = [checked(model, conserving(), form) for form in forms]
    assert all(result.sound for result in found)
    for result in found[1:]:
        assert result.stages[-1].sum == pytest.approx(found[0].stages[-1].sum, abs=1e-6)
    assert found[0].stages[-1].sum == pytest.approx(1, abs=1e-6)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(11, 8), nn.Parameter(torch.zeros(5, 8))
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.position
        x = self.norm(x + self.attention(x, x, x)[0])
        return self.fc(F.gelu(x).mean(1))


def test_token_numbers() -> None:
    '''Relevance is traced back to the embeddings; what is added to them takes none.'''
    model, x = seeded(Tokens()).double(), torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0))
    found = checked(model, conserving(), x)
    embedded = next(account for account in found.accounts if account.function == 'embedding')
    assert embedded.received == pytest.approx(embedded.passed, abs=1e-6)
    added = [account for account in found.accounts if account.function == 'add']
    assert added and all(account.conservation_error == pytest.approx(0, abs=1e-6) for account in added)
    assert not any(account.module == 'norm' and abs(account.conservation_error) > 1e-6 for account in found.accounts)


class Writing(nn.Module):
    '''Writes into its input.'''

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x -= 0.5
        x.div_(2)
        return self.fc(F.relu(self.conv(x), inplace=True).mean((2, 3)))


def test_a_network_that_writes_into_its_input() -> None:
    model, x = seeded(Writing()).double(), images(3, dtype=torch.float64)
    given = x.clone()
    found = checked(model, conserving(), x)
    assert found.sound and torch.equal(x, given)
    assert found.stages[-1].sum == pytest.approx(1, abs=1e-6)
    zp.Pruner(model, None, x).collect([(x, labels(3))], progress=False)
    assert torch.equal(x, given)


def test_the_network_is_left_as_it_is() -> None:
    model, rules = lived_in(seeded(Residual())), EpsilonPlus()
    before = snapshot(model)
    checked(model, rules)
    with pytest.raises(zp.PruneError):
        checked(model, rules, target=torch.tensor([9, 9, 9]))
    assert same(before, snapshot(model))
    assert not rules.handles and not rules.canonizers


def test_the_result_does_not_depend_on_being_watched() -> None:
    '''Stages sum up to the heatmap.'''
    model, x = (
        stepping(lambda x: x * torch.sigmoid(x) + x.mean(1, keepdim=True)).double(),
        images(3, dtype=torch.float64),
    )
    for rules in (EpsilonPlus(), None, LayerMapComposite([(Activation, Pass()), (Linear, ZPlus())])):
        heatmap = zp.heatmap(model, rules, x, labels(3))
        found = checked(model, rules, x, labels(3))
        assert found.stages[-1].sum == pytest.approx(float(heatmap.sum()) / 3, rel=1e-6)
        assert apart(zp.heatmap(model, rules, x, labels(3)), heatmap) <= 1e-12


def test_a_module_called_again_has_an_account_for_each_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.act(self.conv(x))
            return self.fc((x + F.relu(self.conv(x))).mean((2, 3)))

    found = checked(seeded(Twice()).double(), conserving(), images(3, dtype=torch.float64))
    assert found.sound
    assert sum(account.module == 'conv' for account in found.accounts) == 2

'''Parts of a network that run without gradients are constants; functions with a backward of their own use it.'''

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import apart, composite, images, labels, same, seeded, snapshot
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from zennit.composites import EpsilonPlusFlat

import zennit_prune as zp
from zennit_prune.relevance import Collector

COMPOSITES = [None, EpsilonPlusFlat()]


class Base(nn.Module):
    '''Three convolutions and a classifier, of which subclasses compute parts without gradients.'''

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(width, 8, 3, padding=1) for width in (3, 8, 8))
        self.fc = nn.Linear(8, 4)
        seeded(self)

    def front(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.a(x))

    def head(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.c(F.relu(self.b(x)))).mean((2, 3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.front(x))


class Frozen(Base):
    '''A backbone under ``no_grad`` or ``inference_mode``.'''

    def __init__(self, mode: Any = torch.no_grad) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.mode():
            x = self.front(x)
        return self.head(x)


class Detached(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.front(x).detach())


class FromLeaf(Base):
    '''The head of the networks above, on an input of its own.'''

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


class Teacher(Base):
    '''Shared layers run once more as a teacher, whose output is only a target.'''

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = self.front(x.flip(-1))
        features = self.front(x)
        self.loss = F.mse_loss(features, target)
        return self.head(features)


class StraightThrough(Base):
    '''A quantizer whose gradient is that of the identity.'''

    def front(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.a(x))
        return x + (torch.round(4 * x) / 4 - x).detach()


class Codebook(Base):
    '''Vector quantization: the nearest code, found by argmin, with a straight-through gradient.'''

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.rand(16, 8, generator=torch.Generator().manual_seed(1)))

    def front(self, x: torch.Tensor) -> torch.Tensor:
        z = F.relu(self.a(x)).permute(0, 2, 3, 1)
        nearest = self.codes[(z.unsqueeze(-2) - self.codes).square().sum(-1).argmin(-1)]
        return (z + (nearest - z).detach()).permute(0, 3, 1, 2)


class Recurrent(nn.Module):
    '''A loop whose first state is the number 0 or a constant tensor.'''

    def __init__(self, number: bool) -> None:
        super().__init__()
        self.number = number
        self.into, self.state, self.out, self.fc = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 9), nn.Linear(9, 4)
        seeded(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h: Any = 0 if self.number else torch.zeros(len(x), 8, dtype=x.dtype, device=x.device)
        for step in range(3):
            h = torch.tanh(self.into(x[:, step]) + (0 if isinstance(h, int) else self.state(h)))
        return self.fc(F.relu(self.out(h)))


class Spike(torch.autograd.Function):
    '''A step with a surrogate gradient.'''

    @staticmethod
    def forward(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad / (1 + 10 * ctx.saved_tensors[0].abs()) ** 2


class Sign(torch.autograd.Function):
    '''A binarizer with the gradient of the identity.'''

    @staticmethod
    def forward(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        return v.sign()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class Swish(torch.autograd.Function):
    '''The memory-efficient form, which keeps its input only.'''

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        x, = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return grad * gate * (1 + x * (1 - gate))


class Custom(Base):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def front(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(self.a(x))


class Spiking(nn.Module):
    '''Potentials carried over time, that start as the number 0.'''

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        va: Any = 0
        vb: Any = 0
        out: Any = 0
        for step in range(x.shape[1]):
            va = 0.9 * va + self.a(x[:, step])
            spikes = Spike.apply(va - 0.1)
            va = va - spikes * 0.1
            vb = 0.9 * vb + self.b(spikes)
            fired = Spike.apply(vb - 0.1)
            vb = vb * (1 - fired)
            out = out + self.fc(fired.mean((2, 3)))
        return out


class Checkpointed(Base):
    '''Parts under activation checkpointing, with functions inside, or the same without.'''

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.more = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        seeded(self)

    def part(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.b(x)) * torch.sigmoid(x) + x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.front(x)
        if self.how == 'plain':
            x = self.more(self.part(x))
        elif self.how == 'sequential':
            x = checkpoint_sequential(self.more, 2, self.part(x), use_reentrant=True)
        else:
            x = self.more(checkpoint(self.part, x, use_reentrant=self.how == 'reentrant'))
        return self.fc(F.relu(self.c(x)).mean((2, 3)))


def collected(model: nn.Module, rules: Any = None, x: torch.Tensor | None = None, **options: Any) -> zp.Relevance:
    x = images() if x is None else x
    return zp.Pruner(model, rules, x, progress=False).collect([(x, labels())], progress=False, **options)


def found_at(model: nn.Module, x: torch.Tensor, name: str, rules: Any = None) -> torch.Tensor:
    '''The scores of the group of a layer, whether or not relevance reaches all others.'''
    graph = zp.trace(model, x, progress=False)
    with Collector(graph, model, rules) as collector:
        for quantities, share in collector._measured(zp.util._loaders.Batch(x, labels())):
            samples = collector._scores(quantities, len(share))
    return samples[name].mean(0)


@pytest.mark.parametrize('rules', COMPOSITES)
@pytest.mark.parametrize('make', [Frozen, lambda: Frozen(torch.inference_mode), Detached])
def test_layers_behind_a_constant_are_scored_as_at_an_input(make: Any, rules: Any) -> None:
    model, x = make().double(), images(dtype=torch.float64)
    head = FromLeaf().double()
    features = model.front(x).detach()
    for name in ('b', 'c'):
        expected = found_at(head, features, name)
        assert apart(found_at(model, x, name), expected) <= 1e-12
        assert expected.any()


@pytest.mark.parametrize('make', [Frozen, Detached])
def test_the_preflight_ends_at_the_layer_that_reads_a_constant(make: Any) -> None:
    found = zp.Pruner(make(), None, images(), progress=False).preflight(images())
    assert found.sound
    assert found.stages[-1].name != 'input'


@pytest.mark.parametrize('make', [Frozen, Detached])
def test_a_heatmap_behind_a_constant_says_so(make: Any) -> None:
    with pytest.raises(zp.PruneError, match=r'no relevance arrives at the input.*without gradients'):
        zp.heatmap(make(), None, images())


def test_a_network_without_any_gradient_says_so() -> None:
    class Closed(Base):
        @torch.no_grad()
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    tool = zp.Pruner(Closed(), None, images(), progress=False)
    for call in (lambda: tool.collect([(images(), labels())], progress=False), lambda: tool.preflight(images()),
                 lambda: tool.heatmap(images())):
        with pytest.raises(zp.PruneError, match=r'no relevance can be traced back.*no_grad'):
            call()


@pytest.mark.parametrize('rules', COMPOSITES)
def test_a_teacher_changes_nothing(rules: Any) -> None:
    model = Teacher()
    with_teacher, alone = collected(model, rules), collected(Base(), rules)
    assert all(torch.equal(values, alone[name]) for name, values in with_teacher.items())
    assert torch.equal(zp.heatmap(model, rules, images()), zp.heatmap(Base(), rules, images()))


@pytest.mark.parametrize('make', [StraightThrough, Codebook])
def test_a_straight_through_estimator_passes_relevance_on(make: Any) -> None:
    found = zp.Pruner(make(), None, images(), progress=False).preflight(images())
    assert found.sound
    add = next(account for account in found.accounts if account.function == 'add')
    assert add.received == pytest.approx(add.passed, rel=1e-5)
    assert add.received


@pytest.mark.parametrize('number', [True, False])
def test_a_first_state_may_be_a_constant(number: bool) -> None:
    x = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0))
    model = Recurrent(number)
    assert zp.Pruner(model, None, x, progress=False).preflight(x).sound
    assert collected(model, x=x)['out'].any()


def test_tokens_beside_an_image_are_traced_back_to_their_embedding() -> None:
    class Both(Base):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.text = nn.Embedding(11, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            text = F.relu(self.text(self.words(tokens).mean(1)))
            return self.head(self.front(x) + text[..., None, None])

    inputs = images(), torch.arange(20).reshape(4, 5) % 11
    relevance = zp.Pruner(Both(), None, inputs, progress=False).collect([(inputs, labels())], progress=False)
    assert all(values.any() for _, values in relevance.items())


# --- functions with a backward of their own
@pytest.mark.parametrize('function', [Spike, Sign, Swish])
def test_the_backward_of_a_function_gets_relevance_as_its_gradient(function: Any) -> None:
    model, x = Custom(function).double(), images(dtype=torch.float64)
    seen = []

    class Watched(function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, v: torch.Tensor) -> torch.Tensor:
            return function.forward(ctx, v)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            seen.append((grad.sum(), function.backward(ctx, grad).sum()))
            return function.backward(ctx, grad)

    model.function = Watched
    found = zp.Pruner(model, None, x, progress=False).preflight(x)
    own = next(account for account in found.accounts if 'Watched' in account.function)
    received, passed = (float(value) for value in seen[-1])
    assert own.received / own.passed == pytest.approx(received / passed)
    assert ('Watched' in ' '.join(found.problems)) == (abs(own.conservation_error) > 0.05)


def test_a_function_that_conserves_is_no_problem() -> None:
    found = zp.Pruner(Custom(Sign), None, images(), progress=False).preflight(images())
    assert not any('unsound' in problem for problem in found.problems)


@pytest.mark.filterwarnings('ignore::zennit_prune.PruneWarning')
def test_a_spiking_network_is_scored() -> None:
    x = torch.randn(4, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    relevance = collected(seeded(Spiking()), x=x)
    assert all(values.any() for _, values in relevance.items())
    problems = ' '.join(zp.Pruner(seeded(Spiking()), None, x, progress=False).preflight(x).problems)
    assert 'the backward of Spike' in problems


def test_a_backward_that_fails_is_named() -> None:
    class Stubborn(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, v: torch.Tensor) -> torch.Tensor:
            return v.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise RuntimeError('it does not require grad')

    with pytest.raises(zp.PruneError, match='backward of Stubborn does not run, perhaps because parameters are frozen'):
        collected(Custom(Stubborn))


# --- checkpointing
@pytest.mark.parametrize('rules', COMPOSITES)
@pytest.mark.parametrize('how', ['reentrant', 'not reentrant', 'sequential'])
def test_checkpointed_parts_are_scored_as_others(how: str, rules: Any) -> None:
    model, plain = Checkpointed(how), Checkpointed('plain')
    expected, found = collected(plain, rules), collected(model, rules)
    assert all(torch.equal(values, found[name]) for name, values in expected.items())
    assert torch.equal(zp.heatmap(plain, rules, images()), zp.heatmap(model, rules, images()))
    stages = [zp.Pruner(each, rules, images(), progress=False).preflight(images()).stages for each in (plain, model)]
    assert [stage[1:] for stage in stages[0]] == [stage[1:] for stage in stages[1]]


def test_training_goes_on_with_checkpointing() -> None:
    model = Checkpointed('reentrant').train()
    runs: list[bool] = []
    model.b.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    x = images().requires_grad_(True)
    with zp.Pruner(model, None, images(), progress=False).collector() as collector:
        collector.update(images(), labels())
        runs.clear()
        model(x).sum().backward()
    assert runs == [False, True]  # the second time in the backward pass


def test_threads_do_not_disturb_each_other() -> None:
    model, runs, stop = Checkpointed('reentrant').train(), [], threading.Event()
    counted: list[int] = []
    model.b.register_forward_hook(lambda *_: counted.append(1))

    def train() -> None:
        while not stop.is_set():
            counted.clear()
            model(images().requires_grad_(True)).sum().backward()
            runs.append(len(counted))

    thread = threading.Thread(target=train)
    thread.start()
    try:
        other = Checkpointed('reentrant')
        first = collected(other)
        for _ in range(3):
            assert torch.equal(collected(other)['c'], first['c'])
    finally:
        stop.set()
        thread.join()
    assert set(runs) == {2}


# --- types
class Autocast(Base):
    '''Autocast inside forward, as a block or a decorator.'''

    @torch.autocast('cpu', torch.bfloat16)
    def front(self, x: torch.Tensor) -> torch.Tensor:
        return super().front(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast('cpu', torch.bfloat16):
            return super().head(x).float()


@pytest.mark.parametrize('rules', COMPOSITES)
def test_autocast_is_off_for_relevance(rules: Any) -> None:
    expected, found = collected(Base(), rules), collected(Autocast(), rules)
    assert all(torch.equal(values, found[name]) for name, values in expected.items())
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.is_autocast_enabled('cpu')
        around = collected(Base(), rules)
        assert torch.is_autocast_enabled('cpu')
        assert torch.equal(zp.heatmap(Base(), rules, images()), zp.heatmap(Autocast(), rules, images()))
    assert all(torch.equal(values, around[name]) for name, values in expected.items())


def test_a_network_with_autocast_is_repaired_and_verified_as_one_without() -> None:
    small = [zp.prune(model, None, [(images(32), labels(32))], zp.Budget(channels=0.5), progress=False)
             for model in (Base(), Autocast())]
    states = [network.state_dict() for network in small]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_network_that_needs_autocast_is_told_so() -> None:
    class Needy(Autocast):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.front(x).bfloat16())

    with pytest.raises(zp.PruneError, match=r'without autocast, which is switched off.*\.float\(\)'):
        zp.heatmap(Needy(), None, images())


class Mismatched(torch.autograd.Function):
    '''Raises torch's own error where two types meet.'''

    @staticmethod
    def forward(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        return v.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.bfloat16() @ grad.mT


def test_a_conversion_by_hand_is_named_where_a_rule_fails() -> None:
    with pytest.raises(zp.PruneError, match='converts values to another type by hand'):
        collected(Custom(Mismatched))


def test_the_model_survives() -> None:
    for model in (Frozen(), Checkpointed('reentrant'), Autocast(), Custom(Spike)):
        before = snapshot(model)
        zp.Pruner(model, None, images(), progress=False).preflight(images())
        assert same(before, snapshot(model))


class Nothing(torch.autograd.Function):
    '''Passes nothing on to its input.'''

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> None:
        return None


class Ending(nn.Module):
    def __init__(self, beside: bool):
        super().__init__()
        self.a, self.b, self.fc, self.beside = nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 4), beside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).relu()
        return self.fc(self.b(Nothing.apply(x) + (x if self.beside else 0)).relu())


@pytest.mark.parametrize('rules', [composite, lambda: None])
def test_functions_that_pass_nothing_on(rules: Callable[[], Any]) -> None:
    x, target = torch.randn(8, 6), torch.arange(8) % 4
    pruner = zp.Pruner(seeded(Ending(False)), rules(), x[:2], progress=False)
    with pytest.warns(zp.PruneWarning, match='no relevance arrives at a: '):
        relevance = pruner.collect([(x, target)])
    assert set(relevance) == {'b'} and relevance['b'].any()
    beside = zp.Pruner(seeded(Ending(True)), rules(), x[:2], progress=False).collect([(x, target)])
    assert beside['a'].any()


class Probe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Ending(True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.body(x)
        return self.head(x)


def test_a_head_behind_a_frozen_body_says_why_nothing_is_scored() -> None:
    x = torch.randn(8, 6)
    with pytest.raises(zp.PruneError, match=r'no relevance arrives at any channel.*without gradients'):
        zp.Pruner(seeded(Probe()), None, x[:2], progress=False).collect([(x, torch.arange(8) % 3)])

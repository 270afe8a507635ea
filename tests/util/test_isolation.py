'''What surrounds a network does not matter to a trace, and a trace leaves nothing there.'''

from __future__ import annotations

import functools
import logging
import random
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import Injected, apart, chain, images, seeded
from torch import nn
from torch.nn import functional as F

import zennit_prune as zp
from zennit_prune.util import _isolation as isolation


class Helped(nn.Module):
    '''Calls a function between its layers.'''

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.between(self.second(self.between(self.first(x)))).mean((2, 3)))


# --- the compiler


@pytest.mark.parametrize('part', ['', '3'])
def test_networks_compiled_in_place_are_copied_uncompiled(part: str) -> None:
    model = nn.Sequential(*list(chain())[:3], nn.Sequential(*list(chain())[3:]))
    expected = {group.name: group.size for group in zp.trace(model, images()).groups}
    model.get_submodule(part).compile(backend='eager')
    graph = zp.trace(model, images())
    assert {group.name: group.size for group in graph.groups} == expected
    small = zp.Plan(graph, {graph.groups[0].name: [0]}).apply(model)
    small(images()).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in small.parameters())


@pytest.mark.skipif(not hasattr(torch.compiler, 'set_stance'), reason='nothing tells the compiler to wait')
def test_compiled_functions_run_as_they_are_written(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        calls.append(1)
        return graph.forward

    class Compiled(Helped):
        @torch.compile(backend=backend)
        def between(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(x)

    model = seeded(Compiled()).eval()
    with caplog.at_level(logging.WARNING):
        graph = zp.trace(model, images())
        small = zp.Plan(graph, {'first': [1]}).apply(model)
    assert not calls and not caplog.records and not graph.notes
    assert [group.name for group in graph.groups] == ['first', 'second']
    assert apart(small(images()), zp.Plan(graph, {'first': [1]}).masked(model)(images())) <= 1e-5 and calls


# --- functions that hold the network itself


class Closed(Helped):
    '''A function made when the network was made calls one of its layers.'''

    def __init__(self, mode: str):
        super().__init__()
        self.mode = mode
        self.last = nn.Conv2d(6, 6, 1)
        self.post = {'module': lambda x: self.last(x), 'parameter': lambda x: F.conv2d(x, self.last.weight)}.get(
            mode.split()[0], F.relu)
        if mode == 'hook':
            self.second.register_forward_hook(lambda _, inputs, output: self.last(output))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        return self.fc((self.post(x) if self.training or 'training' not in self.mode else x).mean((2, 3)))


@pytest.mark.parametrize('mode', ['module', 'parameter', 'hook', 'module in training'])
def test_functions_that_hold_the_network_are_named(mode: str) -> None:
    with pytest.raises(zp.PruneError, match=r"'last.weight' is used by its copies too, .* the module 'last' itself"):
        zp.trace(seeded(Closed(mode)), images())


def test_functions_that_are_given_a_layer_can_stay() -> None:
    model = seeded(Closed('none'))
    model.post = types.MethodType(lambda self, x: self.last(x), model)
    assert {'first', 'last'} <= {group.name for group in zp.trace(model, images()).groups}


# --- caches that are not the network's own

TABLES: dict[tuple[int, ...], torch.Tensor] = {}
NESTED: dict[str, dict[int, torch.Tensor]] = {'grids': {}}
LISTED: list[torch.Tensor] = []
TABLE: torch.Tensor | None = None


@functools.lru_cache(None)
def ramp(size: int, device: torch.device) -> torch.Tensor:
    return torch.linspace(0.5, 1, size, device=device)


class Caching(Helped):
    '''Multiplies with a ramp, which is made once.'''

    ramps: dict[int, torch.Tensor] = {}
    ramp: torch.Tensor | None = None

    def __init__(self, where: str):
        super().__init__()
        self.where = where

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.made(x.shape[-1], x.device)

    def made(self, size: int, device: torch.device) -> torch.Tensor:
        global TABLE
        if self.where == 'function':
            return ramp(size, device)
        if self.where == 'global':
            TABLE = ramp.__wrapped__(size, device) if TABLE is None else TABLE
            return TABLE[:size]
        if self.where == 'class attribute':
            type(self).ramp = ramp.__wrapped__(size, device) if self.ramp is None else self.ramp
            return self.ramp[:size]
        if self.where == 'list':
            LISTED.extend([ramp.__wrapped__(size, device)] if not LISTED else [])
            return LISTED[0][:size]
        table: dict[Any, Any] = {'class': self.ramps, 'table': TABLES, 'nested': NESTED['grids']}[self.where]
        if size not in table:
            table[size] = ramp.__wrapped__(size, device)
        return table[size]


@pytest.mark.parametrize('where', ['class', 'class attribute', 'global', 'table', 'nested', 'list', 'function'])
def test_caches_of_classes_and_globals_are_left_as_they_are(where: str) -> None:
    model = seeded(Caching(where))
    graph = zp.trace(model, images())
    assert [group.name for group in graph.groups] == ['first', 'second'] and not graph.notes
    zp.cost(model, images())
    assert Caching.ramp is TABLE is None and ramp.cache_info().currsize == 0
    assert not (Caching.ramps or TABLES or NESTED['grids'] or LISTED)
    small = zp.Plan(graph, {'first': [1]}).apply(model, verify=False)
    assert model(images()).shape == small(images()).shape
    del small
    try:  # once it is filled with numbers, these are used
        assert zp.trace(model, images()).groups and model(images()).isfinite().all()
    finally:
        for table in (Caching.ramps, TABLES, NESTED['grids'], LISTED):
            table.clear()
        ramp.cache_clear()
        Caching.ramp = globals()['TABLE'] = None


# --- random numbers


class Skipping(nn.Module):
    def __init__(self, draw: Callable[[], float]):
        super().__init__()
        self.conv, self.draw = nn.Conv2d(8, 8, 3, padding=1), draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.training and self.draw() < 0.5 else x + self.conv(x)


@pytest.mark.parametrize('draw', [lambda: random.random(), lambda: np.random.rand(), lambda: torch.rand(1).item()])
def test_layers_that_are_skipped_at_random(draw: Callable[[], float]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *(Skipping(draw) for _ in range(6)), nn.Conv2d(8, 4, 1)).eval()
    for seed in range(3):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        before = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
        graph = zp.trace(model, images())
        assert [group.size for group in graph.groups] == [8]
        assert any('draws random numbers when it is trained' in note for note in graph.notes)
        assert not zp.trace(nn.Sequential(model[0], nn.Dropout(0.5), model[-1]), images()).notes
        zp.Plan(graph, {'0': [0, 4]}).apply(model)
        assert before == (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())


# --- inference mode


def test_inference_mode_does_not_matter(tmp_path: Path) -> None:
    model = chain()
    expected = zp.trace(model, images())
    cut = {group.name: [0] for group in expected.groups}
    with torch.inference_mode():
        graph = zp.trace(model, images())
        plan = zp.Plan(graph, cut)
        small = plan.apply(model)
        zp.save(small, plan, tmp_path / 'small')
        found = [small, zp.load(chain(), tmp_path / 'small'), plan.masked(model), plan.apply_(model)]
    assert [group.name for group in graph.groups] == list(cut)
    for network in found:
        network(images()).sum().backward()
        assert not any(tensor.is_inference() for tensor in network.parameters())
    assert apart(found[0](images()), found[2](images())) <= 1e-5


# --- hooks

SEEN: dict[str, torch.Tensor] = {}


def remember(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
    SEEN['global'] = output


class Store:
    def __init__(self) -> None:
        self.outputs: list[torch.Tensor] = []


def test_features_that_hooks_keep_are_those_of_the_network() -> None:
    model, store, kept = chain(), Store(), {}
    model[0].register_forward_hook(lambda module, inputs, output: kept.__setitem__('closure', output))
    model[0].register_forward_hook(lambda module, inputs, output: store.outputs.append(output))
    model[0].register_forward_hook(remember)
    with torch.no_grad():
        model(images())
    before = [kept['closure'], SEEN['global'], *store.outputs]
    zp.Plan(zp.trace(model, images()), {'0': [0]}).apply(model)
    after = [kept['closure'], SEEN.pop('global'), *store.outputs]
    assert len(before) == len(after) and all(left is right for left, right in zip(before, after))


def test_hooks_that_use_values_are_named() -> None:
    def log_mean(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        print(float(output.mean()))

    model = chain()
    model[2].register_forward_hook(log_mean)
    with pytest.raises(zp.PruneError, match=r"the hook 'log_mean' of a Conv2d uses a value .* Remove the hook while"):
        zp.trace(model, images())


# --- exact passes
def methods() -> list[Any]:
    return [owner.__dict__.get(name) for owner, name, *_ in isolation._Switches.METHODS]


def test_an_exact_pass_leaves_no_trace() -> None:
    before = methods()
    with isolation.exact_pass():
        assert all(one is not other for one, other in zip(before, methods()))
        with isolation.exact_pass():
            pass
        with pytest.raises(Injected), isolation.exact_pass():
            raise Injected
        assert all(one is not other for one, other in zip(before, methods()))
    assert all(one is other for one, other in zip(before, methods()))


def test_an_exact_pass_keeps_what_others_installed_meanwhile() -> None:
    usual = torch.autocast.__dict__['__enter__']
    with isolation.exact_pass():
        ours = torch.autocast.__dict__['__enter__']
        torch.autocast.__enter__ = lambda self: ours(self)
        theirs = torch.autocast.__dict__['__enter__']
    try:
        assert torch.autocast.__dict__['__enter__'] is theirs
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.is_autocast_enabled('cpu')
    finally:
        torch.autocast.__enter__ = usual


def test_an_exact_pass_in_one_thread_only() -> None:
    seen = []

    def elsewhere() -> None:
        with torch.autocast('cpu', torch.bfloat16), torch.inference_mode():
            seen.extend([torch.is_autocast_enabled('cpu'), torch.is_inference_mode_enabled()])

    with isolation.exact_pass():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        with torch.autocast('cpu', torch.bfloat16), torch.inference_mode():
            assert not torch.is_autocast_enabled('cpu')
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled()
    assert seen == [True, True]


def test_autocast_around_an_exact_pass_comes_back() -> None:
    with torch.autocast('cpu', torch.bfloat16):
        with isolation.exact_pass():
            assert not torch.is_autocast_enabled('cpu')
            with torch.autocast('cpu', torch.float16):
                assert not torch.is_autocast_enabled('cpu')
        assert torch.is_autocast_enabled('cpu')
        assert torch.get_autocast_dtype('cpu') == torch.bfloat16
    assert not torch.is_autocast_enabled('cpu')

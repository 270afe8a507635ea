'''Run copies of a network so that random states, caches and compilation do not matter and nothing stays behind.

Random states are set from a seed for a block and restored after it. Tensors that ``forward`` or a hook keeps in
classes, globals and caches during the block are removed at its end. In an exact pass, activation checkpointing,
autocast and inference mode inside ``forward`` have no effect.
'''
from __future__ import annotations

import operator
import random
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import _lru_cache_wrapper
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import checkpoint

from ..errors import PruneError, shown
from ._networks import ATOMIC, device_of, modules_by_name, tensors_in

OWNERS = (type, ModuleType)
NAMING = (FunctionType, _lru_cache_wrapper, *OWNERS)
LARGE = 100  # entries: what holds more is data rather than a cache
FOREIGN = frozenset((*sys.stdlib_module_names, 'torch', 'numpy')) - {'__main__'}


def start(seed: int, device: torch.device) -> None:
    '''Set the random states from a seed, without restoring them.'''
    torch.default_generator.manual_seed(seed)
    if device.type == 'cuda':
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)


def states() -> tuple[object, ...]:
    '''Return the random states of Python, NumPy and torch (CPU), to compare.'''
    _, keys, position, *_ = np.random.get_state()
    return random.getstate(), np.asarray(keys).tobytes(), position, torch.get_rng_state().numpy().tobytes()


def checked_seed(seed: Any) -> int:
    '''Return a seed as a plain number; refuse what is no whole number.'''
    try:
        return operator.index(seed)
    except TypeError:
        raise PruneError(f'seed={shown(seed)} is no whole number: give e.g. 0.') from None


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    '''Let the random states of torch (CPU and ``device``), NumPy and Python start from ``seed``; restored after.'''
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
        start(seed, device)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def unrounded(device: torch.device) -> Iterator[None]:
    '''Compute float32 products on a GPU in full precision: by default, convolutions there round inputs to 11 bits.'''
    if device.type != 'cuda':
        yield
        return
    try:
        before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # set layer by layer, which these two cannot say
        with _unrounded_by_layer():
            yield
        return
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision('highest')
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


@contextmanager
def _unrounded_by_layer() -> Iterator[None]:
    backends: Any = torch.backends
    layers = backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul
    before = [layer.fp32_precision for layer in layers]
    for layer in layers:
        layer.fp32_precision = 'ieee'
    try:
        yield
    finally:
        for layer, precision in zip(layers, before):
            layer.fp32_precision = precision


TYPES = re.compile(r'dtype|scalar type|same type|BFloat16|Half\b')  # in errors of torch where two types meet
AUTOCAST = ('cpu', 'cuda')  # the devices for which autocast is switched off
_passes = threading.local()  # ``depth``: the exact passes that this thread is in; ``autocast``: whether it was used


@contextmanager
def exact_pass() -> Iterator[None]:
    '''Let networks run in this thread without activation checkpointing, autocast and inference mode.

    Checkpointed parts run once and keep their gradient history. ``torch.autocast`` changes no type, neither inside
    ``forward`` nor around the block, and ``torch.inference_mode`` inside ``forward`` is ``torch.no_grad``. Other
    threads are not affected, nor is anything that runs after the block.
    '''
    enabled = [device for device in AUTOCAST if torch.is_autocast_enabled(device)]
    _switches.install()
    _passes.depth = getattr(_passes, 'depth', 0) + 1
    _passes.autocast = bool(enabled) or (_passes.depth > 1 and _passes.autocast)
    try:
        for device in enabled:
            torch.set_autocast_enabled(device, False)
        yield
    finally:
        _passes.depth -= 1
        _switches.remove()
        for device in enabled:
            torch.set_autocast_enabled(device, True)


def misses_autocast(error: Exception) -> bool:
    '''Return whether an error inside :func:`exact_pass` says that two types met, where autocast was switched off.'''
    return bool(getattr(_passes, 'autocast', False) and TYPES.search(str(error)))


def _run_at_once(usual: Callable[..., Any], kind: type, function: Callable[..., Any], preserve: Any, *args: Any) -> Any:
    '''Run a checkpointed part (``use_reentrant=True``) like any other.'''
    return function(*args)


def _keep_tensors(usual: Callable[..., Any], hook: Any, *error: Any) -> None:
    '''Enter or leave a checkpointed part (``use_reentrant=False``) without replacing what the gradient graph keeps.'''


def _leave_types(usual: Callable[..., Any], autocast: Any) -> Any:
    '''Enter an autocast block that has no effect; its end restores what was there before.'''
    entered = usual()
    _passes.autocast |= torch.is_autocast_enabled(autocast.device)
    torch.set_autocast_enabled(autocast.device, False)
    return entered


def _without_gradients(usual: Callable[..., Any], mode: Any) -> None:
    '''Enter inference mode as ``torch.no_grad``, whose tensors can be used together with others.'''
    mode._inference_mode_context = torch.set_grad_enabled(not mode.mode)


class _Switches:
    '''Methods of torch's classes that act differently in threads inside :func:`exact_pass`, while there are any.'''

    METHODS: tuple[tuple[type, str, bool, Callable[..., Any]], ...] = (
        (checkpoint.CheckpointFunction, 'apply', True, _run_at_once),
        (checkpoint._checkpoint_hook, '__enter__', False, _keep_tensors),
        (checkpoint._checkpoint_hook, '__exit__', False, _keep_tensors),
        (torch.autocast, '__enter__', False, _leave_types),
        (torch.inference_mode, '__enter__', False, _without_gradients),
    )

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._installed: list[tuple[type, str, Any, Any]] = []

    def install(self) -> None:
        '''Install the methods, unless another pass did.'''
        with self._lock:
            self._users += 1
            if self._users == 1:
                for owner, name, of_class, instead in self.METHODS:
                    before = owner.__dict__.get(name)
                    method = _switched(owner, name, before, instead)
                    new = classmethod(method) if of_class else method
                    self._installed.append((owner, name, before, new))
                    setattr(owner, name, new)

    def remove(self) -> None:
        '''Restore torch's own methods after the last pass; what others installed meanwhile stays.'''
        with self._lock:
            self._users -= 1
            if self._users:
                return
            while self._installed:
                owner, name, before, new = self._installed.pop()
                if owner.__dict__.get(name) is not new:
                    continue
                if before is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)


def _switched(owner: type, name: str, before: Any, instead: Callable[..., Any]) -> Callable[..., Any]:
    '''Return a method that calls ``instead`` in threads inside an exact pass, and elsewhere what was there before.'''
    def method(this: Any, *args: Any) -> Any:
        of_class = isinstance(this, type)
        usual = (getattr(super(owner, this), name) if before is None
                 else before.__get__(None, this) if of_class else before.__get__(this))
        return instead(usual, this, *args) if getattr(_passes, 'depth', 0) else usual(*args)

    return method


_switches = _Switches()
_around = threading.local()


@contextmanager
def isolated(network: nn.Module) -> Iterator[None]:
    '''Let a network and its copies run without compilation, and restore random states and caches afterwards.

    Such blocks may be nested: each run within one starts from the same random numbers, and with the same caches.
    '''
    caches: Caches | None = getattr(_around, 'caches', None)
    if caches is not None:
        start(0, device_of(network))
        try:
            yield
        finally:
            caches.restore()
        return
    with uncompiled(), seeded(0, device_of(network)):
        _around.caches = caches = Caches(network)
        try:
            yield
        finally:
            _around.caches = None
            caches.restore()


def uncompiled() -> AbstractContextManager[None]:
    '''Let functions under ``torch.compile`` run as they are written; up to torch 2.5, the context does nothing.'''
    stance = getattr(torch.compiler, 'set_stance', None)
    # importing the compiler takes a second, and where it was not imported, nothing is compiled
    return nullcontext() if stance is None or 'torch._dynamo' not in sys.modules else stance('force_eager')


class Caches:
    '''The places where ``forward`` and hooks may keep tensors: classes, globals, closures and ``functools.cache``.

    Tensors that they keep during a trace have no data, or another width.

    Parameters
    ----------
    network: torch.nn.Module
        The network that is run.
    '''

    def __init__(self, network: nn.Module):
        modules = [module for _, module in modules_by_name(network)]
        hooks = [hook for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)
                 for hook in hooks.values() if isinstance(hook, FunctionType)]
        self._owners = [(owner, dict(vars(owner))) for owner in _owners(modules, hooks)]
        self._containers: list[tuple[Any, Any]] = []
        for held in (value for hook in hooks for value in _enclosed(hook)):
            held = vars(held) if hasattr(held, '__dict__') and not isinstance(held, OWNERS) else held
            if isinstance(held, (dict, list)):
                _note(held, self._containers)
        self._counts: list[tuple[Any, int]] = []
        for _, values in self._owners:
            for name, value in values.items():
                if type(value) is _lru_cache_wrapper:
                    self._counts.append((value, value.cache_info().misses))
                elif isinstance(value, (dict, list)) and name[:2] != '__':
                    _note(value, self._containers)

    def restore(self) -> None:
        '''Remove what holds tensors and was not there before.'''
        for owner, values in self._owners:
            _rebind(owner, values)
        for value, before in self._containers:
            _refill(value, before)
        for number, (value, misses) in enumerate(self._counts):
            if value.cache_info().misses != misses:
                value.cache_clear()
                self._counts[number] = value, 0


def _owners(modules: Iterable[nn.Module], hooks: Iterable[Any]) -> list[type | ModuleType]:
    '''Return the classes of all modules, the files that define these and hooks, and the files that are used there.'''
    kinds = {kind for own in set(map(type, modules)) for kind in own.__mro__ if _is_own(kind.__module__)}
    files = {maker.__module__ for maker in (*kinds, *hooks) if _is_own(maker.__module__)} & sys.modules.keys()
    used = {value.__name__ if type(value) is ModuleType else value.__module__
            for name in files for value in vars(sys.modules[name]).values() if isinstance(value, NAMING)}
    files |= {name for name in used & sys.modules.keys() if _is_own(name)}
    return [*kinds, *(sys.modules[name] for name in files)]


def _is_own(file: str) -> bool:
    return file.partition('.')[0] not in FOREIGN


def _enclosed(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is empty
            yield cell.cell_contents


def _note(value: Any, containers: list[tuple[Any, Any]], depth: int = 2) -> None:
    '''Record the contents of a container and of those in it.'''
    if len(value) <= LARGE:
        before = dict(value) if isinstance(value, dict) else list(value)
        containers.append((value, before))
        if depth and not ATOMIC.issuperset(map(type, _items(before))):
            for item in _items(before):
                if isinstance(item, (dict, list)):
                    _note(item, containers, depth - 1)


def _rebind(owner: type | ModuleType, before: dict[str, Any]) -> None:
    if not _are_same(vars(owner), before):
        for name, value in list(vars(owner).items()):
            if before.get(name) is not value and _hold_tensors([value]):
                if name in before:
                    setattr(owner, name, before[name])
                else:
                    delattr(owner, name)


def _refill(value: Any, before: Any) -> None:
    if not _are_same(value, before):
        known = set(map(id, _items(before)))
        if _hold_tensors([item for item in _items(value) if id(item) not in known]):
            value.clear()
            (value.update if isinstance(value, dict) else value.extend)(before)


def _items(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else value.values()


def _are_same(value: Any, before: Any) -> bool:
    return len(value) == len(before) and all(map(operator.is_, _items(value), _items(before)))


def _hold_tensors(values: list[Any]) -> bool:
    attributes = [vars(value) for value in values if hasattr(value, '__dict__') and not isinstance(value, OWNERS)]
    return bool(tensors_in([values, attributes]))

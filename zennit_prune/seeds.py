'''Random numbers that depend on a seed only.'''
from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def start(seed: int, device: torch.device) -> None:
    '''Set these random states for good.'''
    torch.default_generator.manual_seed(seed)
    if device.type == 'cuda':
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)


def states() -> tuple[object, ...]:
    '''The random states of Python, NumPy and torch (CPU), to compare.'''
    _, keys, position, *_ = np.random.get_state()
    return random.getstate(), np.asarray(keys).tobytes(), position, torch.get_rng_state().numpy().tobytes()


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

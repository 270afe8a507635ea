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

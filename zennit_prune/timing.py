'''Measure times side by side: medians of runs in turn, so that a machine that slows down slows all of them.'''
from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .example import Example
from .networks import device_of, map_tensors
from .verify import evaluating

SAMPLE = 2e-4  # seconds that a sample lasts at least: shorter calls are repeated within it
LEAST = 3  # rounds
SECONDS = 5.0  # for a network side by side with another

clock = time.perf_counter
Prepare = Callable[[], Callable[[], Any]]


def medians(prepared: Sequence[Prepare], device: torch.device, rounds: int = 20, seconds: float = math.inf,
            progress: str | None = None) -> list[float]:
    '''The median time of each of several calls.

    Every round takes a sample of each. One more round, the first, is for warming up.

    Parameters
    ----------
    prepared: sequence of callables
        Each makes what a call needs, which takes no time that counts, and returns the call.
    device: torch.device
        Where the calls run; a sample ends when all of its work is done there.
    rounds: int
        How many samples of each.
    seconds: float
        After so long there are no further rounds, once there were three.
    progress: str, optional
        What a progress bar on standard error says.

    Returns
    -------
    list of float
        Seconds.
    '''
    wait = getattr(torch, device.type).synchronize
    samples: list[list[float]] = [[] for _ in prepared]
    repeats = [1] * len(prepared)
    start = clock()
    with torch.no_grad(), tqdm(total=(rounds + 1) * len(prepared), desc=progress, disable=progress is None,
                               leave=False) as bar:
        for done in range(-1, rounds):
            if done >= LEAST and clock() - start > seconds:
                break
            for number, prepare in enumerate(prepared):
                call = prepare()
                call()
                wait()
                before = clock()
                for _ in range(repeats[number]):
                    call()
                wait()
                sample = (clock() - before) / repeats[number]
                if done < 0:
                    repeats[number] = max(1, math.ceil(SAMPLE / max(sample, 1e-6)))
                else:
                    samples[number].append(sample)
                bar.update()
    return [median(found) for found in samples]


def side_by_side(models: Sequence[nn.Module], example: Example, rounds: int = 30) -> list[float]:
    '''The median times of several networks on one input, measured in turn.'''
    with running(models, example) as runs:
        return medians(runs, device_of(models[0]), rounds, SECONDS)


@contextmanager
def running(models: Sequence[nn.Module], example: Example) -> Iterator[list[Prepare]]:
    '''The forward passes of several networks on one input, in evaluation mode, for :func:`medians`.'''
    device = device_of(models[0])
    args, kwargs = map_tensors(lambda tensor: tensor.to(device), replace(example, device='real').arguments())
    with evaluating(nn.ModuleList(models)):
        yield [partial(partial, model, *args, **kwargs) for model in models]


def device_name(device: torch.device) -> str:
    '''What times depend on, in words.'''
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f'{device.type}, {threads} thread{"s" * (threads > 1)}' if device.type == 'cpu' else device.type

'''Collect on several processes of ``torch.distributed`` in step, so that an error in one ends all.'''
from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import distributed

from ..errors import PruneError

END = object()


def rank_and_world() -> tuple[int, int]:
    '''Return the number of this process and the number of all; (0, 1) outside of ``torch.distributed``.'''
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gathered(value: Any, device: torch.device) -> list[Any]:
    '''Return the values of all processes, by rank, in all of them.

    Raises
    ------
    PruneError
        If another process ended.
    '''
    rank, world = rank_and_world()
    values: list[Any] = [None] * world
    try:
        with torch.cuda.device(device) if device.type == 'cuda' else nullcontext():
            distributed.all_gather_object(values, value)
    except RuntimeError as error:
        raise PruneError(f'rank {rank} of {world} lost the other processes: one was killed, ended early or does '
                         f'not collect along ({error}). Start all of them again.') from error
    return values


def in_step(steps: Iterator[None], device: torch.device) -> None:
    '''Run the steps of this process until all processes are done.

    After each step all processes exchange messages, finished ones included, so that none waits for long.

    Raises
    ------
    PruneError
        If any process fails, with its rank and error; the one that failed raises its own error.
    '''
    rank, world = rank_and_world()
    through, mine = False, None
    while True:
        try:
            through = through or next(steps, END) is END
        except Exception as error:
            mine = error
        try:
            said = gathered((through, mine and f'{type(mine).__name__}: {mine}'), device)
        finally:
            if mine is not None:
                raise mine
        for number, (_, failure) in enumerate(said):
            if failure:
                raise PruneError(f'rank {number} of {world} failed, so rank {rank} stopped, too: {failure}')
        if all(done for done, _ in said):
            return

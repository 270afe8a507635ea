'''A bar for what takes long on large networks alone: it counts modules, and is not shown in the first seconds.'''
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm

PATIENCE = 2.0  # seconds
_bar: ContextVar[Any] = ContextVar('bar', default=None)


@contextmanager
def waiting(what: str, shown: bool = True) -> Iterator[None]:
    '''Inside, :func:`advance` moves a bar on standard error.'''
    with tqdm(desc=what, unit=' modules', delay=PATIENCE, leave=False, disable=not shown) as bar:
        token = _bar.set(bar)
        try:
            yield
        finally:
            _bar.reset(token)


def advance() -> None:
    '''One more module is done.'''
    bar = _bar.get()
    if bar is not None:
        bar.update()

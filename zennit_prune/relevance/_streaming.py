'''Drive a collector over a loader: checkpoints to resume from, and shares of many processes added up.'''
from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from ..errors import PruneError, warn
from ..util._distributed import gathered, in_step, rank_and_world
from ..util._files import check_folder
from ..util._fingerprint import fingerprint
from ..util._loaders import Batch, batches
from ..util._samples import sample_list
from ._collect import Collector
from ._initial import check_target
from ._preflight import preflight
from ._relevance import Relevance
from ._sums import Selection, Sums

EVERY = 30.0  # seconds from one checkpoint to the next
CHECKED = 4  # samples


def collect(collector: Collector, loader: Iterable[Any], target: Any = None, progress: bool = True,
            checkpoint: str | os.PathLike[str] | None = None) -> Relevance:
    '''Add all batches of a loader; under ``torch.distributed``, those of all processes.

    Parameters
    ----------
    collector: Collector
        A collector that holds nothing yet.
    loader: iterable
        See :func:`zennit_prune.util._loaders.batches`.
    target: object, optional
        In place of the loader's labels.
    progress: bool
        Show a progress bar on standard error, on rank 0.
    checkpoint: path-like, optional
        A file for the sums so far; each of many processes has a file of its own beside it.

    Returns
    -------
    Relevance
        The scores; of several processes, all get the same bits.

    Raises
    ------
    PruneError
        As :meth:`Collector.update` and :meth:`Collector.compute`; for a checkpoint of something else; on all processes,
        if any of them fails.
    '''
    check_target(target, collector.initial)
    rank, world = rank_and_world()
    path = None
    if checkpoint is not None:
        path = Path(f'{os.fspath(checkpoint)}.{rank}-of-{world}' if world > 1 else checkpoint)
    with closing(_steps(collector, loader, target, progress and rank == 0, rank == 0, path, world > 1)) as steps:
        if world > 1:
            in_step(steps, collector.device)
            share(collector)
        else:
            for _ in steps:
                pass
    relevance = collector.compute()
    if path is not None:
        path.unlink(missing_ok=True)
    return relevance


def share(collector: Collector) -> None:
    '''Give the collector of every process the sums of all, added up by rank, so that they are the same bits.'''
    total = Sums()
    for settings, sums in gathered((collector.settings(), collector.sums.portable()), collector.device):
        collector.check_fits(settings, 'the collectors of the processes')
        total = total.merged(sums)
    collector.sums = total


def _steps(collector: Collector, loader: Iterable[Any], target: Any, progress: bool, checks: bool, path: Path | None,
           wait: bool) -> Generator[None, None, None]:
    '''Add the batches one by one, the first after a preflight; whatever ends it early leaves a checkpoint.'''
    def stream() -> Iterator[Batch]:
        for batch in batches(loader, collector.criterion.name if progress else None, collector.model):
            yield batch if target is None else batch.with_target(target)

    with collector:
        rest = stream()
        if path is not None:
            check_folder(path)
            if path.exists():
                _resume(collector, rest, path)
        kept, when = collector.sums, time.monotonic()
        try:
            for batch in rest:
                batch = batch.to(collector.device)
                if checks and not collector.sums.batches:
                    _check(collector, batch)
                collector.add(batch)
                if path is not None and time.monotonic() - when >= EVERY:
                    collector.save(path)
                    kept, when = collector.sums, time.monotonic()
                yield
        except BaseException:
            wait = True
            raise
        finally:  # others may fail while this process waits for them
            if path is not None and wait and collector.sums is not kept:
                collector.save(path)


def _check(collector: Collector, batch: Batch) -> None:
    '''Warn if relevance is not sound on the first samples of a batch.'''
    if not collector.holds_lrp():
        return
    samples = Selection(batch, collector.classes, True, 0)
    if samples.skipped or not len(samples.numbers):
        return
    lists = sample_list(samples.batch.inputs) is not None  # which run as they were traced
    first = samples.batch.only(slice(collector.graph._recording.example.batch if lists else CHECKED))
    try:
        found = preflight(collector.model, collector.composite, collector.graph._recording, first,
                          collector.origin(first))
    except PruneError:
        return  # the collector says what is wrong with a batch
    collector.notes += found.problems
    for problem in found.problems:
        warn(problem)


def _resume(collector: Collector, stream: Iterator[Batch], path: Path) -> None:
    '''Load a checkpoint, and pass over the batches that it holds.'''
    collector.load(path)
    remedy = f'give the same batches in the same order (seed shuffling and augmentation), or remove {str(path)!r}.'
    batch: Batch | None = None
    for number in range(collector.sums.batches):
        batch = next(stream, None)
        if batch is None:
            raise PruneError(f'{str(path)!r} holds {collector.sums.batches} batches, but the loader yields {number}: '
                             f'{remedy}')
    if collector.sums.last_batch not in (None, fingerprint(batch and tuple(batch))):
        raise PruneError(f'{str(path)!r} does not fit the loader: its batch {collector.sums.batches} was another one; '
                         f'{remedy}')

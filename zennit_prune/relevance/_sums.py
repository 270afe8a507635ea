'''Count samples and add up their scores: ``Selection``, the samples of a batch that count, and ``Sums``.

Samples count that are of the wanted classes, have a target, and hold finite values. Their scores are added up for each
group, together with the progress of the pass.
'''
from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..errors import PruneError
from ..util._files import read_tensors, write_tensors
from ..util._fingerprint import fingerprint
from ..util._loaders import Batch
from ._exemplars import Best
from ._initial import of_classes
from ._nonfinite import broken_tensor, overflow


class Selection:
    '''The samples of a batch that may count.

    Parameters
    ----------
    batch: Batch
        The batch.
    classes: sequence of int, optional
        Labels of samples that count; where only the output can tell, all are kept here.
    skip: bool
        Leave out samples that are not finite, instead of raising an error.
    seen: int
        The number of samples before this batch.

    Attributes
    ----------
    batch: Batch
        The samples that are left; zeros stand for inputs that are not finite.
    size: int
        The number of samples in the whole batch.
    numbers: torch.Tensor
        The positions in the whole batch of the samples that are left.
    skipped: int
        The number of samples left out because something was not finite.
    reason: str
        The value that was not finite, for the first of them.
    rows: torch.Tensor
        The samples left that have counted in the end.

    Raises
    ------
    PruneError
        If an input is not finite, unless ``skip``.
    '''

    def __init__(self, batch: Batch, classes: Sequence[int] | None, skip: bool, seen: int):
        self.size, self.skip, self.seen = batch.size, skip, seen
        self.skipped, self.reason = 0, ''
        self.numbers = torch.arange(self.size, device='cpu')
        self.rows = torch.zeros(0, dtype=torch.int64, device='cpu')
        wanted = of_classes(batch.target, classes)
        if wanted is not None and len(wanted) == self.size:
            self.numbers, batch = self.numbers[wanted.cpu()], batch.only(wanted)
        self._broken = ~batch.finite
        if self._broken.any():
            self._note(self._broken, 'its input holds values that are not finite (NaN or infinite): check the data')
            batch = batch.zeroed()
        self.batch = batch

    def counted(self, scores: Mapping[str, torch.Tensor], given: torch.Tensor,
                sound: torch.Tensor | None, model: nn.Module) -> dict[str, torch.Tensor]:
        '''Return the scores of the samples that have a target and are finite.

        Parameters
        ----------
        scores: mapping of str to torch.Tensor
            By group, shape (samples, channels).
        given: torch.Tensor
            Shape (samples,), bool: which samples have a target.
        sound: torch.Tensor, optional
            Shape (samples,), bool: which samples have an output without NaN.
        model: torch.nn.Module
            The network, which is asked for the reason where something is not finite.

        Returns
        -------
        dict of str to torch.Tensor
            By group, shape (samples that count, channels).
        '''
        given = given.cpu()
        if len(given) != len(self.numbers):  # the network makes other samples of its inputs
            self.numbers = torch.arange(len(given), device='cpu')
            self._broken = torch.zeros_like(given)
        finite = {name: torch.isfinite(values).all(1).cpu() for name, values in scores.items()}
        if sound is not None and len(sound) == len(given):
            finite[OUTPUT] = sound.cpu()
        wrong = given & ~torch.stack(list(finite.values())).all(0) & ~self._broken
        if wrong.any():
            self._explain(wrong, next(name for name, rows in finite.items() if not rows[wrong][0]), model)
        counted = given & ~wrong & ~self._broken
        self.rows = counted.nonzero().flatten()
        if counted.all():
            return dict(scores)
        return {name: values[counted.to(values.device)] for name, values in scores.items()}

    def _explain(self, wrong: torch.Tensor, name: str, model: nn.Module) -> None:
        '''Leave out samples whose output, or relevance of a group, is not finite, or raise, with the reason.'''
        broken = broken_tensor(model)
        if broken:  # of no use to leave samples out
            reason = f'relevance is not finite: {broken}.'
            if not self.skip:
                raise PruneError(reason)
            self.skipped, self.reason = self.skipped + int(wrong.sum()), self.reason or reason
            return
        batch = self.batch.only(wrong) if len(wrong) == self.batch.size else self.batch
        what = 'the output is not finite' if name == OUTPUT else (
            f'the relevance of group {name!r} is not finite: a rule divides by zero or overflows. Use a rule with a '
            'larger epsilon, or attribute in float32 or float64')
        self._note(wrong, overflow(model, batch.inputs) or what)

    def _note(self, wrong: torch.Tensor, what: str) -> None:
        number = int(self.numbers[wrong][0])
        reason = f'sample {self.seen + number} of the stream (number {number} of its batch): {what}'
        if not self.skip:
            raise PruneError(f"{reason}; or leave such samples out with nonfinite='skip'.")
        self.skipped += int(wrong.sum())
        self.reason = self.reason or f'{reason}.'


FORMAT = 'zennit_prune collection'
OUTPUT = ' output'  # among the names of groups, which have no space
BEST = 'best/'  # before the names of their tensors; those of groups have no slash after a plain word


@dataclass(frozen=True)
class Sums:
    '''Sums of scores over samples. Immutable: an update is atomic per batch.

    Attributes
    ----------
    halves: dict of str to torch.Tensor
        By group, shape (2, channels): the sums over the even and the odd samples.
    counts: tuple of int
        The number of samples in either half.
    seen: int
        The number of samples so far, counted or not.
    batches: int
        The number of batches so far.
    skipped: int
        The number of samples left out because something was not finite.
    reason: str
        The value that was not finite, for the first of them.
    last: object
        The last batch, or its fingerprint where these sums were read from a file.
    best: Best, optional
        The reference samples of each channel, where these are wanted.
    reached: frozenset of str
        The groups where anything but zero arrived.
    labels: frozenset of int
        Which of a few labels occurred, see :func:`zennit_prune.relevance._initial.labels_seen`.
    '''

    halves: Mapping[str, torch.Tensor] = field(default_factory=dict)
    counts: tuple[int, int] = (0, 0)
    seen: int = 0
    batches: int = 0
    skipped: int = 0
    reason: str = ''
    last: Any = None
    best: Best | None = None
    reached: frozenset[str] = frozenset()
    labels: frozenset[int] = frozenset()

    @property
    def samples(self) -> int:
        '''The number of samples counted.'''
        return sum(self.counts)

    def plus(self, values: Mapping[str, torch.Tensor], size: int, skipped: int, reason: str, batch: Any,
             best: Best | None = None, reached: Iterable[str] = (), labels: Iterable[int] = ()) -> Sums:
        '''Add a batch of ``size`` samples; ``values``, shape (samples, channels), are the scores of those that count.

        ``best`` numbers samples from the start of the batch; ``reached`` names groups where anything arrived.
        '''
        odd = self.samples % 2
        number = len(next(iter(values.values()), ()))
        halves = {name: torch.stack([rows[odd::2].sum(0), rows[1 - odd::2].sum(0)]) for name, rows in values.items()}
        return Sums(_added(self.halves, halves), (self.counts[0] + len(range(odd, number, 2)),
                                                  self.counts[1] + len(range(1 - odd, number, 2))),
                    self.seen + size, self.batches + 1, self.skipped + skipped, self.reason or reason, batch,
                    _joined(self.best, best, self.seen), self.reached.union(reached),
                    self.labels.union(labels))

    def merged(self, other: Sums) -> Sums:
        '''Add the sums of later samples.'''
        return Sums(_added(self.halves, other.halves), (self.counts[0] + other.counts[0],
                                                        self.counts[1] + other.counts[1]),
                    self.seen + other.seen, self.batches + other.batches, self.skipped + other.skipped,
                    self.reason or other.reason, best=_joined(self.best, other.best, self.seen),
                    reached=self.reached | other.reached, labels=self.labels | other.labels)

    def portable(self) -> Sums:
        '''Move the sums to the CPU and drop the last batch, to send them to another process.'''
        return replace(self, halves={name: values.cpu() for name, values in self.halves.items()}, last=None,
                       best=self.best and self.best.to('cpu'))

    def save(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        '''Write one safetensors file; it appears when it is complete.'''
        state = {'counts': self.counts, 'seen': self.seen, 'batches': self.batches, 'skipped': self.skipped,
                 'reason': self.reason, 'last': self.last_batch, 'reached': sorted(self.reached),
                 'labels': sorted(self.labels)}
        metadata = {'state': json.dumps(state), 'settings': json.dumps(settings)}
        tensors = dict(self.halves)
        if self.best is not None:
            metadata['best'] = self.best.to_json()
            tensors.update({BEST + name: values for name, values in self.best.tensors().items()})
        write_tensors(path, tensors, metadata, FORMAT)

    @property
    def last_batch(self) -> str | None:
        '''The fingerprint of the last batch.'''
        return self.last if self.last is None or isinstance(self.last, str) else fingerprint(self.last)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> tuple[Sums, dict[str, Any]]:
        '''Read the sums and the settings that :meth:`save` wrote.

        Raises
        ------
        PruneError
            If the file is something else.
        '''
        tensors, metadata = read_tensors(path, FORMAT)
        halves = {name: values for name, values in tensors.items() if not name.startswith(BEST)}
        kept = {name.removeprefix(BEST): values for name, values in tensors.items() if name.startswith(BEST)}
        best = Best.load(metadata['best'], kept, os.fspath(path)) if 'best' in metadata else None
        try:
            state = json.loads(metadata['state'])
            state['counts'] = tuple(state['counts'])
            state['reached'] = frozenset(state.get('reached', halves))
            state['labels'] = frozenset(state.get('labels', ()))
            return cls(halves, best=best, **state), json.loads(metadata['settings'])
        except (KeyError, TypeError, ValueError) as error:
            raise PruneError(f'{os.fspath(path)!r} is no {FORMAT}: its metadata are damaged ({error!r}).') from error


def _added(old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: old[name].to(new[name].device) + new[name] if name in old and name in new
            else (new if name in new else old)[name] for name in {**old, **new}}


def _joined(old: Best | None, new: Best | None, seen: int) -> Best | None:
    '''Merge the reference samples kept before with those of a batch after ``seen`` samples.'''
    if old is None or new is None:
        return old if new is None else new.numbered_from(seen)
    return old.merged(new.numbered_from(seen))

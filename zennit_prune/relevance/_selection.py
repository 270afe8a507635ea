'''``Selection``: the samples of a batch that count: those of the wanted classes with a target and finite values.'''
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..errors import PruneError
from ..util._loaders import Batch
from ._initial import of_classes


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

    def counted(self, scores: Mapping[str, torch.Tensor], given: torch.Tensor) -> dict[str, torch.Tensor]:
        '''Return the scores of the samples that have a target and are finite.

        Parameters
        ----------
        scores: mapping of str to torch.Tensor
            By group, shape (samples, channels).
        given: torch.Tensor
            Shape (samples,), bool: which samples have a target.

        Returns
        -------
        dict of str to torch.Tensor
            By group, shape (samples that count, channels).
        '''
        given = given.cpu()
        if len(given) != len(self.numbers):  # the network makes other samples of its inputs
            self.numbers = torch.arange(len(given), device='cpu')
            self._broken = torch.zeros_like(given)
        finite = torch.stack([torch.isfinite(values).all(1) for values in scores.values()]).cpu()
        wrong = given & ~finite.all(0) & ~self._broken
        if wrong.any():
            name = list(scores)[int((~finite[:, wrong][:, 0]).nonzero()[0])]
            self._note(wrong, f'the relevance of group {name!r} is not finite: a rule divides by zero or overflows. '
                              'Use a rule with a larger epsilon, or attribute in float32 or float64')
        counted = given & ~wrong & ~self._broken
        self.rows = counted.nonzero().flatten()
        if counted.all():
            return dict(scores)
        return {name: values[counted.to(values.device)] for name, values in scores.items()}

    def _note(self, wrong: torch.Tensor, what: str) -> None:
        number = int(self.numbers[wrong][0])
        reason = f'sample {self.seen + number} of the stream (number {number} of its batch): {what}'
        if not self.skip:
            raise PruneError(f"{reason}; or leave such samples out with nonfinite='skip'.")
        self.skipped += int(wrong.sum())
        self.reason = self.reason or f'{reason}.'

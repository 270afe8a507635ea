'''Which samples of a batch count: those of the wanted classes, with a target, and finite.'''
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import PruneError
from ..util._loaders import batch_size, only
from ..util._networks import map_tensors, tensors_in
from ._initial import as_labels, of_classes


class Selection:
    '''The samples of a batch that may count.

    Parameters
    ----------
    inputs, target:
        The batch.
    classes: sequence of int, optional
        Labels of samples that count; where only the output can tell, all are kept here.
    skip: bool
        Leave out what is not finite, instead of raising an error.
    seen: int
        How many samples went by before.

    Attributes
    ----------
    inputs, target:
        Those of the samples that are left; zeros stand for inputs that are not finite.
    size: int
        The number of samples in the whole batch.
    numbers: torch.Tensor
        Which of them are left.
    skipped: int
        How many were left out because something was not finite.
    reason: str
        What was not finite, for the first of them.
    rows: torch.Tensor
        Which of the samples left have counted in the end.
    '''

    def __init__(self, inputs: Any, target: Any, classes: Sequence[int] | None, skip: bool, seen: int):
        self.inputs, self.target, self.size = inputs, target, batch_size(inputs)
        self.skip, self.seen = skip, seen
        self.skipped, self.reason = 0, ''
        self.numbers = torch.arange(self.size, device='cpu')
        self.rows = torch.zeros(0, dtype=torch.int64, device='cpu')
        wanted = of_classes(target, classes)
        if wanted is not None and len(wanted) == self.size:
            self.numbers = self.numbers[wanted.cpu()]
            self.inputs, self.target = only(inputs, self.size, wanted), as_labels(target)[wanted]
        self._broken = torch.zeros(len(self.numbers), dtype=torch.bool, device='cpu')
        for tensor in tensors_in(self.inputs):
            if self._per_sample(tensor):
                self._broken |= ~torch.isfinite(tensor).reshape(len(tensor), -1).all(1).cpu()
        if self._broken.any():
            self._note(self._broken, 'its input holds values that are not finite (NaN or infinite): check the data')
            self.inputs = map_tensors(self._zeroed, self.inputs)

    def _per_sample(self, tensor: torch.Tensor) -> bool:
        return tensor.is_floating_point() and tensor.dim() > 0 and len(tensor) == len(self.numbers) > 0

    def _zeroed(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self._per_sample(tensor):
            return tensor
        broken = self._broken.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1))
        return tensor.masked_fill(broken, 0)

    def counted(self, scores: Mapping[str, torch.Tensor], given: torch.Tensor) -> dict[str, torch.Tensor]:
        '''The scores, shape (samples, channels) by group, of the samples that have a target and are finite.'''
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

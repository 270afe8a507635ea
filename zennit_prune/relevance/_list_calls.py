'''Refuse lists of samples that a network runs other calls for than those that were traced.

A network that takes a list of samples may call functions and modules once for each of them. Calls are known by their
number, so that the calls behind such a loop are others where the list has another length than the one that was traced.
'''
from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from ..errors import PruneError
from ..tracing._boundaries import Place
from ..tracing._calls import CallCounter, Frame
from ..tracing._trace import Recording
from ..util._arguments import call_network
from ..util._loaders import Batch
from ..util._networks import copied
from ..util._samples import sample_list

Calls = Counter[tuple[str, str]]  # by the module and the function, which is empty for calls of the module itself


class _Total(CallCounter):
    '''The number of calls of every module, and of every torch function in it.'''

    def __init__(self, root: nn.Module):
        super().__init__(root)
        self.calls: Calls = Counter()

    def left(self, frame: Frame, output: Any) -> None:
        self.calls[frame.module, ''] += 1
        self.calls.update({(frame.module, function): count for function, count in frame.counts.items()})


class ListCalls:
    '''The check of lists of samples for one network, made once for every length.

    Parameters
    ----------
    model: torch.nn.Module
        The network, which is copied to be run.
    recording: Recording
        The trace of the network.
    places: iterable of Place
        Where relevance is read.
    '''

    def __init__(self, model: nn.Module, recording: Recording, places: list[Place]):
        self._model, self._traced = model, recording.example.batch
        self._read = {(place.site.module, place.site.function) for place in places if place.site is not None}
        self._known = {(call.site.module, call.site.function) for call in recording.runs['eval'].functions}
        self._checked = {self._traced}

    def check(self, batch: Batch) -> None:
        '''Refuse a list of samples whose calls cannot be told from those that were traced.

        Raises
        ------
        PruneError
            With the call that depends on the number of samples, and the number that was traced.
        '''
        size = batch.size
        if sample_list(batch.inputs) is None or size in self._checked or not size:
            return
        found, traced = self._calls(batch), self._calls(batch.only(torch.arange(self._traced, device='cpu') % size))
        for key in (found | traced):
            each = (found[key] - traced[key]) / (size - self._traced)  # calls for every sample
            behind = key in self._known and traced[key] > each * self._traced
            if each and (not key[1] or key in self._read or behind):  # every call of a module has a rule of its own
                what = f'module {key[0]!r}' if not key[1] else f'{key[1].strip("_")} in {key[0] or "forward"!r}'
                raise PruneError(f'the network calls {what} once for each sample in a list, so that its calls for '
                                 f'{size} samples are not those that were traced, for {self._traced}: give lists of '
                                 f'{self._traced} samples, e.g. of a DataLoader with batch_size={self._traced} and '
                                 'drop_last=True; or let forward stack the samples and run its layers once.')
        self._checked.add(size)

    def _calls(self, batch: Batch) -> Calls:
        network = copied(self._model).eval()
        total = _Total(network)
        with torch.no_grad(), total:
            call_network(network, batch.inputs)
        return total.calls

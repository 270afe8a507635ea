'''Run networks in lockstep: each one stops where a target is computed, and goes on when the others have reached it.

A network is repaired while it runs: a layer must read what the repaired layers before it return. One forward pass is
enough for all layers if it runs in a thread that waits at every stop.
'''
from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, ExitStack
from threading import Semaphore, Thread
from typing import Any, NamedTuple

import torch
from torch import nn

from ..tracing._calls import CallCounter, Site
from ..util._arguments import call_network
from ..util._isolation import exact_pass
from ..util._networks import map_tensors, tensors_in
from ..util._samples import batch_size
from ._targets import LayerCall


class Stop(NamedTuple):
    '''The place at which a network waits.

    Attributes
    ----------
    site: Site
        The call that computed the value.
    value: torch.Tensor
        The value; the network goes on with whatever is written into it.
    calls: dict of Site to LayerCall
        The wanted calls up to here.
    '''

    site: Site
    value: torch.Tensor
    calls: dict[Site, LayerCall]


class Left(BaseException):
    '''Ends a forward pass that is not needed any more.'''


def _surroundings(inputs: Any) -> list[AbstractContextManager[Any]]:
    '''Return the default device of this thread and, on a GPU, its stream: another thread begins without them.'''
    try:
        default = torch.get_default_device()
    except AttributeError:  # of torch 2.4, where the default was set and taken back
        default = torch.device('cpu')
    found: list[AbstractContextManager[Any]] = [] if default.type == 'cpu' else [default]
    device = next((tensor.device for tensor in tensors_in(inputs)), default)
    if device.type == 'cuda':
        found.append(torch.cuda.stream(torch.cuda.current_stream(device)))
    return found


class Lockstep(CallCounter):
    '''One forward pass, from stop to stop.

    Parameters
    ----------
    network: torch.nn.Module
        The network; it runs without gradients.
    inputs: torch.Tensor, tuple, dict or list
        The inputs.
    stops: collection of Site
        The calls after which the run waits.
    wanted: collection of Site
        The calls of layers that are kept for a stop, with their inputs.
    '''

    def __init__(self, network: nn.Module, inputs: Any, stops: Collection[Site], wanted: Collection[Site] = ()):
        super().__init__(network)
        self._stops, self._wanted = stops, wanted
        self._calls_seen: dict[Site, LayerCall] = {}
        self._batch = batch_size(inputs)
        self._stop: Stop | None = None
        self._error: BaseException | None = None
        self._left = False
        self._go, self._there = Semaphore(0), Semaphore(0)
        self._around = _surroundings(inputs)
        self._thread_of_run = Thread(target=self._run, args=(network, inputs), daemon=True)
        self._started = False

    def _run(self, network: nn.Module, inputs: Any) -> None:
        try:
            with ExitStack() as stack:
                for context in (*self._around, torch.no_grad(), exact_pass(), self):
                    stack.enter_context(context)
                call_network(network, map_tensors(torch.clone, inputs))  # it may write into them
        except Left:
            pass
        except BaseException as error:
            self._error = error
        self._stop = None
        self._there.release()

    def intercept(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._left:  # and a network that catches everything went on
            raise Left
        site = self.site
        result = func(*args, **kwargs)
        if site in self._wanted:
            self._calls_seen[site] = LayerCall(site.function, args, kwargs, result, self._batch)
        if site in self._stops:
            self._stop = Stop(site, result, self._calls_seen)
            self._there.release()
            self._go.acquire()
            if self._left:
                raise Left
        return result

    def next(self) -> Stop | None:
        '''Go on to the next stop; return None at the end.'''
        self._stop = None
        if self._started:
            self._go.release()
        else:
            self._started = True
            self._thread_of_run.start()
        self._there.acquire()
        if self._error is not None:
            raise self._error
        return self._stop

    def leave(self) -> None:
        '''End the run wherever it is.'''
        self._left = True
        self._go.release()
        if self._started:
            self._thread_of_run.join()

'''Relevance by one of Zennit's Attributors, which run a network several times: the mean over its passes.'''
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from zennit.attribution import Attributor, identity

from .attribute import Reader, call_network, main_output
from .boundaries import Place
from .errors import PruneError

AttributorFactory = Callable[[nn.Module], Attributor]


class Passes(nn.Module):
    '''A network as an Attributor sees it; adds up the relevance that arrives at each place.

    Parameters
    ----------
    network: torch.nn.Module
        The network under rules.
    reader: Reader
        What catches its tensors.
    forget: callable
        Removes what the last pass left behind.
    '''

    def __init__(self, network: nn.Module, reader: Reader, forget: Callable[[], None]):
        super().__init__()
        self.network, self.reader, self.forget = network, reader, forget
        self.sums: dict[Place, torch.Tensor] = {}
        self.passes = 0

    def forward(self, inputs: Any) -> torch.Tensor:
        '''Run the network and wait for relevance to come back.'''
        self.forget()
        output = main_output(call_network(self.network, inputs))
        for place, edge in self.reader.caught.items():
            edge.node.register_prehook(partial(self._add, place, edge.output_nr))
        if output.requires_grad:
            output.register_hook(self._count)
        return output

    def _add(self, place: Place, position: int, gradients: tuple[torch.Tensor | None, ...]) -> None:
        relevance = gradients[position]
        if relevance is not None:
            relevance = relevance.detach()
            self.sums[place] = self.sums[place] + relevance if place in self.sums else relevance

    def _count(self, gradient: torch.Tensor) -> None:
        self.passes += 1

    def mean(self) -> dict[Place, torch.Tensor]:
        '''The relevance at each place that any arrived at.'''
        return {place: values / self.passes for place, values in self.sums.items()}


def attributed(factory: AttributorFactory, passes: Passes, inputs: Any,
               start: Callable[[torch.Tensor], torch.Tensor], seed: int) -> dict[Place, torch.Tensor]:
    '''The mean relevance at every place over the passes of an Attributor, whose noise depends on ``seed`` only.

    Raises
    ------
    PruneError
        If ``factory`` makes no Attributor, one with a start or rules of its own, or one that fails.
    '''
    if not isinstance(inputs, torch.Tensor):
        raise PruneError(f'an Attributor takes a single tensor, but the inputs are a {type(inputs).__name__}.')
    attributor = factory(passes)
    if not isinstance(attributor, Attributor):
        raise PruneError(f'attributor= made a {type(attributor).__name__}: give a Zennit Attributor class, or a '
                         'function from a model to an Attributor.')
    if attributor.composite is not None or attributor.attr_output_fn is not identity:
        raise PruneError('make the Attributor without composite and attr_output: the network it is given is under the '
                         'rules already, and relevance starts as initial= says.')
    try:
        with fixed_randomness(seed, inputs.device):
            attributor(inputs.detach(), start)
    except PruneError:
        raise
    except Exception as error:
        raise PruneError(f'{type(attributor).__name__} does not run on this network: {type(error).__name__}: '
                         f'{error}') from error
    return passes.mean()


@contextmanager
def fixed_randomness(seed: int, device: torch.device) -> Iterator[None]:
    '''Random numbers from ``seed``; the global random state is as before afterwards.'''
    accelerated = device.type != 'cpu'
    with torch.random.fork_rng([device] if accelerated else [], device_type=device.type if accelerated else 'cuda'):
        torch.default_generator.manual_seed(seed)
        if accelerated:
            accelerator = getattr(torch, device.type)
            with accelerator.device(device):
                accelerator.manual_seed(seed)
        yield

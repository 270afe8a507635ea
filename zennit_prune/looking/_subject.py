'''What is looked at: a network with its rules and its channels, as a pruner holds them.'''
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn
from zennit.core import Composite

from ..graph._graph import ChannelGraph
from ..relevance._preflight import Preflight


class Subject(Protocol):
    '''A network, the rules that explain it, and its removable channels: :class:`zennit_prune.Pruner` is one.'''

    model: nn.Module
    composite: Composite
    graph: ChannelGraph

    def preflight(self, x: Any, target: Any = 'predicted') -> Preflight:
        '''Whether relevance is sound on this network.'''


class Curved(Protocol):
    '''Accuracy over budget, as a sweep holds it.'''

    unit: str
    original: float

    @property
    def evaluated(self) -> str:
        '''The name of the function that evaluated.'''

    def curves(self) -> Mapping[tuple[str, str], Mapping[float, Any]]:
        '''By criterion and repair, then by budget: means over the seeds.'''

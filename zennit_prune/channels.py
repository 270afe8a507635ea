'''The channels of a network as surgery has to know them: a graph of channels, made above this room, has all of it.'''
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .labels import Labels
from .trace import Recording

Mask = npt.NDArray[np.bool_]


class Solved(Protocol):
    '''Which labels form a channel.'''

    @property
    def component(self) -> Labels:
        '''For each label, the smallest label that is tied to it.'''

    @property
    def channel(self) -> Labels:
        '''For each label, the number of its channel, or -1 where it must stay.'''

    @property
    def group(self) -> Labels:
        '''For each channel, the number of its group.'''

    @property
    def locked(self) -> Mask:
        '''For each label, whether it must stay.'''


class Reading(Protocol):
    '''What the indices of parameters do.'''

    @property
    def consumes(self) -> Mask:
        '''For each label, whether a weight reads channels there.'''


class Channels(Protocol):
    '''The removable channels of a traced network.'''

    @property
    def recording(self) -> Recording:
        '''The trace.'''

    @property
    def solution(self) -> Solved:
        '''Which labels form a channel.'''

    @property
    def roles(self) -> Reading:
        '''What the indices of parameters do.'''

    def removed_labels(self, removed: Mapping[str, Sequence[int]]) -> Mask:
        '''For each label, whether it goes when the channels at these positions of these groups go.'''

'''Find out which channels can go, which go together, which must stay, and why.

The ties and locks of a trace become channels, channels become groups, and trial removals lock what cannot be proven;
this room may import :mod:`zennit_prune.surgery` and below.
Start with ``_graph.py``, where ``trace`` puts the steps together.
'''
from ._graph import ChannelGraph, trace
from ._groups import ChannelGroup, Member

__all__ = ['ChannelGraph', 'ChannelGroup', 'Member', 'trace']

'''Prune networks by explaining them: remove the channels of least relevance, exactly.'''
from .cost import Budget, Cost, cost, latency
from .errors import PruneError, PruneWarning, VerificationError
from .graph import ChannelGraph, trace
from .groups import ChannelGroup, Member
from .plan import Plan

__all__ = ['Budget', 'ChannelGraph', 'ChannelGroup', 'Cost', 'Member', 'Plan', 'PruneError', 'PruneWarning',
           'VerificationError', 'cost', 'latency', 'trace']

'''The errors and warnings users meet; each message names the thing, the value, what is allowed and what to do.'''
from __future__ import annotations


class PruneError(ValueError):
    '''Anything that keeps a network from being pruned exactly, or an argument that cannot be honoured.'''


class VerificationError(PruneError):
    '''A pruned network does not compute what the masked original computes.'''


class PruneWarning(UserWarning):
    '''Something the user should know, although the result is still exact.'''

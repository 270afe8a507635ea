'''The errors and warnings users meet; each message names the thing, the value, what is allowed and what to do.'''
from __future__ import annotations


class PruneError(ValueError):
    '''Anything that keeps a network from being pruned exactly, or an argument that cannot be honoured.

    Its message names the thing, the value that was given, what is allowed, and what to do.

    Examples
    --------
    >>> try:
    ...     zp.Plan(graph, {'conv1': [8]})
    ... except zp.PruneError as error:
    ...     print(error)
    position 8 is out of range for group 'conv1': it has positions 0 to 7.
    '''


class VerificationError(PruneError):
    '''A pruned network does not compute what the masked original computes.

    Examples
    --------
    A pruned network that was changed afterwards no longer passes the comparison:

    >>> plan = zp.Plan(graph, {'conv1': [0, 1]})
    >>> small = plan.apply(model)
    >>> _ = nn.init.zeros_(small.conv2.weight)
    >>> try:
    ...     zp.verify(model, small, plan, example)
    ... except zp.VerificationError:
    ...     print('the networks differ')
    the networks differ
    '''


class PruneWarning(UserWarning):
    '''Something the user should know, although the result is still exact.

    Examples
    --------
    Warnings can be turned into errors, e.g. in a script that nobody watches:

    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter('error', zp.PruneWarning)
    ...     small = zp.Plan(graph, {'conv1': [0, 1]}).apply(model)
    >>> small.conv1.out_channels
    6
    '''

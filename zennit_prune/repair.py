'''A stand-in for the repair: BatchNorm re-estimation.'''
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .attribute import call_network
from .errors import PruneError
from .loaders import batches
from .networks import copied
from .plan import Plan

METHODS = ('refit', 'batchnorm', 'bias', 'none')


def repair(small: nn.Module, model: nn.Module, plan: Plan, data: Iterable[Any], method: str = 'refit',
           progress: bool = True) -> nn.Module:
    '''Re-estimate BatchNorm statistics on ``data``; returns a new network.'''
    if method not in METHODS:
        raise PruneError(f'method={method!r} is unknown: use one of {", ".join(map(repr, METHODS))}.')
    repaired = copied(small)
    norms = [module for module in repaired.modules() if isinstance(module, _BatchNorm)]
    if method == 'none' or not norms:
        return repaired
    flags = {module: (module.training, getattr(module, 'momentum', None)) for module in repaired.modules()}
    repaired.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for inputs, _ in batches(data):
            call_network(repaired, inputs)
    for module, (training, momentum) in flags.items():
        module.training = training
        if isinstance(module, _BatchNorm):
            module.momentum = momentum
    return repaired

'''``prune``: all steps in one call.'''
from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from torch import nn
from zennit.core import Composite

from .cost import Budget
from .errors import PruneError
from .loaders import batches
from .networks import device_of, map_tensors, unwrapped
from .pruner import Criterion, Pruner


def prune(model: nn.Module, composite: Composite | None, loader: Iterable[Any], budget: Budget,
          ignore: Sequence[str] = (), progress: bool = True, repair: str = 'refit',
          criterion: Criterion = 'relevance', layernorm: str = 'lock', **options: Any) -> nn.Module:
    '''Remove the channels of least relevance in one call: trace, collect, plan, apply, verify and repair.

    Parameters
    ----------
    model: torch.nn.Module
        The network; it is left as it is.
    composite: zennit.core.Composite or None
        The rules of relevance; None for the recommended ones.
    loader: iterable
        Yields (inputs, labels) batches; ten images a class are enough. A generator loses no batch.
    budget: Budget
        What is to be left, e.g. ``Budget(flops=0.5)``.
    ignore: sequence of str
        Patterns of module names whose output channels are kept.
    progress: bool
        Show progress bars on standard error.
    repair: str
        ``'none'`` leaves the weights that stay as they are; see :meth:`Pruner.prune`.
    criterion: str or callable
        Likewise, e.g. ``'auto'``.
    layernorm: str
        See :func:`trace`.
    **options:
        Further ones of :meth:`Pruner.prune`, e.g. ``target='predicted'`` for inputs without labels.

    Returns
    -------
    torch.nn.Module
        A new, smaller network of the same class.

    Raises
    ------
    PruneError
        Whatever keeps the result from being exact; nothing is changed.
    '''
    model = unwrapped(model)
    stream = batches(loader)
    first = next(stream, None)
    if first is None:
        raise PruneError('the loader is empty: there is nothing to collect relevance from.')
    example = map_tensors(lambda tensor: tensor.to(device_of(model)), first[0])
    pruner = Pruner(model, composite, example, ignore, layernorm, progress)
    return pruner.prune(chain([first], stream), budget, criterion, repair, progress=progress, **options).model

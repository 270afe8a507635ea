'''Presets: a composite and the options that belong to it.

A preset stands where a composite stands. Its composite is used, and its options become the defaults of the pruner's
methods:

>>> import torch
>>> from torch import nn
>>> import zennit_prune as zp
>>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
>>> images, labels = torch.ones(8, 3, 8, 8), torch.arange(8) % 2
>>> pruner = zp.Pruner(model, zp.presets.paper, images[:1])
>>> pruner.collect((images, labels), progress=False).info['aggregate']
'signed'
'''
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zennit.composites import LayerMapComposite, layer_map_base
from zennit.core import Composite
from zennit.rules import ZPlus
from zennit.types import Linear

from ..errors import PruneError, shown
from ..relevance._attribute import recommended_composite

__all__ = ['Preset', 'paper', 'recommended', 'zplus']


def __dir__() -> list[str]:
    return __all__


class Preset:
    '''A composite and the options that belong to it.

    It goes where a composite goes: to :class:`zennit_prune.Pruner` and :func:`zennit_prune.prune`. The options are the
    defaults of ``collect``, ``plan``, ``prune`` and ``iterate`` then, each where the method has an option of that name;
    what is given to a method explicitly wins.

    Parameters
    ----------
    composite: callable
        A function without arguments that returns the composite.
    **options: object
        Options of :meth:`Pruner.collect`, :meth:`Pruner.plan`, :meth:`Pruner.prune` and :meth:`Pruner.iterate`.

    Raises
    ------
    PruneError
        If ``composite`` is a composite, or anything else that is no function.

    Examples
    --------
    >>> import zennit_prune as zp
    >>> from zennit.composites import EpsilonPlus
    >>> zp.pipeline.Preset(EpsilonPlus, aggregate='sumabs', per_cost=False)
    Preset(EpsilonPlus, aggregate='sumabs', per_cost=False)
    '''

    def __init__(self, composite: Callable[[], Composite], **options: Any):
        if not callable(composite):
            raise PruneError(f'a preset takes a function that makes its composite, not {shown(composite)}: e.g. '
                             'Preset(EpsilonPlus), without brackets.')
        self.composite = composite
        self._options = options

    def __repr__(self) -> str:
        options = ''.join(f', {name}={value!r}' for name, value in self._options.items())
        return f'Preset({self.composite.__name__}{options})'


def zplus() -> Composite:
    '''Return a composite of z-plus (alpha 1, beta 0) on every layer, without biases.'''
    return LayerMapComposite([*layer_map_base(), (Linear, ZPlus(zero_params='bias'))])


paper = Preset(zplus, criterion='relevance', aggregate='signed', initial='one-hot', step=0.05, per_cost=False,
               repair='none')
'''For ``iterate`` with ``Budget(channels=...)``, as in Yeom et al., "Pruning by Explaining" (arXiv 1912.08881).

Relevance by z-plus starts from a one at the true class and is summed with its sign; filters are ranked over the whole
network, 5 % of them are removed in a step, and the rest is scored anew after each; ``finetune=`` is up to you. Unlike
there, filters that a residual stream couples are removed together.
'''

recommended = Preset(recommended_composite, criterion='relevance', aggregate='abs', initial='one-hot', per_cost=True,
                     repair='refit')
'''For ``prune``, whose defaults these are with ``composite=None``.

Epsilon on every layer, the absolute value of the sum over space, divided by the cost saved, all in one step, then the
refit.
'''

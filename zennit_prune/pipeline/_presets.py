'''Settings by name: a composite, and options for the method that each names.

>>> pruner = zp.Pruner(model, zp.presets.paper.composite(), example)
>>> result = pruner.iterate(loader, zp.Budget(channels=0.5), **zp.presets.paper.options)
'''
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from zennit.composites import LayerMapComposite, layer_map_base
from zennit.core import Composite
from zennit.rules import ZPlus
from zennit.types import Linear

from ..relevance._attribute import recommended_composite


@dataclass(frozen=True)
class Preset:
    '''Settings that belong together.

    Attributes
    ----------
    composite: callable
        Makes the composite for :class:`Pruner`.
    options: mapping
        Keyword arguments.
    '''

    composite: Callable[[], Composite]
    options: Mapping[str, Any]


def zplus() -> Composite:
    '''Z-plus (alpha 1, beta 0) on every layer, without biases; the graph's canonizer merges BatchNorm.'''
    return LayerMapComposite([*layer_map_base(), (Linear, ZPlus(zero_params='bias'))])


paper = Preset(zplus, {'criterion': 'relevance', 'aggregate': 'signed', 'initial': 'one-hot', 'step': 0.05,
                       'per_cost': False, 'repair': 'none'})
'''For ``iterate`` with ``Budget(channels=...)``, as in Yeom et al., "Pruning by Explaining" (arXiv 1912.08881).

Relevance by z-plus from a one at the true class, summed with its sign, ranked over the whole network, 5 % of the
filters a step, and anew after each; ``finetune=`` is up to you. Unlike there, filters that a residual stream couples go
together.
'''

recommended = Preset(recommended_composite, {'criterion': 'relevance', 'aggregate': 'abs', 'initial': 'one-hot',
                                             'per_cost': True, 'repair': 'refit'})
'''For ``prune``, whose defaults these are with ``composite=None``.

Epsilon on every layer, the absolute value of the sum over space, divided by the cost saved, all at once, then
the refit.
'''

'''Composites by name, for the command line.'''
from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from zennit.composites import COMPOSITES
from zennit.core import Composite

from .attribute import recommended_composite
from .presets import zplus

OWN = {'recommended': recommended_composite, 'zplus': zplus}
NAMES = (*OWN, *COMPOSITES)


def composite_by_name(name: str, mean: Sequence[float], std: Sequence[float]) -> Composite:
    '''A composite of Zennit's registry, ``'recommended'`` (epsilon) or ``'zplus'``.

    Parameters
    ----------
    name: str
        One of ``NAMES``.
    mean, std: sequence of float
        How images are normalised, each channel from [0, 1]: the bounds of composites with a ZBox are those of black
        and white.

    Returns
    -------
    zennit.core.Composite
    '''
    if name in OWN:
        return OWN[name]()
    low, high = (torch.tensor([(value - m) / s for m, s in zip(mean, std)]).view(1, -1, 1, 1) for value in (0, 1))
    bounds = {'low': low, 'high': high}
    make = COMPOSITES[name]
    needed = inspect.signature(make).parameters
    return make(**{key: value for key, value in bounds.items() if key in needed})

'''Make a pruned network answer like the original, without labels.

The remaining layers are fitted by least squares to the original's values on reference inputs, and held-out inputs
judge the result; this room may import :mod:`zennit_prune.planning` and below.
Start with ``_repair.py``, then ``_regression.py`` for the equations.
'''
from ._repair import repair

__all__ = ['repair']

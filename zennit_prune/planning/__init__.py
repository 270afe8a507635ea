'''Choose the channels to remove for a budget, and keep the choice as a plan.

Costs and latencies of a pruned network are computed without building it, scores are spent on a budget, and a plan is
edited, saved, tried and applied; this room may import :mod:`zennit_prune.relevance` and below.
Start with ``_plan.py``, then ``_cost.py`` and ``_allocate.py``.
'''
from ._cost import Budget, Cost, cost
from ._latency import LatencyTable, Timing, latency
from ._plan import Plan, verify
from ._risk import AtRisk, Risk
from ._storage import load, save

__all__ = ['AtRisk', 'Budget', 'Cost', 'LatencyTable', 'Plan', 'Risk', 'Timing', 'cost', 'latency', 'load', 'save',
           'verify']

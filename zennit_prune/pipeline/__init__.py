'''Take all steps in one object, at once or step by step, from a network to its pruned and repaired version.

A pruner ties the rooms below together, runs can be interrupted and resumed, and criteria and budgets are compared;
this room may import all others but :mod:`zennit_prune.cli`.
Start with ``_pruner.py``.
'''
from . import _presets as presets
from ._choose import Choice
from ._finetune import finetune
from ._presets import Preset
from ._pruner import Pruner, prune
from ._result import Result, Step
from ._sweep import Sweep, sweep

__all__ = ['Choice', 'Preset', 'Pruner', 'Result', 'Step', 'Sweep', 'finetune', 'presets', 'prune', 'sweep']

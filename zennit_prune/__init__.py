'''Prune networks by explaining them: remove the channels of least relevance, exactly.'''
from .errors import PruneError, PruneWarning, VerificationError
from .graph._graph import ChannelGraph, trace
from .graph._groups import ChannelGroup, Member
from .looking._agreement import Agreement, agreement
from .looking._heatmap import channel_heatmap, heatmap, heatmap_image
from .looking._receptive import receptive_field
from .looking._report import report
from .pipeline import _presets as presets
from .pipeline._choose import Choice
from .pipeline._finetune import finetune
from .pipeline._pruner import Pruner, prune
from .pipeline._result import Result, Step
from .pipeline._sweep import Sweep, sweep
from .planning._cost import Budget, Cost, cost
from .planning._latency import LatencyTable, latency
from .planning._plan import Plan, verify
from .planning._risk import Risk, class_losses, risky
from .planning._storage import load, save
from .relevance._canonize import GraphCanonizer
from .relevance._collect import Collector
from .relevance._exemplars import Exemplars
from .relevance._relevance import Relevance, Reliability
from .repairs._repair import repair
from .tracing._rules import register_operation

__version__ = '0.1.0'

__all__ = ['Agreement', 'Budget', 'ChannelGraph', 'ChannelGroup', 'Choice', 'Collector', 'Cost', 'Exemplars',
           'GraphCanonizer', 'LatencyTable', 'Member', 'Plan', 'PruneError', 'PruneWarning', 'Pruner', 'Relevance',
           'Reliability', 'Result', 'Risk', 'Step', 'Sweep', 'VerificationError', 'agreement', 'channel_heatmap',
           'class_losses', 'cost', 'finetune', 'heatmap', 'heatmap_image', 'latency', 'load', 'presets',
           'prune', 'receptive_field', 'register_operation', 'repair', 'report', 'risky', 'save', 'sweep', 'trace',
           'verify']

'''Prune networks by explaining them: remove the channels of least relevance, exactly.'''
from . import presets
from .agreement import Agreement, agreement
from .at_once import prune
from .canonize import GraphCanonizer
from .choose import Choice, choose
from .collect import Collector
from .conditional import channel_heatmap
from .cost import Budget, Cost, cost
from .curves import Sweep
from .errors import PruneError, PruneWarning, VerificationError
from .exemplars import Exemplars
from .finetune import finetune
from .graph import ChannelGraph, trace
from .groups import ChannelGroup, Member
from .heatmap import heatmap, heatmap_image
from .latency import LatencyTable, latency
from .plan import Plan, verify
from .pruner import Pruner
from .receptive import receptive_field
from .relevance import Relevance
from .reliability import Reliability
from .repair import repair
from .report import report
from .result import Result, Step
from .risk import Risk, class_losses, risky
from .rules import register_operation
from .storage import load, save
from .sweep import sweep

__version__ = '0.1.0'

__all__ = ['Agreement', 'Budget', 'ChannelGraph', 'ChannelGroup', 'Choice', 'Collector', 'Cost', 'Exemplars',
           'GraphCanonizer', 'LatencyTable', 'Member', 'Plan', 'PruneError', 'PruneWarning', 'Pruner', 'Relevance',
           'Reliability', 'Result', 'Risk', 'Step', 'Sweep', 'VerificationError', 'agreement', 'channel_heatmap',
           'choose', 'class_losses', 'cost', 'finetune', 'heatmap', 'heatmap_image', 'latency', 'load', 'presets',
           'prune', 'receptive_field', 'register_operation', 'repair', 'report', 'risky', 'save', 'sweep', 'trace',
           'verify']

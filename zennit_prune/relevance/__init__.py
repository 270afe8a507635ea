'''Score channels on reference samples, by LRP and by the criteria that it is compared with.

A composite is attached to a canonized copy of the network, relevance is read at the activation sites of the channels,
and scores are summed over samples; this room may import :mod:`zennit_prune.graph` and below.
Start with ``_criteria.py`` (what channels are scored by), then ``_collect.py`` (which computes it) and ``_canonize.py``
(which makes relevance sound).
'''
from ._canonize import GraphCanonizer
from ._collect import Collector
from ._criteria import CRITERIA, Criterion
from ._detections import detections
from ._exemplars import Exemplars
from ._initial import initial_relevance
from ._preflight import Preflight
from ._relevance import Relevance, Reliability

__all__ = ['CRITERIA', 'Collector', 'Criterion', 'Exemplars', 'GraphCanonizer', 'Preflight', 'Relevance', 'Reliability',
           'detections', 'initial_relevance']

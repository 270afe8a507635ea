'''See what a network sees, before and after pruning: heatmaps, agreement, and a report.

Nothing is removed here: everything is computed from a network, its rules, and a plan; this room may import
:mod:`zennit_prune.repairs` and below.
Start with ``_heatmap.py``; ``_report.py`` puts everything on one page.
'''
from ._agreement import Agreement, agreement
from ._heatmap import heatmap
from ._pictures import heatmap_image
from ._receptive import receptive_field
from ._report import report

__all__ = ['Agreement', 'agreement', 'heatmap', 'heatmap_image', 'receptive_field', 'report']

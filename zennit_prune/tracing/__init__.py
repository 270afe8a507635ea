'''Run a network once without data and record what every operation does to its channels.

A rule for each ATen operation moves labels through the network, ties labels that go together, and locks labels that
must stay; this room may import :mod:`zennit_prune.util` and below.
Start with ``_rules.py``, which says what a rule is, then read the rules for ``cat`` and ``glu`` in ``_operations.py``.
'''
from ._calls import Site
from ._labels import Field, Labels
from ._rules import Call, Candidates, NoRule, register_operation

__all__ = ['Call', 'Candidates', 'Field', 'Labels', 'NoRule', 'Site', 'register_operation']

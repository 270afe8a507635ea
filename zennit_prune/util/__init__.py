'''Helpers that know no channel and no relevance: networks, files, tables, figures, loaders, processes.

This room is the ground floor: it may import :mod:`zennit_prune.errors` and nothing else of the package.
Start with ``_networks.py``, whose functions on whole networks and nested arguments every other room uses.
'''

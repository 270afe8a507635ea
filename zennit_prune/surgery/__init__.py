'''Cut channels out of a network, and prove that what is left computes what it should.

Parameters, buffers, attributes and optimizer state are sliced here, the narrowed network is traced again and compared
with the original, and outputs are compared on noise; this room may import :mod:`zennit_prune.tracing` and below.
Start with ``_masking.py``, whose few lines define what a pruned network has to compute.
'''

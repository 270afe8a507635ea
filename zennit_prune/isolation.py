'''Run copies of a network so that nothing around them matters, and nothing of it stays.'''
from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch


def uncompiled() -> AbstractContextManager[None]:
    '''Functions under ``torch.compile`` run as they are written; up to torch 2.5 nothing can be done about them.'''
    stance = getattr(torch.compiler, 'set_stance', None)
    # importing the compiler takes a second, and where nobody has, nothing is compiled
    return nullcontext() if stance is None or 'torch._dynamo' not in sys.modules else stance('force_eager')

'''Shared by all tests.'''
import torch

torch.set_num_threads(1)  # the networks are tiny: threads cost more than they give, and results stay the same everywhere

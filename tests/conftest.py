'''Shared by all tests.'''
import torch

# the networks are tiny: threads cost more than they give
torch.set_num_threads(1)

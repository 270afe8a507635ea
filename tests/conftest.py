'''Shared by all tests.'''
from collections.abc import Iterator

import pytest
import torch

# the networks are tiny: threads cost more than they give
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    '''What a test draws does not depend on those that ran before it.'''
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield

'''Shared by all tests.'''
from collections.abc import Iterator

import pytest
import torch

# the networks are tiny: threads cost more than they give
torch.set_num_threads(1)

DEVICES = ('cpu', *['cuda'] * torch.cuda.is_available())


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    '''Every device there is; a test that asks for it is marked ``device``.'''
    return torch.device(request.param)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    '''Mark what runs on every device.'''
    for item in items:
        if 'device' in getattr(item, 'fixturenames', ()):
            item.add_marker('device')


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    '''What a test draws does not depend on those that ran before it.'''
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield

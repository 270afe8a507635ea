'''Unknown names are answered with the nearest known one.'''
from __future__ import annotations

import pytest

import zennit_prune as zp
from zennit_prune.errors import nearest, unknown


@pytest.mark.parametrize('value, expected', [
    ('sum_abs', "; did you mean 'sumabs'?"), ('ABS', "; did you mean 'abs'?"), ('magic', ''), (None, ''), (3, ''),
])
def test_the_nearest_name(value: object, expected: str) -> None:
    assert nearest(value, ('abs', 'sumabs', 'signed')) == expected
    assert nearest(value, iter(('abs', 'sumabs', 'signed'))) == expected


def test_the_error_says_what_was_given_what_is_allowed_and_what_is_near() -> None:
    error = unknown('aggregate', 'sum_abs', iter(('abs', 'sumabs')))
    assert isinstance(error, zp.PruneError)
    assert str(error) == "aggregate='sum_abs' is unknown: use one of 'abs', 'sumabs'; did you mean 'sumabs'?"
    assert str(unknown('initial', 7, ('one-hot',), ' or a function')) == (
        "initial=7 is unknown: use one of 'one-hot' or a function.")

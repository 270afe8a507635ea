'''Components of ties, against the plainest way to find them.'''
from __future__ import annotations

import numpy as np
import pytest

from zennit_prune.tracing._labels import Labels, every, joined, same, varies, varying_dims


def plainly(count: int, ties: list[tuple[Labels, Labels]]) -> list[int]:
    '''Spread the smaller label along every tie until nothing changes.'''
    component = list(range(count))
    pairs = [(int(a), int(b)) for left, right in ties for a, b in zip(*map(np.ravel, np.broadcast_arrays(left, right)))]
    changed = True
    while changed:
        changed = False
        for a, b in pairs:
            if a and b and component[a] != component[b]:
                component[a] = component[b] = min(component[a], component[b])
                changed = True
    return component


def some_ties(rng: np.random.Generator, count: int) -> list[tuple[Labels, Labels]]:
    ties: list[tuple[Labels, Labels]] = []
    for kind in rng.integers(5, size=rng.integers(8)).tolist():
        length = int(rng.integers(1, 8))
        if kind == 0:
            ties.append((rng.integers(count, size=length), rng.integers(count, size=length)))
        elif kind == 1:  # a ring
            labels = rng.permutation(count)[:length]
            ties.append((labels, np.roll(labels, 1)))
        elif kind == 2:  # one to many
            ties.append((rng.permutation(count)[:length].reshape(-1, 1), rng.integers(count, size=(1, 2))))
        elif kind == 3:
            labels = rng.permutation(count)[:length]
            ties.append((labels, labels[:1]))
        else:
            ties.append((np.arange(count)[:length], rng.permutation(count)[:length]))
    return ties


@pytest.mark.parametrize('seed', range(300))
def test_components_are_those_that_ties_connect(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 30))
    ties = some_ties(rng, count)
    want = plainly(count, ties)
    assert joined(np.arange(count), ties).tolist() == want
    half = len(ties) // 2
    assert joined(joined(np.arange(count), ties[:half]), ties[half:]).tolist() == want


def test_components_that_came_before_are_left_alone() -> None:
    before = np.arange(5)
    assert joined(before, [(np.array([1, 3]), np.array([2, 4]))]).tolist() == [0, 1, 1, 3, 3]
    assert before.tolist() == [0, 1, 2, 3, 4]


def test_arrays_are_the_same_where_shape_and_labels_are() -> None:
    labels = np.arange(6)
    assert same(labels, labels.copy()) and same(labels.reshape(2, 3).T, labels.reshape(2, 3).T.copy())
    assert not same(labels, labels.reshape(1, 6)) and not same(labels, labels[::-1])
    assert every(labels >= 0) and not every(labels > 0) and every(labels[:0] > 0)


def test_labels_vary_also_between_ends_that_are_equal() -> None:
    around = np.array([[1, 2, 1], [1, 2, 1]])
    assert varying_dims(around) == (1,) and not varies(around, 0) and varies(around, 1)
    assert varying_dims(np.broadcast_to(around[:, None], (2, 4, 3))) == (2,)
    assert varying_dims(np.array([[1, 1], [1, 2]])) == (0, 1)

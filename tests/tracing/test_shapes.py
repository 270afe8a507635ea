'''What is worked out for meta tensors is what torch returns.'''
from __future__ import annotations

from typing import Any

import pytest
import torch

from zennit_prune.tracing._shapes import FORMULAS, Shapes, described_call, is_regular

aten = torch.ops.aten
X, W = (2, 6, 5, 7), (4, 3, 3, 3)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device='meta')


def kind(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return tuple(result.shape), result.stride(), result.dtype, result.device.type
    return type(result), *map(kind, result)


def made(shapes: Shapes, func: Any, args: Any, **kwargs: Any) -> Any:
    return shapes(func, args, kwargs, described_call(func, args, kwargs, []))


CASES = [
    (aten.convolution.default, (meta(*X), meta(*W), None, [2, 1], [1, 0], [1, 2], False, [0, 0], 2)),
    (aten.convolution.default, (meta(*X), meta(6, 4, 3, 3), meta(4), [2, 2], [1, 1], [1, 1], True, [0, 0], 1)),
    (aten.convolution.default, (meta(2, 6, 9), meta(4, 6, 3), None, [1], [0], [1], False, [0], 1)),
    (aten.native_layer_norm.default, (meta(2, 3, 4, 5), [4, 5], meta(4, 5), meta(4, 5), 1e-5)),
    (aten.native_layer_norm.default, (meta(2, 3, 4, 5), [5], None, None, 1e-5)),
    (aten.native_batch_norm.default, (meta(*X), meta(6), meta(6), meta(6), meta(6), True, 0.1, 1e-5)),
    (aten.addmm.default, (meta(5), meta(3, 4), meta(5, 4).t())),
    (aten.addmm.default, (meta(3, 1), meta(3, 4), meta(4, 5))),
    (aten.mean.dim, (meta(*X), [-1, -2], True)),
    (aten.mean.dim, (meta(*X), [1])),
    (aten.mean.dim, (meta(*X), None, True)),
    (aten.mean.default, (meta(*X),)),
    (aten.cat.default, ([meta(*X), meta(2, 1, 5, 7)], 1)),
    (aten.cat.default, ([meta(*X), meta(*X)], -1)),
    (aten.cat.default, ([meta(0), meta(2, 3)], 0)),
    (aten.mul.Tensor, (meta(*X), meta(2, 6, 1, 1))),
    (aten.mul.Tensor, (meta(*X), meta(7))),
    (aten.add.Tensor, (meta(*X), meta(*X, dtype=torch.float64))),
    (aten.add.Tensor, (meta(*X, dtype=torch.int64), 1)),
    (aten.add.Tensor, (meta(*X, dtype=torch.int64), 1.0)),
    (aten.add_.Tensor, (meta(*X), meta(2, 6, 1, 1))),
    (aten.div.Tensor, (meta(3, 2).t(), meta(2, 3))),
    (aten.relu.default, (meta(2, 6, 5, 7).to(memory_format=torch.channels_last),)),
    (aten.sigmoid.default, (meta(4, dtype=torch.int64),)),
    (aten.var_mean.correction, (meta(*X), [1])),
]


@pytest.mark.parametrize(('func', 'args'), CASES, ids=lambda value: str(value) if hasattr(value, '_schema') else '')
def test_the_first_and_the_later_results_are_what_torch_returns(func: Any, args: Any) -> None:
    in_place, shapes = func._opname.endswith('_'), Shapes()
    assert is_regular(func, in_place)
    want = kind(func(*args))
    for _ in range(2):
        result = made(shapes, func, args)
        assert kind(result) == want
        assert (result is args[0]) == in_place


def test_cases_differ_where_types_of_numbers_do() -> None:
    shapes, x = Shapes(), meta(3, dtype=torch.int64)
    assert [made(shapes, aten.add.Tensor, (x, number)).dtype for number in (1, 1.0, 1, True)] == [
        torch.int64, torch.float32, torch.int64, torch.int64]


@pytest.mark.parametrize(('func', 'args'), [
    (aten.convolution.default, (meta(*X), meta(4, 6, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 2)),
    (aten.convolution.default, (meta(*X), meta(4, 6, 9, 9), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)),
    (aten.addmm.default, (meta(5), meta(3, 4), meta(3, 5))),
    (aten.cat.default, ([meta(2, 3), meta(3, 4)], 0)),
    (aten.mul.Tensor, (meta(2, 3), meta(2, 4))),
    (aten.add_.Tensor, (meta(2, 1), meta(2, 4))),
    (aten.native_layer_norm.default, (meta(2, 5), [4], None, None, 1e-5)),
    (aten.mean.dim, (meta(2, 5), [2])),
], ids=lambda value: str(value) if hasattr(value, '_schema') else '')
def test_what_torch_refuses_is_refused(func: Any, args: Any) -> None:
    shapes = Shapes()
    for _ in range(2):
        with pytest.raises((RuntimeError, IndexError)):
            made(shapes, func, args)


def test_views_factories_and_reshaping_writes_are_left_alone() -> None:
    for func in (aten.view.default, aten.t.default, aten.zeros.default, aten.t_.default, aten.resize_.default):
        assert not is_regular(func, False)
    assert not is_regular(aten.relu_.default, False)
    assert is_regular(aten.relu_.default, True)


def test_constants_are_made_where_they_were_asked_for() -> None:
    shapes = Shapes()
    assert is_regular(aten.zeros.default, False, constant=True)
    for _ in range(2):
        for device in ('meta', 'cpu', 'meta'):
            result = made(shapes, aten.zeros.default, ([2, 3],), dtype=torch.float64, device=torch.device(device))
            assert (result.device.type, result.dtype, result.shape) == (device, torch.float64, (2, 3))
    assert made(shapes, aten.zeros.default, ([2, 3],)).device.type == 'cpu'


def test_what_a_call_is_known_by_holds_its_tensors() -> None:
    x, y, found = meta(2, 3), meta(2, 1), []
    key = described_call(aten.add.Tensor, (x, y), {'alpha': 2}, found)
    assert [id(tensor) for tensor in found] == [id(x), id(y)]
    assert key == described_call(aten.add.Tensor, (meta(2, 3), meta(2, 1)), {'alpha': 2}, [])
    assert key != described_call(aten.add.Tensor, (x, y), {'alpha': 2.0}, [])
    assert key != described_call(aten.add.Tensor, (x.half(), y), {'alpha': 2}, [])
    assert key != described_call(aten.add.Tensor, (meta(3, 2).t(), y), {'alpha': 2}, [])
    found.clear()
    assert described_call(aten.cat.default, ([x, torch.ones(2, 3)],), {}, found) is None and len(found) == 2


def test_every_formula_is_tested() -> None:
    tested = {func._opname for func, _ in CASES}
    assert {name for name in FORMULAS if FORMULAS[name].__name__ != '_elementwise'} <= tested


def test_tensors_with_values_are_computed() -> None:
    shapes, x = Shapes(), torch.ones(3)
    assert torch.equal(made(shapes, aten.add.Tensor, (x, 1)), x + 1)
    assert torch.equal(made(shapes, aten.add.Tensor, (x, 1)), x + 1)
    assert torch.equal(made(shapes, aten.mul.Tensor, (x, x + 1)), x + 1)

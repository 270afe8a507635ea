'''What becomes of relevance at single operations, against formulas worked out by hand.'''

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import apart, seeded
from torch import nn
from torch.nn import functional as F
from zennit.composites import EpsilonPlus, LayerMapComposite, layer_map_base
from zennit.core import Composite
from zennit.layer import Sum
from zennit.rules import Epsilon, Norm, Pass
from zennit.types import Activation, AvgPool, BatchNorm, Linear

import zennit_prune as zp

EPSILON = 1e-6


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stable(values: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    return values + epsilon * torch.where(values >= 0, 1.0, -1.0)


class Operation(nn.Module):
    '''A network that does one thing to its inputs.'''

    def __init__(self, function: Callable[..., torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)


def epsilons(canonizer: Any = None) -> Composite:
    return LayerMapComposite([*layer_map_base(EPSILON), (Linear, Epsilon(EPSILON))], canonizer and [canonizer])


def through(
    model: nn.Module, relevance: torch.Tensor, *inputs: torch.Tensor, rules: Any = epsilons
) -> list[torch.Tensor]:
    '''The relevance that arrives at each input.'''
    with torch.no_grad():
        plain = model(*(x.clone() for x in inputs))
    canonizer = zp.GraphCanonizer(model, tuple(inputs))
    leaves = [x.clone().requires_grad_() for x in inputs]
    with rules(canonizer).context(model) as modified:
        output = modified(*(leaf * 1 for leaf in leaves))
        assert apart(output, plain) <= 1e-12
        found = torch.autograd.grad(output, leaves, relevance, allow_unused=True)
    return [torch.zeros_like(x) if values is None else values for x, values in zip(inputs, found)]


def operation(
    function: Callable[..., torch.Tensor], relevance: torch.Tensor, *inputs: torch.Tensor
) -> list[torch.Tensor]:
    return through(Operation(function), relevance, *inputs)


A, B, R = noise(3, 4, seed=1), noise(3, 4, seed=2), noise(3, 4, seed=3)


def test_sum_splits_by_what_is_added() -> None:
    left, right = operation(lambda a, b: a + b, R, A, B)
    assert apart(left, A * R / stable(A + B)) <= 1e-12 and apart(right, B * R / stable(A + B)) <= 1e-12


def test_scaled_sum_splits_by_what_is_added() -> None:
    left, right = operation(lambda a, b: torch.add(a, b, alpha=-0.7), R, A, B)
    total = stable(A - 0.7 * B)
    assert apart(left, A * R / total) <= 1e-12 and apart(right, -0.7 * B * R / total) <= 1e-12


@pytest.mark.parametrize('function', [lambda a, b: a - b, lambda a, b: torch.rsub(b, a), lambda a, b: -b + a])
def test_difference_splits_by_what_is_added(function: Callable[..., torch.Tensor]) -> None:
    left, right = operation(function, R, A, B)
    assert apart(left, A * R / stable(A - B)) <= 1e-12 and apart(right, -B * R / stable(A - B)) <= 1e-12


def test_sum_that_broadcasts_collects_relevance() -> None:
    row = noise(1, 4, seed=4)
    left, right = operation(lambda a, b: a + b, R, A, row)
    assert left.shape == A.shape and right.shape == row.shape
    assert apart(right, (row * R / stable(A + row)).sum(0, keepdim=True)) <= 1e-12


def test_constants_that_are_added_take_nothing() -> None:
    assert apart(operation(lambda a: a + 3, R, A)[0], R) <= 1e-12
    assert apart(operation(lambda a: 3 - a, R, A)[0], R) <= 1e-12
    assert apart(operation(lambda a: a - torch.ones(4), R, A)[0], R) <= 1e-12
    assert apart(operation(lambda a: torch.ones(4) - a, R, A)[0], R) <= 1e-12


@pytest.mark.parametrize('gate', [torch.sigmoid, F.hardsigmoid, lambda b: b.softmax(-1), lambda b: b.clamp(0, 1)])
def test_the_signal_of_a_gate_gets_everything(gate: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for function in (lambda a, b: a * gate(b), lambda a, b: gate(b) * a):
        left, right = operation(function, R, A, B)
        assert apart(left, R) <= 1e-12 and not right.any()


def test_a_gate_for_many_elements_is_a_gate_whatever_made_it() -> None:
    column = noise(3, 1, seed=4)
    for function in (lambda a, b: a * b, lambda a, b: b * a):
        left, right = operation(function, R, A, column)
        assert apart(left, R) <= 1e-12 and not right.any()


def test_product_of_two_signals_gives_half_to_each() -> None:
    left, right = operation(lambda a, b: a * b, R, A, B)
    assert apart(left, R / 2) <= 1e-12 and apart(right, R / 2) <= 1e-12


def test_square_keeps_everything() -> None:
    for function in (lambda a: a * a, lambda a: a**2, lambda a: torch.mul(a, a)):
        assert apart(operation(function, R, A)[0], R) <= 1e-12


def test_quotient_gives_everything_to_the_numerator() -> None:
    left, right = operation(lambda a, b: a / b, R, A, B)
    assert apart(left, R) <= 1e-12 and not right.any()


def test_mean_splits_by_what_is_averaged() -> None:
    (found,) = operation(lambda a: a.mean(1), R[:, 0], A)
    assert apart(found, A / 4 * (R[:, 0] / stable(A.mean(1)))[:, None]) <= 1e-12


def test_softmax_by_its_rule() -> None:
    (found,) = operation(lambda a: F.relu(a.softmax(-1)), R, A)
    probability = A.softmax(-1)
    by_hand = A * (R - probability * R.sum(-1, keepdim=True))
    slack = EPSILON * 20  # the rule divides by the stabilized probability
    assert apart(found, by_hand) <= slack


def test_softmax_that_the_network_returns_passes_relevance_on() -> None:
    for function in (lambda a: a.softmax(-1), lambda a: F.log_softmax(a, -1), lambda a: (a * 1).softmax(1)[:, :4]):
        assert apart(operation(function, R, A)[0], R) <= 1e-12


def test_product_of_matrices_gives_half_to_each() -> None:
    left, right, relevance = noise(2, 3, 4), noise(2, 4, 5, seed=1), noise(2, 3, 5, seed=2)
    share = relevance / stable(left @ right) / 2
    for function in (torch.matmul, torch.bmm, lambda a, b: a @ b, lambda a, b: torch.einsum('bij,bjk->bik', a, b)):
        found = operation(function, relevance, left, right)
        assert apart(found[0], left * (share @ right.mT)) <= 1e-12
        assert apart(found[1], right * (left.mT @ share)) <= 1e-12


NORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    'layer_norm': lambda x: F.layer_norm(x, (4,)),
    'by hand': lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt(),
    'by var_mean': lambda x: _var_mean(x),
    'rms by hand': lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    'rms by division': lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt(),
    'rms by norm': lambda x: x / x.norm(dim=-1, keepdim=True),
    'standard deviation': lambda x: (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5),
    'unsqueezed mean': lambda x: x - x.mean(1)[:, None],
    'normalize': lambda x: F.normalize(x, dim=-1),
    'group_norm': lambda x: F.group_norm(x, 2),
}


def _var_mean(x: torch.Tensor) -> torch.Tensor:
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    return (x - mean) * (variance + 1e-5).rsqrt()


@pytest.mark.parametrize('way', NORMS)
def test_norms_keep_relevance_where_it_is(way: str) -> None:
    assert apart(operation(NORMS[way], R, A)[0], R) <= 1e-12


def test_glu_gives_everything_to_the_signal() -> None:
    x, relevance = noise(3, 8), noise(3, 4, seed=1)
    for model in (Operation(lambda x: F.glu(x)), nn.GLU()):
        (found,) = through(model, relevance, x)
        assert apart(found[:, :4], relevance) <= 1e-12 and not found[:, 4:].any()


def test_addcmul_splits_by_what_is_added() -> None:
    scale = noise(4, seed=5)
    left, right = operation(lambda a, b: torch.addcmul(a, b, scale, value=2), R, A, B)
    total = stable(A + 2 * scale * B)
    assert apart(left, A * R / total) <= 1e-12 and apart(right, 2 * scale * B * R / total) <= 1e-12


# --- attention: each spelling against one written out


def exact(canonizer: Any = None) -> Composite:
    '''Stabilizers that hardly matter: spellings scale differently before them.'''
    return LayerMapComposite(
        [
            (Activation, Pass()),
            (Sum, Norm(1e-14)),
            (AvgPool, Norm(1e-14)),
            (BatchNorm, Pass()),
            (Linear, Epsilon(1e-14)),
        ],
        canonizer and [canonizer],
    )


def by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any = 0, scale: float | None = None
) -> torch.Tensor:
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores + bias).softmax(-1) @ v


def blocked(mask: torch.Tensor) -> torch.Tensor:
    '''Zero where the mask is true, minus infinity elsewhere.'''
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)


Q, K, V = noise(2, 2, 3, 4), noise(2, 2, 5, 4, seed=1), noise(2, 2, 5, 4, seed=2)
BOOL = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]]).bool()
FLOAT = noise(3, 5, seed=7)
KEYS = {1: (K, V), 2: (K[:, :1], V[:, :1])}
ATTENTIONS: dict[str, tuple[Any, Any]] = {
    'plain': (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), by_hand),
    'bool mask': (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, BOOL),
        lambda q, k, v: by_hand(q, k, v, blocked(BOOL)),
    ),
    'float mask': (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=FLOAT),
        lambda q, k, v: by_hand(q, k, v, FLOAT),
    ),
    'infinite mask': (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, blocked(BOOL)),
        lambda q, k, v: by_hand(q, k, v, blocked(BOOL)),
    ),
    'masked_fill': (
        lambda q, k, v: (q @ k.mT / 2).masked_fill(~BOOL, -torch.inf).softmax(-1) @ v,
        lambda q, k, v: by_hand(q, k, v, blocked(BOOL)),
    ),
    'large finite mask': (
        lambda q, k, v: (q @ k.mT / 2).masked_fill(~BOOL, -1e9).softmax(-1) @ v,
        lambda q, k, v: by_hand(q, k, v, blocked(BOOL)),
    ),
    'causal': (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: by_hand(q, k, v, blocked(torch.ones(3, 5).bool().tril())),
    ),
    'scale': (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
        lambda q, k, v: by_hand(q, k, v, scale=0.3),
    ),
    'keywords': (lambda q, k, v: F.scaled_dot_product_attention(value=v, query=q, key=k), by_hand),
    'einsum': (
        lambda q, k, v: torch.einsum(
            'bhqk,bhkd->bhqd', F.softmax(torch.einsum('bhqd,bhkd->bhqk', q, k) * 0.5, dim=-1), v
        ),
        by_hand,
    ),
    'query scaled first': (lambda q, k, v: (q * 0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v, by_hand),
    'grouped': (
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
        lambda q, k, v: by_hand(q, k[:, :1].repeat_interleave(2, 1), v[:, :1].repeat_interleave(2, 1)),
    ),
    'self': (
        lambda q, k, v: F.scaled_dot_product_attention(k, k, k),
        lambda q, k, v: by_hand(k, k, k),
    ),
    'dropout': (
        lambda q, k, v: F.dropout((q @ k.mT / 2).softmax(-1), 0.5, training=False) @ v,
        by_hand,
    ),
    'learned query': (
        lambda q, k, v: F.scaled_dot_product_attention(Q * 1, k, v),
        lambda q, k, v: by_hand(Q, k, v),
    ),
}


@pytest.mark.parametrize('way', ATTENTIONS)
def test_attention_equals_attention_written_out(way: str) -> None:
    if way == 'grouped' and 'enable_gqa' not in (F.scaled_dot_product_attention.__doc__ or ''):
        pytest.skip('this release of torch has no grouped queries')
    function, reference = ATTENTIONS[way]
    with torch.no_grad():
        relevance = noise(*reference(Q, K, V).shape, seed=5)
    found, expected = (through(Operation(f), relevance, Q, K, V, rules=exact) for f in (function, reference))
    for values, others in zip(found, expected):
        assert torch.isfinite(values).all()
        assert apart(values, others) <= 1e-6 if others.any() else not values.any()


def test_attention_by_formula() -> None:
    relevance = noise(2, 2, 3, 4, seed=5)
    weights = (Q @ K.mT / 2).softmax(-1)
    share = relevance / (weights @ V) / 2
    at_value, at_weights = V * (weights.mT @ share), weights * (share @ V.mT)
    scores = Q @ K.mT / 2
    at_scores = scores * (at_weights - weights * at_weights.sum(-1, keepdim=True)) / 1
    share = at_scores / scores / 2 / 2
    expected = Q * (share @ K), K * (share.mT @ Q), at_value
    for found, by_formula in zip(
        through(Operation(F.scaled_dot_product_attention), relevance, Q, K, V, rules=exact), expected
    ):
        assert apart(found, by_formula) <= 1e-6


class WrittenOut(nn.Module):
    '''What ``nn.MultiheadAttention`` does, of its parameters.'''

    def __init__(self, attention: nn.MultiheadAttention, bias: Any = 0):
        super().__init__()
        self.attention, self.bias = attention, bias

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        own = self.attention
        if not own.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        inputs = zip((query, key, value), own.in_proj_weight.chunk(3), own.in_proj_bias.chunk(3))
        q, k, v = (F.linear(x, weight, bias).unflatten(-1, (2, 4)).transpose(1, 2) for x, weight, bias in inputs)
        mixed = by_hand(q, k, v, self.bias).transpose(1, 2).flatten(2)
        result = F.linear(mixed, own.out_proj.weight, own.out_proj.bias)
        return result if own.batch_first else result.transpose(0, 1)


class Called(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention, **options: Any):
        super().__init__()
        self.attention, self.options = attention, options

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return self.attention(query, key, value, **self.options)[0]


PADDING = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
OPTIONS: dict[str, tuple[dict[str, Any], Any]] = {
    'plain': ({}, 0),
    'need_weights=False': ({'need_weights': False}, 0),
    'bool mask': ({'attn_mask': ~BOOL}, blocked(BOOL)),
    'bool mask, need_weights=False': ({'attn_mask': ~BOOL, 'need_weights': False}, blocked(BOOL)),
    'float mask': ({'attn_mask': blocked(BOOL)}, blocked(BOOL)),
    'float mask, need_weights=False': ({'attn_mask': blocked(BOOL), 'need_weights': False}, blocked(BOOL)),
    'padding': ({'key_padding_mask': PADDING}, blocked(~PADDING)[:, None, None]),
    'padding, need_weights=False': (
        {'key_padding_mask': PADDING, 'need_weights': False},
        blocked(~PADDING)[:, None, None],
    ),
    'not averaged': ({'average_attn_weights': False}, 0),
}


@pytest.mark.parametrize('batch_first', [True, False])
@pytest.mark.parametrize('way', OPTIONS)
@pytest.mark.parametrize('rules', [exact, lambda canonizer: EpsilonPlus(1e-14, 1e-14, canonizers=[canonizer])])
def test_multihead_attention_equals_attention_written_out(way: str, batch_first: bool, rules: Any) -> None:
    options, bias = OPTIONS[way]
    attention = seeded(nn.MultiheadAttention(8, 2, batch_first=batch_first)).double()
    query, key, value = noise(2, 3, 8), noise(2, 5, 8, seed=1), noise(2, 5, 8, seed=2)
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    relevance = noise(*query.shape, seed=3)
    found, expected = (
        through(model, relevance, query, key, value, rules=rules)
        for model in (Called(attention, **options), WrittenOut(attention, bias))
    )
    for values, others in zip(found, expected):
        assert torch.isfinite(values).all() and apart(values, others) <= 1e-6


class SelfAttention(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x)


@pytest.mark.parametrize('need_weights', [True, False])
def test_self_attention_equals_attention_written_out(need_weights: bool) -> None:
    attention = seeded(nn.MultiheadAttention(8, 2, batch_first=True)).double()
    x, relevance = noise(2, 3, 8), noise(2, 3, 8, seed=3)
    found, expected = (
        through(SelfAttention(model), relevance, x, rules=exact)[0]
        for model in (Called(attention, need_weights=need_weights), WrittenOut(attention))
    )
    assert apart(found, expected) <= 1e-6

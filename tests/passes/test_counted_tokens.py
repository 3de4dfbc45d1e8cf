"""Queries, keys and values times the number of their position, as where sums are means first; and near twins."""

from __future__ import annotations

import pytest
import torch

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D, E = 2, 2, 8, 4, 3
OFF = {"validate": "off"}


def operands(n=N):
    return qkv(B, H, n, D, E)


def count(x):
    return torch.arange(1, x.shape[2] + 1, dtype=torch.float32)[:, None]


def square(q, k, v, mask=torch.tril):
    return mask(q @ k.mT) @ v


def running(q, k, v):
    return torch.einsum("bhnd,bhnde->bhne", q, (k[..., None] * v[..., None, :]).cumsum(2))


def chunks(q, k, v):
    state, out = q.new_zeros(B, H, D, E), []
    for a in range(0, N, 4):
        one, two, three = (x[:, :, a : a + 4] for x in (q, k, v))
        out.append(square(one, two, three) + one @ state)
        state = state + two.mT @ three
    return torch.cat(out, 2)


COUNTED = {
    "keys": lambda q, k, v: (q, k * count(k), v),
    "values": lambda q, k, v: (q, k, count(v) * v),
    "keys, by halves": lambda q, k, v: (q, k * (count(k) / 2 + 3), v),
    "keys, by how many follow": lambda q, k, v: (q, k * (N - count(k)), v),
    "queries divided": lambda q, k, v: (q / count(q), k * count(k), v),
    "queries and keys": lambda q, k, v: (q * count(q), k * count(k), v),
    "all three": lambda q, k, v: (q * count(q), k * count(k), v / count(v)),
}


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("form", [square, running, chunks])
def test_operands_times_their_position(name, form):
    assert_rewritten(lambda q, k, v: form(*COUNTED[name](q, k, v)), *operands(), compiled=False)


def test_beside_a_decay():
    def f(q, k, v):
        weights = 0.9 ** (count(q) - count(k).mT)
        return (q @ (k * count(k)).mT * weights).tril() @ v

    assert_rewritten(f, *operands(), compiled=False)


def test_of_the_tokens_before():
    assert_rewritten(lambda q, k, v: square(q, k * count(k), v, lambda s: s.tril(-1)), *operands(), compiled=False)


def test_at_any_length():
    f = lambda q, k, v: square(q / count(q), k * count(k), v)  # noqa: E731
    assert_rewritten(f, *operands(11), compiled=False, after=operands(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_a_short_format(dtype):
    short = [x.detach().to(dtype).requires_grad_() for x in operands()]
    assert_rewritten(lambda q, k, v: square(q, k * count(k).to(k), v), *short, compiled=False)


# -------------------------------------------------------------------------------------------------------------- twins


def test_a_distance_is_no_factor_of_either():
    f = lambda q, k, v: (q @ k.mT * (count(q) - count(k).mT)).tril() @ v  # noqa: E731
    assert_refused(f, *operands(), obligation="separable", options=OFF)


def test_a_product_of_positions_and_a_distance():
    f = lambda q, k, v: (q @ (k * count(k)).mT * (count(q) - count(k).mT)).tril() @ v  # noqa: E731
    assert_refused(f, *operands(), options=OFF)


@pytest.mark.parametrize("name", COUNTED)
def test_rows_that_see_the_next(name):
    f = lambda q, k, v: square(*COUNTED[name](q, k, v), lambda s: s.tril(1))  # noqa: E731
    assert_refused(f, *operands(), obligation="causal-range", options=OFF)

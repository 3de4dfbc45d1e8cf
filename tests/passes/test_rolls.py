"""Tensors whose end comes before their beginning: what came around is written over, left out, or stays; and twins."""

from __future__ import annotations

import pytest
import torch

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv
from .test_filled import compared

B, H, N, D = 2, 2, 9, 4


def decayed(q, k, v, g=None):
    """With a constant rate, or with log-gates."""
    i = torch.arange(q.shape[2])
    total = 0.1 * -i.to(q.dtype) if g is None else g.cumsum(-1)
    return (q @ k.mT * (total[..., :, None] - total[..., None, :]).exp().tril()) @ v


def written(x, dim, at, by=1):
    x = x.roll(by, dim)
    x.select(dim, at).copy_(torch.zeros(()))
    return x


def another_head(q, k, v):
    k = k.roll(1, 1)
    k[:, 0] = q[:, 0]
    return decayed(q, k, v)


def itself(q, k, v):
    k = k.roll(1, 2)
    k[:, :, 0] = k[:, :, 1]
    return decayed(q, k, v)


FOUND = {
    "shifted": lambda q, k, v: decayed(q, written(k, 2, 0), v),
    "as it is": lambda q, k, v: decayed(q, k.roll(1, 2), v.roll(2, -1)),
    "left out": lambda q, k, v: decayed(q[:, :, 1:], k.roll(1, 2)[:, :, 1:], v[:, :, 1:]),
    "not left out": lambda q, k, v: decayed(q[:, :, 1:], k.roll(1, 2)[:, :, :-1], v[:, :, 1:]),
    "a head": another_head,
    "one token twice": itself,
    "there and back": lambda q, k, v: decayed(q, k.roll(1, 2).roll(-1, 2), v),
    "all dimensions": lambda q, k, v: decayed(q, k.roll(3), v),
}


@pytest.mark.parametrize("name", FOUND)
def test_is_one_attention(name):
    assert_rewritten(FOUND[name], *qkv(B, H, N, D), compiled=False)


@pytest.mark.parametrize(("at", "by"), [(3, 1), (-1, -1), (0, 2)])
def test_pieces(at, by):
    compared(lambda q, k, v: decayed(q, written(k, 2, at, by), v), *qkv(B, H, N, D))


@pytest.mark.parametrize("at", [0, 4])
def test_gates(at):
    """Of the token before, where the first one is written over; else what came around is a gate as well."""

    def run(q, k, v, g):
        return decayed(q, k, v, written(-g.square(), -1, at))

    compared(run, *qkv(B, H, N, D), torch.randn(B, H, N, requires_grad=True))
    if at == 0:
        assert_rewritten(run, *qkv(B, H, N, D), torch.randn(B, H, N, requires_grad=True), compiled=False)


def test_positions_that_are_rolled_are_no_causal_mask():
    def run(q, k, v):
        i = torch.arange(N)
        return (q @ k.mT * (i[:, None] >= i.roll(1))) @ v

    assert_refused(run, *qkv(B, H, N, D))

"""Attention of one head, or of one sequence, that ``vmap`` makes one of many."""

from __future__ import annotations

import pytest
import torch
from torch.func import vmap

import lacompile
from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv, slopes
from .forms import distance

B, H, N, D, E, C = 2, 3, 12, 8, 6, 4


def square(q, k, v, slope):
    d = distance(len(q))
    return (q @ k.T * torch.where(d >= 0, torch.exp(-slope * d), 0.0)) @ v


def tokens(q, k, v, slope):
    state, out = torch.zeros(D, E), []
    for t in range(len(q)):
        state = torch.exp(-slope) * state + torch.outer(k[t], v[t])
        out.append(q[t] @ state)
    return torch.stack(out)


def chunks(q, k, v, slope):
    state, out, i = torch.zeros(D, E), [], torch.arange(C)
    inside = torch.where(distance(C) >= 0, torch.exp(-slope * distance(C)), 0.0)
    for a in range(0, len(q), C):
        qq, kk, vv = (x[a : a + C] for x in (q, k, v))
        out.append((qq @ kk.T * inside) @ vv + torch.exp(-slope * (i + 1))[:, None] * (qq @ state))
        state = torch.exp(-slope * C) * state + (kk * torch.exp(-slope * (C - 1 - i))[:, None]).T @ vv
    return torch.cat(out)


def of_heads(one, heads=1, batch=0):
    of_batch = vmap(one, in_dims=(heads, heads, heads, 0), out_dims=heads)
    return vmap(of_batch, in_dims=(batch, batch, batch, None), out_dims=batch)


@pytest.mark.parametrize("one", [square, tokens, chunks])
def test_batch_and_heads(one):
    assert_rewritten(of_heads(one, heads=0), *qkv(B, H, N, D, E), slopes(), compiled=False)


def test_heads_behind_tokens():
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in qkv(B, H, N, D, E))
    assert_rewritten(of_heads(square), q, k, v, slopes(), compiled=False)


def test_scores_of_each_pair_of_tokens():
    def f(q, k, v, slope):
        dot = vmap(vmap(torch.dot, (None, 0)), (0, None))
        weights = torch.exp(-slope[:, None, None] * distance(N)).tril()
        return (vmap(vmap(dot))(q, k) * weights) @ v

    assert_rewritten(f, *qkv(B, H, N, D, E), slopes(), compiled=False)


def test_another_length(without_inductor):
    f = torch.compile(of_heads(square, heads=0), backend="lightning")
    for n in (N, 2 * N, 3 * N):
        q, k, v = (x.detach() for x in qkv(B, H, n, D, E))
        torch.testing.assert_close(f(q, k, v, slopes()), of_heads(square, heads=0)(q, k, v, slopes()))
        assert len(lacompile.last_report().rewrites) == 1


def future(q, k, v, slope):
    return (q @ k.T * torch.exp(-slope * distance(len(q)).abs()).tril(1)) @ v


def test_a_twin_that_sees_the_next_token():
    assert_refused(of_heads(future, heads=0), *qkv(B, H, N, D, E), slopes())


def test_other_transforms_leave_the_program_alone():
    def f(q, k, v, slope):
        return torch.func.grad(lambda x: of_heads(square, heads=0)(x, k, v, slope).sum())(q)

    q, k, v = (x.detach() for x in qkv(B, H, N, D, E))
    report = lacompile.explain(f)(q, k, v, slopes().detach())
    assert not report.rewrites
    assert "left alone" in report.notes[0]


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_leaves_the_program_alone(inside):
    def cast(f, *args):
        with torch.autocast("cpu", torch.bfloat16):
            return f(*args)

    per_head = of_heads(square, heads=0)
    args = [x.detach() for x in (*qkv(B, H, N, D, E), slopes())]
    whole = torch.compile(lambda *xs: cast(per_head, *xs), backend="lightning")
    got = whole(*args) if inside else cast(torch.compile(per_head, backend="lightning"), *args)
    want = cast(per_head, *args)
    assert got.dtype is want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert not lacompile.last_report().rewrites

"""Gates, queries, keys and values that are first differences of tokens, which are one fewer, and zeros."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_rewritten

from .drawn import qkv
from .forms import B, H

N, D, E = 10, 4, 6


def inputs(n=N):
    q, k, v = qkv(B, H, n, D, E)
    return q, k, v, torch.randn(B, H, n, requires_grad=True)


def weights(f):
    """exp(G_i - G_j), of log-decays."""
    decays = f.cumsum(-1)
    above = torch.ones(f.shape[-1], f.shape[-1], dtype=torch.bool).triu(1)
    return (decays[..., None] - decays[..., None, :]).masked_fill(above, -torch.inf).exp()


def attention(q, k, v, f=None):
    return (q @ k.mT).tril() @ v if f is None else (q @ k.mT * weights(f)) @ v


def rising(g):
    return torch.logcumsumexp(g, -1)


def none(x, dim):
    return torch.zeros_like(x.narrow(dim, 0, 1))


GATES = {
    "zeros and differences": lambda z: torch.cat([none(z, -1), z[..., :-1] - z[..., 1:]], -1),
    "padded": lambda z: F.pad(-torch.diff(z, dim=-1), (1, 0)),
    "sums": lambda z: -torch.cat([none(z, -1), z[..., :-1].abs() + z[..., 1:].abs()], -1),
    "behind": lambda z: F.pad(-torch.diff(z, dim=-1), (0, 1)),
    "written": lambda z: torch.zeros_like(z).index_copy(-1, torch.arange(1, z.shape[-1]), z[..., :-1] - z[..., 1:]),
    "the first one by itself": lambda z: torch.cat([-z[..., :1].abs(), z[..., :-1] - z[..., 1:]], -1),
    "two apart": lambda z: torch.cat([none(z, -1), none(z, -1), z[..., :-2] - z[..., 2:]], -1),
}
FOUND = ("zeros and differences", "padded", "sums")
TOKENS = {
    "zeros and differences": lambda x: torch.cat([none(x, 2), x[:, :, 1:] - x[:, :, :-1]], 2),
    "padded": lambda x: F.pad(torch.diff(x, dim=2), (0, 0, 1, 0)),
    "of a function": lambda x: torch.cat([none(x, 2), x[:, :, 1:].cos() - x[:, :, :-1].sin()], 2),
    "behind": lambda x: F.pad(torch.diff(x, dim=2), (0, 0, 0, 1)),
    "the first one by itself": lambda x: torch.diff(x, dim=2, prepend=none(x, 2)),
}


def right(program, *args, grads=True):
    """Whatever of it is rewritten, it computes what it did."""
    assert_rewritten(program, *args, count=None, grads=grads, compiled=False)


@pytest.mark.parametrize("name", GATES)
def test_gates(name):
    def program(q, k, v, g):
        return attention(q, k, v, GATES[name](rising(g)))

    if name in FOUND:
        assert_rewritten(program, *inputs(), compiled=False)
    else:
        right(program, *inputs())


@pytest.mark.parametrize("name", GATES)
def test_gates_of_a_sum_that_came_in(name):
    """Here the first one counts."""

    def program(q, k, v, g, state):
        f = GATES[name](rising(g))
        return attention(q, k, v, f) + f.cumsum(-1).exp()[..., None] * (q @ state)

    right(program, *inputs(), torch.randn(B, H, D, E))


@pytest.mark.parametrize("name", GATES)
def test_gates_in_a_loop_whose_last_state_is_a_result(name):
    def program(q, k, v, g, state):
        f, out = GATES[name](rising(g)), []
        for t in range(q.shape[2]):
            state = f[:, :, t, None, None].exp() * state + k[:, :, t, :, None] * v[:, :, t, None]
            out.append((q[:, :, t, :, None] * state).sum(-2))
        return torch.stack(out, 2), state

    right(program, *inputs(5), torch.zeros(B, H, D, E))
    right(program, *inputs(5), torch.randn(B, H, D, E))


@pytest.mark.parametrize("name", GATES)
def test_rows_that_read_before_they_decay(name):
    """The last one weighs nothing but the last state."""

    def program(q, k, v, g):
        f, state, out = GATES[name](rising(g)), q.new_zeros(B, H, D, E), []
        for t in range(q.shape[2]):
            state = state + k[:, :, t, :, None] * v[:, :, t, None]
            out.append((q[:, :, t, :, None] * state).sum(-2))
            state = f[:, :, t, None, None].exp() * state
        return torch.stack(out, 2), state

    right(program, *inputs())


@pytest.mark.parametrize("of", ["k", "v", "kv", "q", "qkv"])
@pytest.mark.parametrize("name", TOKENS)
def test_tokens(name, of):
    def program(q, k, v, g):
        q, k, v = (TOKENS[name](x) if which in of else x for which, x in zip("qkv", (q, k, v), strict=True))
        return attention(q, k, v)

    if of in ("k", "kv", "qkv") and name != "behind":
        assert_rewritten(program, *inputs()[:3], None, compiled=False)
    else:
        right(program, *inputs()[:3], None)


@pytest.mark.parametrize("strict", [0, -1])
def test_tokens_and_gates(strict):
    def program(q, k, v, g):
        f = GATES["padded"](rising(g))
        return ((q @ TOKENS["padded"](k).mT * weights(f)).tril(strict)) @ v

    right(program, *inputs())


@pytest.mark.parametrize("form", [GATES, TOKENS])
def test_a_length_that_is_no_number(form):
    def program(q, k, v, g):
        if form is GATES:
            return attention(q, k, v, GATES["padded"](rising(g)))
        return attention(q, TOKENS["padded"](k), v)

    assert_rewritten(program, *inputs(), after=inputs(12), grads=True, compiled=False)


def test_two_tokens():
    assert_rewritten(lambda q, k, v, g: attention(q, k, v, GATES["padded"](rising(g))), *inputs(2), compiled=False)

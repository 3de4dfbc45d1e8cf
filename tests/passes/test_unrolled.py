"""Loops of state updates that are no attention, and of which no obligation speaks: they are told as what they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lacompile import explain
from lacompile.testing import assert_refused, assert_rewritten

B, H, N, D = 2, 2, 8, 4
C = H * D


def inputs():
    torch.manual_seed(0)
    return [*torch.randn(3, B, H, N, D), torch.randn(D, D)]


def loop(token=lambda q, k, v, t, w: (q, k, v), read=lambda y, t, w: y):
    """``token`` makes what is read of one token, and ``read`` is done to what it reads, ``[B, H, D]``."""

    def run(q, k, v, w):
        state, outs = torch.zeros(B, H, D, D), []
        for t in range(q.shape[2]):
            q_t, k_t, v_t = token(q[:, :, t], k[:, :, t], v[:, :, t], t, w)
            state = 0.9 * state + k_t[..., :, None] * v_t[..., None, :]
            outs.append(read((q_t[..., :, None] * state).sum(-2), t, w))
        return torch.stack(outs, 2)

    return run


def rolled(q, k, v, t, w):
    """Keys of a function that each token has for itself, so that no tensor holds them all."""
    return q, torch.sin(k * (t + 1)), v


LOOPS = {
    "a norm of another width at one token": loop(
        read=lambda y, t, w: F.layer_norm(y, (D,), eps=1e-5 if t == 3 else 1e-3)
    ),
    "a softmax over the batch": loop(read=lambda y, t, w: F.softmax(y, 0)),
    "a norm with a weight of each token": loop(read=lambda y, t, w: F.layer_norm(y, (D,), w[t % D])),
    "keys of a function of their own": loop(rolled),
}


@pytest.mark.parametrize("name", LOOPS)
def test_is_told(name):
    report = explain(LOOPS[name])(*inputs())
    (miss,) = report.near_misses
    assert not report.rewrites and miss.obligation == "single-term" and "an unrolled loop" in miss.found


def test_an_attention_is_one():
    report = assert_rewritten(loop(), *(x.requires_grad_() for x in inputs()), compiled=False)
    assert not report.near_misses


def recurrent(cell):
    def run(x, w):
        h, outs = torch.zeros(B, D), []
        for t in range(N):
            h = cell(h, x[:, t], w)
            outs.append(h)
        return torch.stack(outs, 1)

    return run


CELLS = {
    "tanh": lambda h, x, w: torch.tanh(x + h @ w),
    "gated": lambda h, x, w: torch.sigmoid(x @ w) * h + x,
    "linear": lambda h, x, w: h @ w + x,
    "mean": lambda h, x, w: h + 0.1 * (x - h),
}


@pytest.mark.parametrize("name", CELLS)
def test_a_recurrence_of_vectors_is_not(name):
    report = explain(recurrent(CELLS[name]))(torch.randn(B, N, D), nn.Parameter(torch.randn(D, D)))
    assert not any("unrolled" in miss.found for miss in report.near_misses)


def softmax_of_all_so_far(q, k, v, w):
    """A cache that grows by one token, as a transformer decodes."""
    outs = []
    for t in range(N):
        scores = q[:, :, t : t + 1] @ k[:, :, : t + 1].mT
        outs.append(F.linear(scores.softmax(-1) @ v[:, :, : t + 1], w))
    return torch.cat(outs, 2)


def layers(q, k, v, w):
    x = q
    for _ in range(6):
        x = F.layer_norm(x + F.scaled_dot_product_attention(x @ w, k, v, is_causal=True), (D,))
        x = x + F.gelu(x @ w) @ w
    return x


def written_out(q, k, v, w):
    future = torch.ones(N, N, dtype=torch.bool).triu(1)
    for _ in range(6):
        scores = (q @ w @ k.mT).masked_fill(future, float("-inf"))
        q = q + F.layer_norm(scores.softmax(-1) @ v, (D,))
    return q


@pytest.mark.parametrize("program", [softmax_of_all_so_far, layers, written_out])
def test_a_transformer_is_not(program):
    report = explain(program)(*inputs())
    assert not report.rewrites and not any("unrolled" in miss.found for miss in report.near_misses)


def state_alone(q, k, v, w):
    state = q.new_zeros(B, H, D, D)
    for t in range(N):
        state = 0.9 * state + k[:, :, t, :, None] * v[:, :, t, None]
    return state


def last_row_alone(q, k, v, w):
    return q[:, :, -1:] @ state_alone(q, k, v, w)


def weighted_keys(q, k, v, w):
    """The same without a loop."""
    return (k * (0.9 ** torch.arange(N - 1, -1, -1))[:, None]).mT @ v


@pytest.mark.parametrize("program", [state_alone, last_row_alone, weighted_keys])
def test_a_state_that_no_row_reads(program):
    assert_refused(program, *inputs(), obligation="causal-range")


def covariance(q, k, v, w):
    return (q - q.mean(2, keepdim=True)).mT @ k @ w


def test_a_product_over_tokens_is_none():
    assert not explain(covariance)(*inputs()).near_misses


def rescaled(q, k, v, w, read=lambda q_t, state: q_t @ state):
    """A state that is divided by the root of a scale that grows with it, as in the recurrent form of a retention."""
    rate, scale, state, outs = w[:H].mean(-1).sigmoid(), torch.ones(H), torch.zeros(B, H, D, D), []
    for t in range(N):
        before, scale = scale, scale * rate + 1 if t else scale
        kept, new = (x.view(H, 1, 1) for x in (before.sqrt() * rate / scale.sqrt(), 1 / scale.sqrt()))
        state = state * kept + k[:, :, t, :, None] * v[:, :, t, None] * new
        outs.append(read(q[:, :, t, None], state))
    return torch.cat(outs, 2)


def test_rows_that_each_have_a_factor_of_their_own():
    report = explain(rescaled)(*inputs())
    (miss,) = report.near_misses
    assert not report.rewrites and miss.obligation == "single-term" and "each times a factor of its own" in miss.found
    assert "no row" not in str(report)


def test_a_state_that_no_row_reads_is_told_as_that():
    report = explain(lambda *given: rescaled(*given, read=lambda q_t, state: state)[:, :, -D:])(*inputs())
    assert not report.rewrites and "factor of its own" not in str(report)

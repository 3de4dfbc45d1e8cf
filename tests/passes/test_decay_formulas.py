"""Decay factors by a formula, of the head or of gates, in a loop over tokens and as a square; and near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv
from .forms import distance

B, H, N, D, E = 2, 3, 10, 8, 6


def tokens(decay):
    """``decay`` is ``[H]``, or ``[B, H, N]``, of gates."""

    def f(q, k, v, gate):
        factor, state, out = decay(gate).expand(B, H, N) if decay(gate).dim() > 1 else decay(gate), 0, []
        for t in range(N):
            now = factor[..., t, None, None] if factor.dim() > 1 else factor[:, None, None]
            state = now * state + k[:, :, t, :, None] * v[:, :, t, None]
            out.append((q[:, :, t, None] @ state)[:, :, 0])
        return torch.stack(out, 2)

    return f


HEADS = {
    "RetNet": lambda _: 1 - 2.0 ** (-5.0 - torch.arange(H)),
    "exp2": lambda _: 1 - torch.exp2(-5.0 - torch.arange(H)),
    "one over": lambda _: 1 - 1 / 2 ** (5 + torch.arange(H)),
    "halves": lambda _: 1 - 0.5 ** (torch.arange(H) + 5),
    "expm1": lambda _: -torch.expm1(-torch.exp(-torch.arange(H).float())),
    "on a line": lambda _: 0.9 + 0.05 * torch.arange(H) / H,
    "an exponential and more": lambda _: 0.5 + 0.4 * torch.exp(-torch.arange(H).float()),
}

GATES = {
    "softmax over heads": lambda a: a.softmax(1),
    "softmax of two": lambda a: torch.stack([a, -a], -1).softmax(-1)[..., 0],
    "rsqrt": lambda a: torch.rsqrt(1 + a**2),
    "one over": lambda a: 1 / (1 + a**2),
    "less an exponential": lambda a: 1 - torch.exp(-F.softplus(a) - 1),
}


@pytest.mark.parametrize("name", HEADS)
def test_of_heads(name):
    arguments = *qkv(B, H, N, D, E), torch.randn(B, H, N)
    assert_rewritten(tokens(HEADS[name]), *arguments, compiled=False)
    square = lambda q, k, v, a: (q @ k.mT * (HEADS[name](a)[:, None, None] ** distance(N)).tril()) @ v  # noqa: E731
    assert_rewritten(square, *arguments, compiled=False)


@pytest.mark.parametrize("name", GATES)
def test_of_gates(name):
    assert_rewritten(tokens(GATES[name]), *qkv(B, H, N, D, E), torch.randn(B, H, N, requires_grad=True), compiled=False)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_gates_that_are_halves_of_one_tensor(order):
    def f(q, k, v, gates):
        halves = gates.sigmoid().unbind(-1)
        (keep, write), state, out = (halves[n] for n in order), torch.zeros(B, H, D, E), []
        for t in range(N):
            new = k[:, :, t, :, None] * v[:, :, t, None]
            state = keep[:, :, t, None, None] * state + write[:, :, t, None, None] * new
            out.append((q[:, :, t, None] @ state)[:, :, 0])
        return torch.stack(out, 2)

    assert_rewritten(f, *qkv(B, H, N, D, E), torch.randn(B, H, N, 2, requires_grad=True), compiled=False)


TWINS = {
    "may be negative": lambda a: a.tanh(),
    "grows": lambda a: 1 + a.softmax(1),
    "of heads, and grows": lambda _: 1 + 2.0 ** (-5.0 - torch.arange(H)),
}


@pytest.mark.parametrize("name", TWINS)
def test_near_twins(name):
    assert_refused(tokens(TWINS[name]), *qkv(B, H, N, D, E), torch.randn(B, H, N, requires_grad=True))
OF_SEVERAL_LAYERS = {
    "rate": lambda a, layers: -layers[1].exp()[:, None] * F.softplus(a),
    "one column": lambda a, layers: -layers.mT[:, 1].exp()[:, None] * F.softplus(a),
    "rate of all heads": lambda a, layers: -layers[1, 0].exp() * F.softplus(a),
    "by number": lambda a, layers: -layers.index_select(0, torch.tensor([1]))[0].exp()[:, None] * F.softplus(a),
    "temperature": lambda a, layers: F.logsigmoid(a) / layers[1].exp()[:, None],
    "root": lambda a, layers: -(layers[1].exp()[:, None] * F.softplus(a)).sqrt(),
}


def square(q, k, v, logs):
    c = logs.cumsum(-1)
    return (q @ k.mT * (c[..., None] - c[..., None, :]).tril().exp().tril()) @ v


@pytest.mark.parametrize("name", OF_SEVERAL_LAYERS)
def test_gates_times_an_exponential_of_one_layer_s_row(name):
    layers, a = torch.randn(4, H, requires_grad=True), torch.randn(B, H, N, requires_grad=True)
    run = lambda q, k, v, a, layers: square(q, k, v, OF_SEVERAL_LAYERS[name](a, layers))  # noqa: E731
    assert_rewritten(run, *qkv(B, H, N, D, E), a, layers, compiled=False)


def test_a_rate_of_the_row_is_no_decay():
    """As many layers as tokens, all of them read: the weight is ``exp(A_i (c_i - c_j))``."""

    def run(q, k, v, a, layers):
        c = F.logsigmoid(a).cumsum(-1)
        steps = (c[..., None] - c[..., None, :]) * layers.mT.exp()[:, :, None]
        return (q @ k.mT * steps.tril().exp().tril()) @ v

    layers, a = torch.randn(N, H, requires_grad=True), torch.randn(B, H, N, requires_grad=True)
    assert_refused(run, *qkv(B, H, N, D, E), a, layers)



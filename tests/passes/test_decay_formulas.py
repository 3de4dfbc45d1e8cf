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

LEARNED = torch.tensor([[[0.3], [-1.0], [2.0]], [[1.0], [0.5], [-0.7]]], requires_grad=True)
"""``[2, H, 1]``"""


def end(n):
    """One of two between which the gates of each head lie."""
    return LEARNED[n].sigmoid()


GATES = {
    "softmax over heads": lambda a: a.softmax(1),
    "softmax of two": lambda a: torch.stack([a, -a], -1).softmax(-1)[..., 0],
    "rsqrt": lambda a: torch.rsqrt(1 + a**2),
    "one over": lambda a: 1 / (1 + a**2),
    "less an exponential": lambda a: 1 - torch.exp(-F.softplus(a) - 1),
    "mean over heads": lambda a: a.sigmoid().mean(1, keepdim=True).expand(B, H, N),
    "mean of channels": lambda a: torch.stack([a, -a], -1).sigmoid().mean(-1),
    "less a mean": lambda a: 1 - 0.5 * torch.stack([a, -a], -1).sigmoid().mean(-1),
    "sum of shares": lambda a: (0.5 * torch.stack([a, 2 * a], -1).sigmoid()).sum(-1),
    "mixture of known rates": lambda a: torch.stack([a, -a], -1).softmax(-1) @ torch.tensor([0.8, 0.99]),
    "between ends": lambda a: a.sigmoid() * end(0) + (1 - a.sigmoid()) * end(1),
    "from one end on": lambda a: 0.5 * end(0) + (0.5 + 0.5 * end(1) - 0.5 * end(0)) * a.sigmoid(),
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


TWINS = {
    "may be negative": lambda a: a.tanh(),
    "grows": lambda a: 1 + a.softmax(1),
    "mean that may be negative": lambda a: torch.stack([a, a.tanh()], -1).tanh().mean(-1),
    "mixture of rates of both signs": lambda a: torch.stack([a, -a], -1).softmax(-1) @ torch.tensor([0.8, -0.1]),
    "beyond its ends": lambda a: end(0) + 2 * (end(1) - end(0)) * a.sigmoid(),
    "of heads, and grows": lambda _: 1 + 2.0 ** (-5.0 - torch.arange(H)),
}


@pytest.mark.parametrize("name", TWINS)
def test_near_twins(name):
    assert_refused(tokens(TWINS[name]), *qkv(B, H, N, D, E), torch.randn(B, H, N, requires_grad=True))


class LowerBound(torch.nn.Module):
    """Gates from a bound on that is learned, of all layers up to this one (HGRN)."""

    def __init__(self, bound, form):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Parameter(torch.randn(4, H))
        self.bound, self.form = bound, form

    def forward(self, q, k, v, a):
        least = self.bound(self.layers)[:, None]
        gates = least + (1 - least) * a.sigmoid()
        return square(q, k, v, gates.log()) if self.form == "square" else tokens(lambda _: gates)(q, k, v, a)


def behind_the_first(shares):
    return shares.cumsum(0) - shares[0]


BOUNDS = {
    "up to the layer": lambda layers: layers.softmax(0).cumsum(0)[1],
    "behind the first": lambda layers: behind_the_first(layers.softmax(0))[2],
    "of some layers": lambda layers: layers.softmax(0)[:2].sum(0),
    "mean": lambda layers: layers.sigmoid().mean(0),
    "of the layer": lambda layers: layers.sigmoid()[1],
}


@pytest.mark.parametrize("form", ["square", "tokens"])
@pytest.mark.parametrize("name", BOUNDS)
def test_gates_from_a_learned_bound_on(name, form):
    arguments = *qkv(B, H, N, D, E), torch.randn(B, H, N, requires_grad=True)
    assert_rewritten(LowerBound(BOUNDS[name], form), *arguments, compiled=False)


@pytest.mark.parametrize("form", ["square", "tokens"])
def test_a_bound_that_may_be_negative(form):
    run = LowerBound(lambda layers: layers.tanh().cumsum(0)[1], form)
    assert_refused(run, *qkv(B, H, N, D, E), torch.randn(B, H, N), obligation="decay")


def test_decays_that_are_learned_for_each_position():
    """Their sums over a chunk are no numbers of a layer: beside each other they are a decay."""

    class Learned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logs = torch.nn.Parameter(-torch.rand(H, 12))

        def forward(self, q, k, v):
            state, out = q.new_zeros(B, H, D, E), []
            for start in range(0, 12, 4):
                q_c, k_c, v_c = (x[:, :, start : start + 4] for x in (q, k, v))
                c = self.logs[:, start : start + 4].cumsum(-1)
                inside = (c[..., None] - c[..., None, :]).tril().exp().tril()
                out.append((q_c @ k_c.mT * inside) @ v_c + (q_c * c.exp()[..., None]) @ state)
                state = state * c[:, -1, None, None].exp() + (k_c * (c[:, -1:] - c).exp()[..., None]).mT @ v_c
            return torch.cat(out, 2)

    assert_rewritten(Learned(), *qkv(B, H, 12, D, E), compiled=False)

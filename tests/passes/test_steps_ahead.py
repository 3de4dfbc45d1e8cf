"""Steps that turn what they project by their position, or project by weights of their own making; near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lacompile import explain
from lacompile.testing import assert_refused, assert_rewritten

B, N, H, D = 2, 6, 2, 4
C, HALF = H * D, D // 2
ANGLES = torch.tensor([1.0, 0.1])
UNSEEN = {"validate": "off"}


def halves(z, c, s):
    a, b = z[..., :HALF], z[..., HALF:]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def pairs(z, c, s):
    a, b = z[..., ::2], z[..., 1::2]
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)


def rotated(z, c, s):
    a, b = z.chunk(2, -1)
    return z * torch.cat([c, c]) + torch.cat([-b, a], -1) * torch.cat([s, s])


def by_number(model, t):
    angle = t * ANGLES
    return angle.cos(), angle.sin()


def from_a_table(model, t):
    table = torch.arange(N)[:, None] * ANGLES
    return table[t].cos(), table[t].sin()


def from_a_buffer(model, t):
    return model.cos[t], model.sin[t]


class Layer(nn.Module):
    def __init__(self, turn=halves, angles=by_number, split="chunk", random=None, rate=lambda t: None):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.qkv, self.gate, self.o = nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, H), nn.Linear(C, C)
        table = torch.arange(N)[:, None] * ANGLES
        self.register_buffer("cos", table.cos())
        self.register_buffer("sin", table.sin())
        self.turn, self.angles, self.split, self.random, self.rate = turn, angles, split, random, rate

    def projected(self, x):
        y = self.qkv(x)
        if self.split == "unbind":
            return y.view(-1, 3, H, D).unbind(1)
        if self.split == "separate":
            return [F.linear(x, w).view(-1, H, D) for w in self.qkv.weight.chunk(3)]
        return [z.view(-1, H, D) for z in y.chunk(3, -1)]

    def step(self, x, state, t):
        z = self.norm(x)
        q, k, v = self.projected(z)
        c, s = self.angles(self, t)
        q, k = self.turn(q, c, s), self.turn(k, c, s)
        rate = self.gate(z).sigmoid()[..., None, None] if self.rate(t) is None else self.rate(t)
        state = state * rate + k[..., None] * v[..., None, :]
        o = (q[..., None, :] @ state).flatten(1)
        return x + self.o(o if self.random is None else self.random(o)), state

    def forward(self, x):
        state, out = x.new_zeros(x.shape[0], H, D, D), []
        for t in range(N):
            y, state = self.step(x[:, t], state, t)
            out.append(y)
        return torch.stack(out, 1)


def data(batch=B):
    torch.manual_seed(1)
    return torch.randn(batch, N, C, requires_grad=True)


@pytest.mark.parametrize(
    ("turn", "angles", "split"),
    [
        (halves, by_number, "chunk"),
        (halves, from_a_table, "unbind"),
        (halves, from_a_buffer, "separate"),
        (pairs, by_number, "unbind"),
        (pairs, from_a_table, "separate"),
        (pairs, from_a_buffer, "chunk"),
        (rotated, by_number, "separate"),
        (rotated, from_a_table, "chunk"),
        (rotated, from_a_buffer, "unbind"),
    ],
)
def test_turned_in_the_step(turn, angles, split):
    """Any two of them together in one case."""
    report = assert_rewritten(Layer(turn, angles, split), data(), compiled=False, options=UNSEEN)
    assert f"N={N}" in str(report) and not report.near_misses


def test_validated():
    assert_rewritten(Layer(), data(), compiled=False)


def test_compiled():
    assert_rewritten(Layer(), data())


def test_a_batch_of_any_size():
    assert_rewritten(Layer(), data(5), after=(data(3).detach(),), compiled=False)


class Recomputed(nn.Module):
    """A projection whose weights each step computes again."""

    def __init__(self, weight):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(C, C) / C**0.5) for _ in range(3))
        self.weight = weight

    def forward(self, x):
        state, out = x.new_zeros(x.shape[0], H, D, D), []
        for t in range(N):
            q, k, v = (z.view(-1, H, D) for z in F.linear(x[:, t], self.weight(self, t)).chunk(3, -1))
            state = 0.9 * state + k[..., None] * v[..., None, :]
            out.append((q[..., None, :] @ state).flatten(1))
        return torch.stack(out, 1)


WEIGHTS = {
    "put together": lambda m, t: torch.cat([m.q, m.k, m.v]),
    "normed": lambda m, t: F.normalize(torch.cat([m.q, m.k, m.v]), dim=-1),
    "normed by hand": lambda m, t: torch.cat([m.q, m.k, m.v / m.v.norm(dim=-1, keepdim=True)]),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_each_step_computes_again(name):
    assert_rewritten(Recomputed(WEIGHTS[name]), data(), compiled=False, options=UNSEEN)


# -------------------------------------------------------------------------------------------------------------- twins


def test_one_token_decays_otherwise():
    """Each value is what the program computes, whatever is found."""
    model = Layer(rate=lambda t: 0.5 if t == 3 else 0.9)
    assert_rewritten(model, data(), count=None, compiled=False, options=UNSEEN)


def test_one_token_is_turned_otherwise():
    """Each value is what the program computes, whatever is found."""

    def angles(model, t):
        return by_number(model, 5 if t == 2 else t)

    assert_rewritten(Layer(angles=angles, rate=lambda t: 0.9), data(), count=None, compiled=False, options=UNSEEN)


def test_a_projection_of_what_was_left():
    class FedBack(Layer):
        def forward(self, x):
            state, out, last = x.new_zeros(B, H, D, D), [], torch.zeros_like(x[:, 0])
            for t in range(N):
                last, state = self.step(x[:, t] + last, state, t)
                out.append(last)
            return torch.stack(out, 1)

    assert_refused(FedBack(), data(), options=UNSEEN)


def test_what_draws_random_numbers_stays_where_it_is():
    assert_refused(Layer(random=lambda o: F.dropout(o, 0.5)), data(), options=UNSEEN)


def test_an_input_that_is_written_to():
    class Written(Layer):
        def forward(self, x):
            x, state, out = x * 1.0, x.new_zeros(B, H, D, D), []
            for t in range(N):
                y, state = self.step(x[:, t], state, t)
                if t + 1 < N:
                    x[:, t + 1] += y
                out.append(y)
            return torch.stack(out, 1)

    assert_refused(Written(), data(), options=UNSEEN)


def test_weights_of_one_step_are_others():
    def weight(model, t):
        w = torch.cat([model.q, model.k, model.v])
        if t == 3:
            w = w * 1.5
        return w

    assert_rewritten(Recomputed(weight), data(), count=None, compiled=False, options=UNSEEN)


class OtherKeys(nn.Module):
    """One step projects its keys by other weights."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.other = (nn.Linear(C, C, bias=False) for _ in range(4))

    def forward(self, x):
        state, out = x.new_zeros(x.shape[0], C, C), []
        for t in range(N):
            k = (self.other if t == 3 else self.k)(x[:, t])
            state = 0.9 * state + k[..., None] * self.v(x[:, t])[:, None]
            out.append((self.q(x[:, t])[:, None] @ state)[:, 0])
        return torch.stack(out, 1)


def test_the_same_program_is_read_in_the_same_way():
    """Whatever the addresses are that its nodes lie at."""
    found, kept, model, x = set(), [], OtherKeys(), torch.randn(B, N, C)
    for n in range(6):
        kept.append([object() for _ in range(997 * n)])
        torch._dynamo.reset()
        report = explain(model, **UNSEEN)(x)
        found.add((len(report.rewrites), tuple(str(m) for m in report.near_misses)))
    assert len(found) == 1

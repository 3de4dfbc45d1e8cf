"""Heads with projections of their own, turned by their positions, in a layer's step for each token or chunk; twins."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lacompile.testing import assert_rewritten

H, D, CHUNK = 2, 4, 4
LENGTHS = {"token": 6, "chunk": 12}
RATES = [0.9, 0.8]


def of_pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def turned(x, start, sign=1, scaled=False):
    """RoPE, or xPOS where features are ``scaled`` by powers too, with tables that are made here."""
    place = torch.arange(start, start + x.shape[1])[:, None]
    angle = (place / 100 ** (torch.arange(0, D, 2) / D)).repeat_interleave(2, -1)
    scale = ((torch.arange(0, D, 2) + 0.4 * D) / (1.4 * D)).repeat_interleave(2) ** (sign * place / 64) if scaled else 1
    return x * (angle.cos() * scale) + of_pairs(x) * (angle.sin() * scale)


TURNS = {
    "not": lambda x, start, sign: x,
    "rope": turned,
    "xpos": lambda x, start, sign: turned(x, start, sign, scaled=True),
}


class Head(nn.Module):
    def __init__(self, rate, width, turn):
        super().__init__()
        self.rate, self.turn = rate, turn
        self.q, self.k, self.v = (nn.Parameter(torch.randn(width, D) / width) for _ in range(3))

    def project(self, x, start):
        return self.turn(x @ self.q, start, 1), self.turn(x @ self.k, start, -1), x @ self.v

    def token(self, x, state, start):
        q, k, v = self.project(x, start)
        state = self.rate * state + k.mT @ v
        return q @ state, state

    def chunk(self, x, state, start):
        q, k, v = self.project(x, start)
        n = x.shape[1]
        place = torch.arange(n)
        inside = (self.rate ** (place[:, None] - place).float()).tril()
        out = (q @ k.mT * inside) @ v + (q @ state) * self.rate * inside[:, :1]
        return out, self.rate**n * state + k.mT @ (v * inside[-1].view(1, n, 1))


class Layer(nn.Module):
    """``split``: each head has a part of the features, which the step takes, or all of them."""

    def __init__(self, form, turn="xpos", split=True, heads=H, step=None):
        super().__init__()
        width = D if split else heads * D
        self.heads = nn.ModuleList(Head(rate, width, TURNS[turn]) for rate in RATES[:heads])
        self.form, self.split, self.own_step = form, split, step

    def step(self, x, states, start):
        parts = x.split(D, -1) if self.split else [x] * len(states)
        done = [getattr(h, self.form)(*given, start) for h, *given in zip(self.heads, parts, states, strict=True)]
        outs, states = zip(*done, strict=True)
        return torch.cat(outs, -1), states

    def forward(self, x):
        size = 1 if self.form == "token" else CHUNK
        states, outs = [torch.zeros(x.shape[0], D, D) for _ in self.heads], []
        for a in range(0, x.shape[1], size):
            y, states = (self.own_step or Layer.step)(self, x[:, a : a + size], states, a)
            outs.append(y)
        return torch.cat(outs, 1)


def model(form, *args, batch=2, length=None, **options):
    torch.manual_seed(0)
    layer = Layer(form, *args, **options)
    return layer, torch.randn(batch, length or LENGTHS[form], D * len(layer.heads), requires_grad=True)


def of_all(report, form, heads=H):
    return f"N={LENGTHS[form]} H={heads}" in str(report)


@pytest.mark.parametrize(
    ("form", "turn", "split", "heads"),
    [
        ("token", "not", True, 2),
        ("token", "rope", False, 2),
        ("token", "xpos", True, 1),
        ("chunk", "not", False, 1),
        ("chunk", "rope", True, 1),
        ("chunk", "xpos", False, 2),
    ],
)
def test_is_one_attention(form, turn, split, heads):
    """Any two of them together in one case at least."""
    assert of_all(assert_rewritten(*model(form, turn, split, heads), compiled=False), form, heads)


@pytest.mark.parametrize(("form", "batch"), [("token", 1), ("token", D), ("chunk", 1), ("chunk", CHUNK), ("chunk", 24)])
def test_a_chunk_as_long_as_something_else(form, batch):
    """That a chunk is as long as the batch is large, or its matrices wide, makes it no sequence."""
    assert of_all(assert_rewritten(*model(form, batch=batch), compiled=False), form)


# -------------------------------------------------------------------------------------------------------------- twins


def states_exchanged(layer, x, states, start):
    out, states = Layer.step(layer, x, states, start)
    return out, states[::-1] if start == 4 else states


def one_head_decays_by_another_ones_rate(layer, x, states, start):
    return Layer.step(layer, x, [s * 0.9 if start == 4 and n == 1 else s for n, s in enumerate(states)], start)


def one_head_is_of_another_part(layer, x, states, start):
    return Layer.step(layer, x.roll(1, -1) if start == 4 else x, states, start)


def positions_begin_anew(layer, x, states, start):
    return Layer.step(layer, x, states, start % 4)


def positions_of_one_head_are_late(layer, x, states, start):
    late = layer.heads[0]
    y, state = getattr(late, layer.form)(x[..., :D], states[0], start + (start == 4))
    out, rest = Layer.step(layer, x, states, start)
    return torch.cat((y, out[..., D:]), -1), (state, *rest[1:])


RECURRENCES = [states_exchanged, one_head_decays_by_another_ones_rate]
PROJECTIONS = [one_head_is_of_another_part, positions_begin_anew, positions_of_one_head_are_late]


@pytest.mark.parametrize("form", ["token", "chunk"])
@pytest.mark.parametrize("step", [*RECURRENCES, *PROJECTIONS])
def test_steps_of_another_kind(step, form):
    """Rewritten or not, they are what they are; another recurrence is no attention of all tokens and heads."""
    report = assert_rewritten(*model(form, step=step), count=None, compiled=False)
    assert step not in RECURRENCES or not of_all(report, form)


@pytest.mark.parametrize("step", [one_head_decays_by_another_ones_rate, one_head_is_of_another_part])
def test_steps_of_another_kind_among_many(step):
    """Of twelve tokens there are more cases, and more summands, than are looked into."""
    assert_rewritten(*model("token", step=step, length=12), count=None, compiled=False)

"""Layers that take turns in one loop over tokens, each with a state of its own; and near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lacompile.testing import assert_refused, assert_rewritten

B, N, H, D = 2, 6, 2, 4
C = H * D
UNSEEN = {"validate": "off"}


class Layer(nn.Module):
    def __init__(self, normed=True, bias=False, gated=False, mlp=False):
        super().__init__()
        self.norm = nn.LayerNorm(C) if normed else nn.Identity()
        self.q, self.k, self.v, self.o = (nn.Linear(C, C, bias=bias) for _ in range(4))
        self.gate = nn.Linear(C, H) if gated else None
        self.mlp = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 12), nn.GELU(), nn.Linear(12, C)) if mlp else None

    def forward(self, x, state, rate=0.9):
        z, batch = self.norm(x), x.shape[0]
        q, k, v = (w(z).view(batch, H, D) for w in (self.q, self.k, self.v))
        if self.gate is not None:
            rate = self.gate(z).sigmoid()[..., None, None]
        state = rate * state + k[..., None] * v[..., None, :]
        x = x + self.o(torch.einsum("bhd,bhde->bhe", q, state).reshape(batch, C))
        return (x if self.mlp is None else x + self.mlp(x)), state


class Model(nn.Module):
    def __init__(self, count=2, written=False, returns_states=False, **kind):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(**kind) for _ in range(count))
        self.written, self.returns_states = written, returns_states

    def forward(self, x):
        states, out, into = [x.new_zeros(x.shape[0], H, D, D) for _ in self.layers], [], torch.empty_like(x)
        for t in range(x.shape[1]):
            y = x[:, t]
            for n, layer in enumerate(self.layers):
                y, states[n] = layer(y, states[n])
            if self.written:
                into[:, t] = y
            out.append(y)
        y = into if self.written else torch.stack(out, 1)
        return (y, *states) if self.returns_states else y


def data(length=N, batch=B):
    torch.manual_seed(1)
    return torch.randn(batch, length, C, requires_grad=True)


KINDS = {
    "of projections alone": {"normed": False},
    "normed": {},
    "with biases": {"bias": True},
    "gated": {"gated": True},
    "with a network behind": {"mlp": True, "gated": True},
    "written into place": {"written": True},
    "whose states are returned": {"returns_states": True},
    "three": {"count": 3},
    "four, with networks": {"count": 4, "mlp": True},
}


@pytest.mark.parametrize("name", KINDS)
def test_each_of_them_is_found(name):
    kind = KINDS[name]
    report = assert_rewritten(Model(**kind), data(), count=kind.get("count", 2), compiled=False)
    assert not report.near_misses


def test_compiled():
    assert_rewritten(Model(gated=True), data(), count=2)


@pytest.mark.parametrize(("length", "count"), [(1, 0), (2, 0), (3, 2), (4, 2)])
def test_few_tokens(length, count):
    assert_rewritten(Model(), data(length), count=count, compiled=False, options=UNSEEN)


def test_a_batch_of_any_size():
    after = (data(batch=3).detach(),)
    assert_rewritten(Model(), data(batch=5), count=2, compiled=False, after=after)


def step(between=lambda t, x, h, s: h, before=lambda t, x, last, s: x[:, t], rate=lambda n, t: 0.9, behind=None):
    """Two layers in a loop, with something done before the first, between them, or behind the second."""

    class Twin(Model):
        def forward(self, x):
            first, second = self.layers
            states, out, last = [x.new_zeros(B, H, D, D)] * 2, [], torch.zeros_like(x[:, 0])
            x = x * 1.0
            for t in range(N):
                h, states[0] = first(before(t, x, last, states), states[0], rate(0, t))
                h = between(t, x, h, states)
                last, states[1] = second(h, states[1], rate(1, t))
                if behind is not None:
                    behind(t, x, h, last)
                out.append(last)
            return torch.stack(out, 1)

    return Twin()


def test_more_that_is_done_to_each_token():
    model = step(between=lambda t, x, h, s: F.silu(h) + x[:, t])
    assert_rewritten(model, data(), count=2, compiled=False)


def fed_back(t, x, h, last):
    if t + 1 < N:
        x[:, t + 1] += last


TWINS = {
    "the first reads what the second left": step(before=lambda t, x, last, s: x[:, t] + last),
    "the first reads the second's state": step(before=lambda t, x, last, s: x[:, t] + s[1].sum((1, 2)).repeat(1, H)),
    "through memory": step(behind=fed_back),
    "written before the second reads it": step(between=lambda t, x, h, s: h.mul_(0.5)),
    "written behind the second": step(behind=lambda t, x, h, last: h.mul_(2)),
    "the input is written": step(behind=lambda t, x, h, last: x.mul_(0.9)),
}


@pytest.mark.parametrize("name", TWINS)
def test_layers_that_need_each_other(name):
    assert_refused(TWINS[name], data(), options=UNSEEN)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_token_that_decays_otherwise(layer):
    """The other layer is an attention still."""
    model = step(rate=lambda n, t: 0.5 if (n, t) == (layer, 3) else 0.9)
    assert_rewritten(model, data(), count=1, compiled=False, options=UNSEEN)


def test_what_draws_random_numbers_stays_where_it_is():
    assert_refused(step(between=lambda t, x, h, s: F.dropout(h, 0.5)), data(), options=UNSEEN)


def test_a_part_without_gradients():
    def between(t, x, h, s):
        with torch.no_grad():
            more = 2 * h
        return h + more

    assert_rewritten(step(between=between), data(), count=0, compiled=False, options=UNSEEN)


def test_results_that_are_returned_one_by_one():
    class Returned(Model):
        def forward(self, x):
            first, second = self.layers
            states, out, between = [x.new_zeros(B, H, D, D)] * 2, [], []
            for t in range(N):
                h, states[0] = first(x[:, t], states[0])
                y, states[1] = second(h, states[1])
                out.append(y)
                between.append(h)
            return torch.stack(out, 1), *between

    assert_rewritten(Returned(), data(), count=0, compiled=False, options=UNSEEN)

"""Layers that take turns in one loop over chunks, each with a state of its own, as in a prefill; and twins."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lacompile.testing import assert_rewritten

B, N, H, D, CHUNK = 2, 12, 2, 4, 4
C = H * D
UNSEEN = {"validate": "off"}


class Layer(nn.Module):
    """One chunk ``[B,c,C]`` and the state before it to what is left of the chunk and the state behind it."""

    def __init__(self, normed=True, gated=False, mlp=False):
        super().__init__()
        self.norm = nn.LayerNorm(C) if normed else nn.Identity()
        self.q, self.k, self.v, self.o = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.gate = nn.Linear(C, H) if gated else None
        self.mlp = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 12), nn.GELU(), nn.Linear(12, C)) if mlp else None

    def forward(self, x, state):
        batch, chunk, _ = x.shape
        z = self.norm(x)
        q, k, v = (w(z).view(batch, chunk, H, D).transpose(1, 2) for w in (self.q, self.k, self.v))
        if self.gate is None:
            sums = (-0.1 * torch.arange(1, chunk + 1)).expand(batch, H, chunk)
        else:
            sums = nn.functional.logsigmoid(self.gate(z)).mT.cumsum(-1)
        inside = (q @ k.mT * (sums[..., None] - sums[..., None, :]).exp().tril()) @ v
        y = inside + (q * sums.exp()[..., None]) @ state
        last = sums[..., -1:]
        state = last[..., None].exp() * state + (k * (last - sums).exp()[..., None]).mT @ v
        x = x + self.o(y.transpose(1, 2).reshape(batch, chunk, C))
        return (x if self.mlp is None else x + self.mlp(x)), state


class Model(nn.Module):
    def __init__(self, count=2, returns_states=False, written=False, **kind):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(**kind) for _ in range(count))
        self.returns_states, self.written = returns_states, written

    def before(self, x, states, last):
        return x

    def forward(self, x):
        states, out, into = [x.new_zeros(x.shape[0], H, D, D) for _ in self.layers], [], torch.zeros_like(x)
        y = torch.zeros_like(x[:, :CHUNK])
        for n, part in enumerate(x.split(CHUNK, 1)):
            y = self.before(part, states, y)
            for i, layer in enumerate(self.layers):
                y, states[i] = layer(y, states[i])
            if self.written:
                into[:, n * CHUNK : (n + 1) * CHUNK] = y
            out.append(y)
        y = into if self.written else torch.cat(out, 1)
        return (y, *states) if self.returns_states else y


def data(length=N, batch=B):
    torch.manual_seed(1)
    return torch.randn(batch, length, C, requires_grad=True)


KINDS = {
    "of projections alone": {"normed": False},
    "with networks behind": {"mlp": True},
    "whose states are returned": {"returns_states": True},
    "three, with networks, gated": {"count": 3, "gated": True, "mlp": True},
}


@pytest.mark.parametrize("name", KINDS)
def test_each_of_them_is_found(name):
    kind = KINDS[name]
    report = assert_rewritten(Model(**kind), data(), count=kind.get("count", 2), compiled=False)
    assert not report.near_misses
    assert {r.length for r in report.rewrites} == {str(N)}


def test_a_last_chunk_that_is_shorter():
    report = assert_rewritten(Model(gated=True), data(N + 3), count=2, compiled=False)
    assert {r.length for r in report.rewrites} == {str(N + 3)}


def test_chunks_of_one_sequence():
    assert_rewritten(Model(), data(batch=1), count=2, compiled=False)


def test_compiled():
    assert_rewritten(Model(), data(), count=2)


class FedBack(Model):
    """The first layer reads what the last one left of the chunk before."""

    def before(self, x, states, last):
        return x + last


class ReadsStates(Model):
    """The first layer reads the state of the last one."""

    def before(self, x, states, last):
        return x + states[-1].mean()


@pytest.mark.parametrize("model", [FedBack, ReadsStates])
def test_layers_that_need_each_other(model):
    report = assert_rewritten(model(), data(), count=None, compiled=False, options=UNSEEN)
    assert all(r.length == str(CHUNK) for r in report.rewrites)  # chunks by themselves


class Rescaled(Model):
    """Something else is done to one chunk between the layers: both are attentions still."""

    def forward(self, x):
        first, second = self.layers
        states, out = [x.new_zeros(x.shape[0], H, D, D) for _ in self.layers], []
        for n, part in enumerate(x.split(CHUNK, 1)):
            y, states[0] = first(part, states[0])
            y, states[1] = second(3 * y if n == 1 else y, states[1])
            out.append(y)
        return torch.cat(out, 1)


def test_one_chunk_that_is_scaled_between_the_layers():
    assert_rewritten(Rescaled(), data(), count=None, compiled=False, options=UNSEEN)

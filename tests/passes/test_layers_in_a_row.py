"""Layers one after the other, each with a loop of its own that projects what it reads, without a bias."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lacompile.testing import assert_refused, assert_rewritten

B, N, H, D = 2, 6, 2, 4
WIDTH = H * D


class Layer(nn.Module):
    def __init__(self, mixture, attention):
        super().__init__()
        self.mixture, self.attention = mixture, attention
        self.shares = nn.ParameterList(torch.rand(WIDTH) for _ in range(2))
        self.maps = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x):
        *maps, out = self.maps
        return x + out(self.attention(self.mixture(x, *self.shares), *maps))


def layers(mixture, attention):
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(mixture, attention) for _ in range(2)))


def attention(z, q, k, v, decays=lambda t: 0.9):
    state, out = torch.zeros(B, H, D, D), []
    for t in range(N):
        q_t, k_t, v_t = (w(z[:, t : t + 1]).view(B, 1, H, D).transpose(1, 2) for w in (q, k, v))
        state = decays(t) * state + k_t.mT @ v_t
        out.append(q_t @ state)
    return torch.cat(out, 2).transpose(1, 2).reshape(B, N, WIDTH)


def before(x):
    """Of each token the one before it."""
    return F.pad(x, (0, 0, 1, -1))


MIXTURES = {
    "shares that add up to one": lambda x, a, b: x * a + before(x) * (1 - a),
    "shares of their own": lambda x, a, b: x * a + before(x) * b,
    "functions of shares": lambda x, a, b: x * a.sigmoid() + before(x) * b.tanh(),
    "of one token": lambda x, a, b: x * a,
}


@pytest.mark.parametrize("name", MIXTURES)
def test_each_of_them_is_found(name):
    report = assert_rewritten(layers(MIXTURES[name], attention), torch.randn(B, N, WIDTH), count=2, compiled=False)
    assert not report.near_misses


def test_tokens_that_decay_otherwise():
    def another(*given):
        return attention(*given, decays=lambda t: 0.8 if t == 5 else 0.9)

    assert_refused(layers(MIXTURES["shares of their own"], another), torch.randn(B, N, WIDTH))


class OfPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = (nn.Parameter(torch.randn(N, D)) for _ in range(2))

    def forward(self, v):
        return (self.q @ self.k.mT).tril() @ v


def test_queries_and_keys_that_are_parameters():
    """What is multiplied by two of them is no projection where rows and columns are theirs."""
    assert_rewritten(OfPositions(), torch.randn(B, N, D), compiled=False)

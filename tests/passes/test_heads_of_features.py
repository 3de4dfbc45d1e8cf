"""Heads that are parts of the features, each with projections of its own, as a list of modules; and near twins."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lacompile.testing import assert_refused, assert_rewritten

from .forms import distance

B, H, N, D, C = 2, 3, 8, 4, 4
RATES = (1 - torch.exp(torch.linspace(-3.5, -6.2, H))).tolist()


class Head(nn.Module):
    def __init__(self, gamma):
        super().__init__()
        self.gamma = gamma
        self.q, self.k, self.v = (nn.Parameter(torch.randn(D, D) / D) for _ in range(3))

    def project(self, x):
        return x @ self.q, x @ self.k, x @ self.v

    def triangle(self, n):
        mask = (self.gamma ** distance(n)) * (distance(n) >= 0).float()
        mask[mask != mask] = 0
        return mask


def square(head, x):
    q, k, v = head.project(x)
    return (q @ k.permute(0, 2, 1) * head.triangle(x.shape[1])) @ v


def tokens(head, x):
    state, out = torch.zeros(B, D, D), []
    for t in range(x.shape[1]):
        q, k, v = head.project(x[:, t : t + 1])
        state = head.gamma * state + k.transpose(-1, -2) @ v
        out.append(q @ state)
    return torch.cat(out, 1)


def tokens_by_index(head, x):
    state, out = torch.zeros(B, D, D), []
    for t in range(x.shape[1]):
        q, k, v = head.project(x[:, t])
        state = head.gamma * state + k[:, :, None] * v[:, None]
        out.append((q[:, None] @ state)[:, 0])
    return torch.stack(out, 1)


def chunks(head, x):
    state, out, inside = torch.zeros(B, D, D), [], head.triangle(C)
    for a in range(0, x.shape[1], C):
        q, k, v = head.project(x[:, a : a + C])
        across = torch.zeros(B, C, 1)
        for j in range(C):
            across[:, j] = head.gamma ** (j + 1)
        out.append((q @ k.mT * inside) @ v + (q @ state) * across)
        state = k.mT @ (v * inside[-1].view(1, C, 1)) + head.gamma**C * state
    return torch.cat(out, 1)


class One(Head):
    def forward(self, x):
        return tokens(self, x)


class Layer(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form
        self.heads = nn.ModuleList([Head(gamma) for gamma in RATES])
        self.norm = nn.GroupNorm(H, H * D)

    def forward(self, x):
        parts = [self.form(head, x[:, :, n * D : (n + 1) * D]) for n, head in enumerate(self.heads)]
        joined = torch.cat(parts, 2)
        return self.norm(joined.reshape(-1, H * D)).reshape(joined.shape)


@pytest.mark.parametrize("form", [square, tokens, tokens_by_index, chunks])
def test_a_list_of_heads(form):
    torch.manual_seed(0)
    assert_rewritten(Layer(form), torch.randn(B, N, H * D), count=1, compiled=False)


@pytest.mark.parametrize("n", [6, D, 2 * D])
def test_one_head_of_any_length(n):
    torch.manual_seed(0)
    assert_rewritten(One(0.9), torch.randn(B, n, D), compiled=False)


def leaky(head, x):
    """Reads what the next token has already written."""
    state, out = torch.zeros(B, D, D), []
    q, k, v = head.project(x)
    for t in range(N):
        now = min(t + 1, N - 1)
        state = head.gamma * state + k[:, now, :, None] * v[:, now, None]
        out.append((q[:, t, None] @ state)[:, 0])
    return torch.stack(out, 1)


def test_a_twin():
    torch.manual_seed(0)
    assert_refused(Layer(leaky), torch.randn(B, N, H * D))

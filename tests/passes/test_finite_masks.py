"""Large numbers that stand for minus infinity in the exponent of a decay; smaller ones, and factors that grow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv
from .forms import distance

B, H, N, D, E = 2, 3, 64, 8, 6
FAST = 20.0  # gates that decay so much that what stands above the diagonal would be infinite alone


def arguments():
    q, k, v = qkv(B, H, N, D, E)
    gate, slope = FAST * torch.randn(B, H, N), torch.tensor([0.1, 2.0, 8.0])
    return q, k, v, gate.requires_grad_(), slope.requires_grad_()


def pairs(gate):
    run = F.logsigmoid(gate).cumsum(-1)
    return run[..., :, None] - run[..., None, :]


MASKS = {
    "where": lambda n: torch.where(distance(n) < 0, torch.finfo(torch.float32).min, 0.0),
    "triu": lambda n: torch.full((n, n), -1e9).triu(1),
    "one less": lambda n: -1e9 * (1 - torch.ones(n, n).tril()),
    "not": lambda n: -1e30 * (~torch.ones(n, n).tril().bool()).float(),
}


@pytest.mark.parametrize("mask", MASKS)
def test_beside_gates(mask):
    def f(q, k, v, gate, slope):
        return (q @ k.mT * torch.exp(pairs(gate) + MASKS[mask](N))) @ v

    assert_rewritten(f, *arguments(), compiled=False)


@pytest.mark.parametrize("mask", MASKS)
def test_beside_slopes(mask):
    def f(q, k, v, gate, slope):
        return (q @ k.mT * torch.exp(MASKS[mask](N) - slope.abs()[:, None, None] * distance(N))) @ v

    assert_rewritten(f, *arguments(), compiled=False)


class Masked(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.register_buffer("mask", torch.full((N, N), number).triu(1))

    def forward(self, q, k, v, gate, slope):
        return (q @ k.mT * torch.exp(pairs(gate) + self.mask)) @ v


@pytest.mark.parametrize("number", [float("-inf"), torch.finfo(torch.float32).min, -1e9])
def test_a_buffer(number):
    assert_rewritten(Masked(number), *arguments(), compiled=False)


def too_small(q, k, v, gate, slope):
    """Gates may decay as much as this between two tokens: then it hides nothing."""
    return (q @ k.mT * torch.exp(pairs(gate) + torch.full((N, N), -1e4).triu(1))) @ v


def too_small_for_a_slope(q, k, v, gate, slope):
    return (q @ k.mT * torch.exp(-slope[:, None, None] * distance(N) + torch.full((N, N), -1e4).triu(1))) @ v


def many_steps(q, k, v, gate, slope):
    return (q @ k.mT * slope.sigmoid()[:, None, None] ** (distance(N) + torch.full((N, N), 1e4).triu(1))) @ v


def growing_gates(q, k, v, gate, slope):
    state, out = torch.zeros(B, H, D, E), []
    for t in range(8):
        state = (1 + gate[:, :, t].sigmoid())[..., None, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(out, 2)


def growing_slopes(q, k, v, gate, slope):
    return (q @ k.mT * torch.exp(F.softplus(slope)[:, None, None] * distance(N)).tril()) @ v


def growing_numbers(q, k, v, gate, slope):
    return (q @ k.mT * (torch.tensor([0.9, 0.8, 1.1])[:, None, None] ** distance(N)).tril()) @ v


@pytest.mark.parametrize(
    "twin",
    [too_small, too_small_for_a_slope, many_steps, growing_gates, growing_slopes, growing_numbers],
)
def test_near_twins(twin):
    assert_refused(twin, *arguments())

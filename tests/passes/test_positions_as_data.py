"""Positions that are added to the tokens before these are projected; and near twins."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lacompile.testing import assert_refused, assert_rewritten

B, N, H, D = 2, 7, 2, 4
C = H * D


class Attention(nn.Module):
    def __init__(self, add, far=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.add, self.far = add, far
        self.step, self.share = nn.Parameter(torch.randn(C) / 8), nn.Parameter(torch.rand(1))
        self.maps = nn.ModuleList(nn.Linear(C, C, bias=False) for _ in range(3))

    def forward(self, x):
        n = x.shape[1]
        i = torch.arange(n)
        x = self.add(self, x, i[:, None])
        q, k, v = (w(x).view(-1, n, H, D).transpose(1, 2) for w in self.maps)
        apart = i[:, None] - i
        weights = torch.where(apart >= 0, 0.9 ** apart.clamp(0).float(), 0.0)
        if self.far != 1:
            weights = torch.where(apart == 5, weights * self.far, weights)
        return (q @ k.mT * weights) @ v


ADDED = {
    "a position times a direction": lambda m, x, i: x + i * m.step,
    "in fractions": lambda m, x, i: x + i.float() * m.step,
    "a share of the position": lambda m, x, i: x + i * m.share,
    "a share of the length": lambda m, x, i: x + i / x.shape[1],
    "the position": lambda m, x, i: x + i,
    "taken away": lambda m, x, i: m.step * i - x,
    "to tokens that are scaled": lambda m, x, i: x * m.share + i * m.step,
}


@pytest.mark.parametrize("name", ADDED)
def test_what_is_projected_is_data(name):
    x = torch.randn(B, N, C, requires_grad=True)
    report = assert_rewritten(Attention(ADDED[name]), x, compiled=False)
    assert not report.near_misses


def test_of_any_length():
    model = Attention(ADDED["a position times a direction"])
    made = (torch.randn(B, n, C, requires_grad=True) for n in (11, 8))
    assert_rewritten(model, next(made), compiled=False, after=(next(made),))


def test_weights_of_another_kind():
    assert_refused(Attention(ADDED["a position times a direction"], far=2.0), torch.randn(B, N, C))


def test_rates_that_positions_are_multiplied_by_are_looked_into():
    """A sum of parameters and their multiples is no data: it may be how fast heads decay."""

    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.start, self.step = nn.Parameter(torch.rand(H)), nn.Parameter(torch.rand(H))

        def forward(self, q, k, v):
            i = torch.arange(N)
            sums = (self.start + i[:, None] * self.step).T
            weights = torch.exp(sums[:, None] - sums[:, :, None]).tril()
            return (q @ k.mT * weights) @ v

    given = (x.requires_grad_() for x in torch.randn(3, B, H, N, D))
    assert_rewritten(Learned(), *given, compiled=False)

"""What a program does to numbers that are none, where it has none: a mask divided by its row sums."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lacompile.decision import decide
from lacompile.options import Options
from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv
from .forms import distance

B, H, N, D = 2, 2, 12, 4

DIVISORS = {
    "root": lambda m: m.sum(-1, keepdim=True).sqrt(),
    "sum": lambda m: m.sum(-1, keepdim=True),
    "detached": lambda m: m.sum(-1, keepdim=True).detach().clamp(min=1.0),
}
AFTER = {
    "nan_to_num": lambda m: torch.nan_to_num(m, nan=0.0),
    "isnan": lambda m: m.masked_fill(m.isnan(), 0.0),
    "itself": lambda m: torch.where(m == m, m, 0.0),
}


class Retention(nn.Module):
    """``mask`` makes the weights of a slope for each head."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("decay", torch.log(1 - 2.0 ** (-2 - torch.arange(H))))
        self.mask = mask

    def forward(self, q, k, v):
        return (q @ k.mT * self.mask(self.decay[:, None, None])) @ v


def weights(decay, shift=0):
    d = distance(N) - shift
    return torch.nan_to_num(torch.exp(decay * d.float().masked_fill(d < 0, float("inf"))))


@pytest.mark.parametrize("by", DIVISORS)
@pytest.mark.parametrize("after", AFTER)
def test_a_mask_divided_by_its_row_sums(by, after):
    def mask(decay):
        m = weights(decay)
        return AFTER[after](m / DIVISORS[by](m))

    report = assert_rewritten(Retention(mask), *qkv(B, H, N, D), count=2, compiled=False)
    assert {r.dv for r in report.rewrites} == {D, 1}


TWINS = {
    "rows of nothing": lambda m, decay: weights(decay, 1) / weights(decay, 1).sum(-1, keepdim=True),
    "less than itself": lambda m, decay: m / (m.sum(-1, keepdim=True) - 1.0),
    "too small": lambda m, decay: 1e-6 * m / (1e-6 * m).sum(-1, keepdim=True),
}


@pytest.mark.parametrize("twin", TWINS)
def test_a_mask_divided_by_what_may_be_nothing(twin):
    """0 / 0 is what the program makes 0 of."""

    def mask(decay):
        return torch.nan_to_num(TWINS[twin](weights(decay), decay), nan=0.0)

    assert_refused(Retention(mask), *qkv(B, H, N, D))


def test_rows_that_become_nothing():
    """Each weight decays with its row alone: none of a later row is a number that no format takes for nothing."""

    def mask(decay):
        m = torch.exp(decay * torch.arange(N)[:, None]).expand(-1, N, N).tril()
        return torch.nan_to_num(m / m.sum(-1, keepdim=True), nan=0.0)

    assert_refused(Retention(mask), *qkv(B, H, N, D))


def test_scores_that_may_be_none():
    def run(q, k, v):
        a = (q @ k.mT).tril()
        return torch.nan_to_num(a / a.sum(-1, keepdim=True), nan=0.0) @ v

    assert_refused(run, *qkv(B, H, N, D))


def test_sums_that_may_overflow():
    """Whether a sum of weights is infinite is not known of it, as it is not of a weight."""

    def mask(decay):
        m = weights(decay)
        total = m.sum(-1, keepdim=True).sqrt()
        return m / torch.where(total.isinf(), 1.0, total)

    left = []

    def backend(gm, example_inputs):
        left.extend(str(n.target) for n in decide(gm, example_inputs, Options()).rewritten.graph.nodes)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Retention(mask), backend=backend)(*qkv(B, H, N, D))
    assert any("isinf" in name for name in left)
    assert_rewritten(Retention(mask), *qkv(B, H, N, D), count=2, compiled=False)

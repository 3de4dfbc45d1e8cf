"""Retention with all that belongs to it: rotated projections, a mask and scores divided by their row sums."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lacompile import explain
from lacompile.testing import assert_refused, assert_rewritten

from .forms import distance

B, H, N, D = 2, 2, 12, 8


def halves(x):
    return torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)


def pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


class Retention(nn.Module):
    """``turn`` rotates, ``divide`` normalises the scores, ``own`` is what else is done to the keys."""

    def __init__(self, turn=pairs, divide=None, own=None, normalised=True):
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(H * D, H * D, bias=False) for _ in range(3))
        self.register_buffer("decay", torch.log(1 - 2.0 ** (-2 - torch.arange(H))))
        self.turn, self.divide, self.own, self.normalised = turn, divide, own, normalised

    def mask(self, n):
        weight = torch.exp(self.decay[:, None, None] * distance(n).float().masked_fill(distance(n) < 0, float("inf")))
        weight = torch.nan_to_num(weight)
        return weight / weight.sum(-1, keepdim=True).sqrt() if self.normalised else weight

    def forward(self, x):
        n = x.shape[1]
        q, k, v = (f(x) for f in self.qkv)
        k *= D**-0.5
        if self.own is not None:
            self.own(k)
        q, k, v = (t.view(B, n, H, D).transpose(1, 2) for t in (q, k, v))
        speed = 100.0 ** -torch.linspace(0, 1, D // 2)
        speed = torch.stack((speed, speed), -1).flatten() if self.turn is pairs else torch.cat((speed, speed))
        angle = torch.arange(n)[:, None] * speed
        q, k = (t * angle.cos() + self.turn(t) * angle.sin() for t in (q, k))
        scores = q @ k.mT * self.mask(n)
        if self.divide is not None:
            scores = scores / self.divide(scores)
        return (scores @ v).transpose(1, 2).reshape(B, n, H * D)


def model(**options):
    torch.manual_seed(0)
    return Retention(**options), torch.randn(B, N, H * D)


DIVISORS = {
    "detached": lambda s: s.detach().sum(-1, keepdim=True).abs().clamp(min=1),
    "not detached": lambda s: s.sum(-1, keepdim=True).abs().clamp(min=1),
}


@pytest.mark.parametrize("turn", [pairs, halves])
def test_rotated_projections(turn):
    """The rotated keys are read from the value that holds them."""
    report = assert_rewritten(*model(turn=turn, normalised=False), count=1, compiled=False)
    assert report.nodes_after < report.nodes_before


@pytest.mark.parametrize("name", DIVISORS)
def test_all_of_it(name):
    """The scores' sums, the attention, and the row sums of the mask: nothing of the square is left."""
    layer, x = model(divide=DIVISORS[name])
    report = assert_rewritten(layer, x, count=3, compiled=False)
    assert not report.near_misses


def test_any_length():
    layer, x = model(divide=DIVISORS["detached"])
    report = assert_rewritten(layer, x, count=3, compiled=False, after=[torch.randn(B, N + 4, H * D)])
    assert not any(r.length.isdigit() for r in report.rewrites)


def test_sums_of_sizes_are_another_normaliser():
    """The sum of absolute scores stays a product of its own, by which each row is divided; so do the mask that it is
    of, and the row sums of that.
    """
    layer, x = model(divide=lambda s: s.detach().abs().sum(-1, keepdim=True).clamp(min=1))
    report = assert_rewritten(layer, x, compiled=False)
    assert {r.dv for r in report.rewrites} == {D}


@pytest.mark.parametrize(
    "write",
    [
        lambda k: k.mul_(2.0),
        lambda k: k[:, 3:5].mul_(3.0),
        lambda k: k.mul_(torch.sigmoid(k[..., :1])),
        lambda k: k.view(B, -1, H, D).transpose(1, 2).mul_(torch.tensor([1.0, -2.0])[:, None, None]),
    ],
    ids=["again", "a part", "by itself", "a view"],
)
def test_keys_that_are_written_to(write):
    """Rewritten or not, what was written is seen."""
    layer, x = model(own=write, normalised=False)
    torch._dynamo.reset()
    count = len(explain(layer)(x).rewrites)
    assert_rewritten(layer, x, count=count, compiled=False)


def test_row_sums_alone_stay():
    """Without an attention beside them they are a small sum like any other."""

    class Sums(Retention):
        def forward(self, x):
            return x * self.mask(x.shape[1]).sum(-1).sum(0)[:, None].sqrt()

    torch.manual_seed(0)
    assert_refused(Sums(), torch.randn(B, N, H * D))


def test_row_sums_of_another_weight():
    """A mask is divided by its own row sums, or by those of another decay; neither is confused with the other."""

    class Other(Retention):
        def mask(self, n):
            d = distance(n)
            weight = torch.where(d >= 0, torch.exp(self.decay[:, None, None] * d), 0.0)
            other = torch.where(d >= 0, torch.exp(2 * self.decay[:, None, None] * d), 0.0)
            return weight / other.sum(-1, keepdim=True).sqrt()

    torch.manual_seed(0)
    assert_rewritten(Other(), torch.randn(B, N, H * D), count=2, compiled=False)

"""Buffers of one decay for all heads: its powers, its triangle, beside the number itself; and near twins."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D, E, C = 2, 3, 12, 8, 6, 4
G = 0.9
SHAPE = (B, H, N, D, E)


class Chunks(nn.Module):
    """The decay of a chunk (``at_once``) and the factors of its rows and keys are buffers, or made as it runs."""

    def __init__(self, at_once=lambda m: m.g**C, row=lambda m: m.up, key=lambda m: m.down, by=1.0):
        super().__init__()
        i = torch.arange(C).float()
        self.g, self.at_once, self.row, self.key = G, at_once, row, key
        self.register_buffer("mask", torch.where(i[:, None] >= i, G ** (i[:, None] - i), 0.0))
        self.register_buffer("up", by * G ** (i + 1))
        self.register_buffer("down", G ** (C - 1 - i))
        self.register_buffer("whole", torch.tensor(G**C))

    def forward(self, q, k, v):
        state, out = torch.zeros(B, H, D, E), []
        for a in range(0, N, C):
            qq, kk, vv = (x[:, :, a : a + C] for x in (q, k, v))
            out.append((qq @ kk.mT * self.mask) @ vv + (qq * self.row(self)[:, None]) @ state)
            state = self.at_once(self) * state + (kk * self.key(self)[:, None]).mT @ vv
        return torch.cat(out, 2)


CHUNKS = {
    "vectors and a number": Chunks(),
    "all three": Chunks(lambda m: m.whole),
    "a mask alone": Chunks(row=lambda m: m.g ** (torch.arange(C) + 1), key=lambda m: m.g ** (C - 1 - torch.arange(C))),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_of_a_loop_over_chunks(name):
    assert_rewritten(CHUNKS[name], *qkv(*SHAPE), compiled=False)


class Powers(nn.Module):
    def __init__(self, weigh, of=None):
        super().__init__()
        self.weigh = weigh
        self.register_buffer("powers", G ** torch.arange(N).float() if of is None else of)

    def forward(self, q, k, v):
        return self.weigh(self.powers, q, k, v)


def by_distance(powers, q, k, v):
    i = torch.arange(N)
    return (q @ k.mT * powers[(i[:, None] - i).clamp(min=0)].tril()) @ v


def by_rows(powers, q, k, v):
    rows = range(N)
    scores = (q[:, :, i : i + 1] @ k[:, :, : i + 1].mT * powers[: i + 1].flip(0) for i in rows)
    return torch.cat([s @ v[:, :, : i + 1] for i, s in zip(rows, scores, strict=True)], 2)


@pytest.mark.parametrize("weigh", [by_distance, by_rows])
def test_without_a_triangle(weigh):
    assert_rewritten(Powers(weigh), *qkv(*SHAPE), compiled=False)


def test_slopes_that_are_powers_remain_slopes():
    """Those of ALiBi are, and may be changed between calls as any buffer."""

    def weigh(slopes, q, k, v):
        i = torch.arange(N)
        return (q @ k.mT * torch.exp(-slopes[:, None, None] * (i[:, None] - i)).tril()) @ v

    q, k, v = qkv(B, 8, N, D, E)
    assert_rewritten(Powers(weigh, 2.0 ** -torch.arange(1, 9).float()), q, k, v, compiled=False)


def test_another_rate_in_the_rows():
    assert_refused(Chunks(by=0.999), *qkv(*SHAPE))


def test_another_rate_of_chunks():
    assert_refused(Chunks(lambda m: 0.899**C), *qkv(*SHAPE))


def test_powers_of_which_one_is_off():
    powers = G ** torch.arange(N).float()
    powers[5] *= 1.0001
    assert_refused(Powers(by_distance, powers), *qkv(*SHAPE))


class Square(nn.Module):
    """A mask of so many positions that its weights are none in the end, in whose format they are computed."""

    def __init__(self, rate=0.5, n=160, window=None):
        super().__init__()
        i = torch.arange(n)
        gap = i[:, None] - i
        inside = (gap >= 0) if window is None else (gap >= 0) & (gap < window)
        self.register_buffer("mask", torch.where(inside, rate ** gap.clamp(min=0).float(), 0.0))

    def forward(self, q, k, v):
        return (q @ k.mT * self.mask) @ v


@pytest.mark.parametrize("rate", [0.5, 0.1, 1e-30])
def test_weights_that_underflow(rate):
    square = Square(rate)
    assert (square.mask.diagonal(-159) == 0).all()
    assert_rewritten(square, *qkv(1, 2, 160, 4), compiled=False)


@pytest.mark.parametrize("window", [2, 41, 120])
def test_weights_that_end_before_they_underflow(window):
    assert_refused(Square(window=window), *qkv(1, 2, 160, 4), obligation="causal-range")

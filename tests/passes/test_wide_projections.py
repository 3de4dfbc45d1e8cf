"""One projection for all heads' q, k and v and for more beside them: parts of a dimension in steps that end with it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lacompile.testing import assert_rewritten

from .drawn import qkv

B, H, N, D = 2, 3, 8, 4
C = H * D


def attention(q, k, v):
    return (q @ k.mT).tril() @ v


def gated(q, k, v, g):
    decays = F.logsigmoid(g).mT.cumsum(-1)
    return (q @ k.mT * (decays[..., None] - decays[..., None, :]).exp().tril()) @ v


def by_heads(y, order=(0, 1, 2)):
    """q, k and v of ``[B, N, 3 C]``, those of a head beside each other."""
    parts = y.unflatten(-1, (H, 3 * D)).transpose(1, 2).split(D, -1)
    return [parts[n] for n in order]


def gates_last(y):
    return gated(*by_heads(y[..., : 3 * C]), y[..., 3 * C : 3 * C + H])


def gates_first(y):
    return gated(*by_heads(y[..., H : H + 3 * C]), y[..., :H])


def gates_in_front_of_the_last(y):
    return gated(*by_heads(y[..., -3 * C :]), y[..., -3 * C - H : -3 * C])


def grouped(y):
    """Two queries for each key and value."""
    y = y[..., : 8 * D].unflatten(-1, (2, 4, D))
    q, k, v = y[:, :, :, :2], y[:, :, :, 2:3].expand(-1, -1, -1, 2, -1), y[:, :, :, 3:].expand(-1, -1, -1, 2, -1)
    return attention(*(t.flatten(2, 3).transpose(1, 2) for t in (q, k, v)))


def in_threes(y):
    return attention(*y[..., 1 : 1 + 3 * C].unflatten(-1, (H, D, 3)).transpose(1, 2).unbind(-1))


PARTS = {
    "gates behind": gates_last,
    "gates in front": gates_first,
    "counted from the end": gates_in_front_of_the_last,
    "keys, values, queries": lambda y: attention(*by_heads(y[..., : 3 * C], (2, 0, 1))),
    "gates that are a head's first query": lambda y: gated(*by_heads(y[..., : 3 * C]), y[..., :H]),
    "turned heads": lambda y: attention(*(t.flip(1) for t in by_heads(y[..., : 3 * C]))),
    "features in threes": in_threes,
    "groups": grouped,
}


@pytest.mark.parametrize("more", [H + 2, 3 * D - 1, 3 * D, 3 * D + 1])
@pytest.mark.parametrize("name", PARTS)
def test_parts_of_one_projection(name, more):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(C, 3 * C + more)

        def forward(self, x):
            return PARTS[name](self.project(x))

    assert_rewritten(Layer(), torch.randn(B, N, C), compiled=False)


def test_heads_that_overlap():
    """Each head begins in the last features of the one before."""

    def run(x):
        heads = x.unfold(-1, 3 * D, 2 * D).transpose(1, 2)
        return attention(*heads.split(D, -1))

    assert_rewritten(run, torch.randn(B, N, H * 2 * D + D + 1, requires_grad=True), compiled=False)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("step", [2, 3])
def test_every_few_tokens_of_a_length_that_is_no_multiple(first, step):
    def run(q, k, v):
        return attention(*(t[:, :, first::step] for t in (q, k, v)))

    assert_rewritten(run, *qkv(B, H, 6 * step + 1, D), compiled=False)


def test_every_other_feature():
    def run(q, k, v):
        return attention(q[..., ::2], k[..., 1::2], v)

    q, _, v = qkv(B, H, N, 2 * D - 1)
    assert_rewritten(run, q, torch.randn(B, H, N, 2 * D), v, compiled=False)

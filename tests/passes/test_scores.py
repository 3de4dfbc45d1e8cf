"""What is done to the scores q k^T before they read v: masks of rows and keys, sums of several scores, row sums."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.backend import decide
from lacompile.options import Options
from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D = 2, 3, 12, 4
ABOVE = torch.ones(N, N, dtype=torch.bool).triu(1)


def padding():
    return torch.arange(N)[None] >= torch.tensor([N, N - 3])[:, None]


FIRST = {
    "filled": lambda s, pad, x: s.masked_fill(pad[:, None, None], 0.0),
    "times_keys": lambda s, pad, x: s * (~pad)[:, None, None].to(s.dtype),
    "times_rows": lambda s, pad, x: s * x[..., None],
    "times_heads": lambda s, pad, x: s * x[0, :, :1, None],
}


@pytest.mark.parametrize("first", FIRST)
def test_a_factor_of_rows_or_keys_before_the_causal_mask(first):
    def run(q, k, v, pad, x):
        return FIRST[first](q @ k.mT, pad, x).masked_fill(ABOVE, 0.0) @ v

    assert_rewritten(run, *qkv(B, H, N, D), padding(), torch.randn(B, H, N, requires_grad=True), compiled=False)


def test_a_factor_of_pairs_before_the_causal_mask():
    def run(q, k, v, x):
        return (q @ k.mT * x).tril() @ v

    assert_refused(run, *qkv(B, H, N, D), torch.randn(N, N))


def by_decay(x):
    sums = F.logsigmoid(x).cumsum(-1)
    return (sums[..., :, None] - sums[..., None, :]).exp().tril()


SUMS = {
    "two scores": (2, lambda q, k, x: (q.sin() @ k.sin().mT + q.cos() @ k.cos().mT).tril()),
    "one less another": (2, lambda q, k, x: (q @ k.mT - 0.5 * (q.exp() @ k.exp().mT)) * by_decay(x)),
    "two decays": (2, lambda q, k, x: (q @ k.mT) * (by_decay(x) + by_decay(2 * x))),
    "one more": (2, lambda q, k, x: (1 + q @ k.mT).tril()),
}


@pytest.mark.parametrize("sums", SUMS)
def test_scores_that_are_a_sum(sums):
    count, scores = SUMS[sums]

    def run(q, k, v, x):
        return scores(q, k, x) @ v

    assert_rewritten(run, *qkv(B, H, N, D), torch.randn(B, H, N, requires_grad=True), compiled=False, count=count)


def test_a_sum_of_which_one_part_sees_later_positions():
    def run(q, k, v):
        return ((q @ k.mT).tril() + q.cos() @ k.cos().mT) @ v

    assert_refused(run, *qkv(B, H, N, D))


def test_many_products_of_features():
    """The square of scores is a sum over pairs of features: with many features a tensor larger than the scores."""

    def run(q, k, v):
        scores = q @ k.mT
        return (1 + scores + scores * scores / 2).tril() @ v

    assert_rewritten(run, *qkv(B, H, N, D), compiled=False, count=3)
    assert_refused(run, *qkv(1, 1, N, 32))


@pytest.mark.parametrize("keep", [True, False])
def test_a_row_sum_that_divides_the_scores_is_read_after_it_was_rewritten(keep):
    """Beside it no square of scores is left in the graph."""

    def run(q, k, v):
        a = (q.exp() @ k.exp().mT).tril()
        total = a.sum(-1, keepdim=keep)
        return (a / (total if keep else total[..., None])) @ v

    assert_rewritten(run, *qkv(B, H, N, D), compiled=False, count=2)
    left = []

    def backend(gm, example_inputs):
        left.extend(str(n.target) for n in decide(gm, example_inputs, Options()).rewritten.graph.nodes)
        return gm.forward

    torch.compile(run, backend=backend)(*qkv(B, H, N, D))
    assert not any("tril" in name for name in left)


def test_the_keys_of_one_sequence_and_one_head():
    """They have neither batch nor head, as a matrix has that tokens are projected by; a weight of pairs tells."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 12, 4, requires_grad=True) for h in (3, 1, 1))
    place = torch.arange(12)
    weight = (torch.tensor([0.9, 0.8, 0.7])[:, None, None] ** (place[:, None] - place)).tril()

    def run(q, k, v):
        return (q @ k.mT * weight) @ v

    assert_rewritten(run, q, k, v, compiled=False)

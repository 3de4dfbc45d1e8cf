"""Powers of the scores, and polynomials of them such as the Taylor map of Based, with the row sums that divide them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D = 1, 2, 10, 4
ABOVE = torch.ones(N, N, dtype=torch.bool).triu(1)


def taylor(s):
    return 1 + s + s**2 / 2


POWERS = {
    "operator": (1, lambda s: s**2),
    "pow": (1, lambda s: torch.pow(s, 2.0)),
    "square": (1, torch.square),
    "cube": (1, lambda s: s.pow(3)),
    "of a sum": (3, lambda s: (0.5 * s + 1) ** 2),
    "taylor": (3, taylor),
}


def weighed(weights, v):
    return weights @ v


def divided(weights, v):
    return weights @ v / (weights.sum(-1, keepdim=True) + 10)


def divided_before(weights, v):
    return (weights / (weights.sum(-1, keepdim=True) + 10)) @ v


def decay(x):
    sums = F.logsigmoid(x).cumsum(-1)
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(ABOVE, float("-inf")).exp()


def arguments(d=D):
    return [*qkv(B, H, N, d), torch.randn(B, H, N, requires_grad=True)]


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("use", [weighed, divided, divided_before])
def test_without_decay(power, use):
    """The constant of a polynomial counts positions in the row sum, which takes no attention."""
    count, f = POWERS[power]

    def run(q, k, v, x):
        return use(f(q @ k.mT).tril(), v)

    total = {1: 2, 3: 5}[count] if use is not weighed else count
    assert_rewritten(run, *arguments(), compiled=False, count=total)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("use", [weighed, divided])
def test_with_decay(power, use):
    count, f = POWERS[power]

    def run(q, k, v, x):
        return use(f(q @ k.mT) * decay(x), v)

    assert_rewritten(run, *arguments(), compiled=False, count=count * (1 + (use is divided)))


def test_masked_first():
    def run(q, k, v, x):
        return torch.square((q @ k.mT).masked_fill(ABOVE, 0.0)) @ v

    assert_rewritten(run, *arguments(), compiled=False)


def test_scores_and_their_constant_divided_by_their_sum():
    def run(q, k, v, x):
        return divided((1 + q @ k.mT).tril(), v)

    assert_rewritten(run, *arguments(), compiled=False, count=3)


def test_a_power_of_an_attention_is_its_norm():
    def run(q, k, v, x):
        o = (q @ k.mT).tril() @ v
        return o * torch.rsqrt(o.pow(2).mean(-1, keepdim=True) + 1e-5)

    assert_rewritten(run, *arguments(), compiled=False)


@pytest.mark.parametrize("size", [2, 5])
def test_a_power_of_one_chunk_is_its_norm(size):
    """What a loop sums for one chunk from those before it ends at numbers: it is no score."""

    def run(q, k, v, x):
        state, out = q.new_zeros(B, H, D, D), []
        for a in range(0, N, size):
            y, u, w = (t[:, :, a : a + size] for t in (q, k, v))
            o = (y @ u.mT).tril() @ w + y @ state
            state = state + u.mT @ w
            out.append(o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1))
        return torch.cat(out, 2)

    assert_rewritten(run, *arguments(), compiled=False)


OTHERS = {
    "a polynomial of masked scores": lambda q, k, v, x: taylor((q @ k.mT).tril()) @ v,
    "an inverse": lambda q, k, v, x: ((q @ k.mT) ** -1).tril() @ v,
    "a fraction": lambda q, k, v, x: ((q @ k.mT) ** 1.5).tril() @ v,
    "of something else": lambda q, k, v, x: (q @ k.mT).softmax(-1).square().tril() @ v,
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_no_power_of_scores(other):
    assert_refused(OTHERS[other], *arguments())


def test_too_many_products():
    assert_refused(lambda q, k, v, x: (q @ k.mT).pow(4).tril() @ v, *arguments(8))

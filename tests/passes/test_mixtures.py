"""Decays that a mask of tokens, or a share, mixes with 1: padding does not decay; and near twins."""

from __future__ import annotations

import pytest
import torch

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D = 2, 2, 10, 4
COUNTS = torch.arange(N) < torch.tensor([N, N - 3])[:, None]


def arguments(mask):
    return [*qkv(B, H, N, D), torch.randn(B, H, N, requires_grad=True), mask]


def of_pairs(mix):
    def run(q, k, v, x, m):
        m = m[:, None]
        sums = mix(m, torch.sigmoid(x)).log().cumsum(-1)
        later = torch.ones(N, N, dtype=torch.bool).triu(1)
        weights = (sums[..., :, None] - sums[..., None, :]).masked_fill(later, float("-inf")).exp()
        return (q @ k.mT * weights) @ v

    return run


def over_tokens(mix):
    def run(q, k, v, x, m):
        m = m[:, None]
        decay, state, out = mix(m, torch.sigmoid(x)), q.new_zeros(B, H, D, D), []
        for t in range(N):
            state = decay[:, :, t, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
            out.append((q[:, :, t, :, None] * state).sum(-2))
        return torch.stack(out, 2)

    return run


MIXED = {
    "cast": (COUNTS, lambda m, x: m.to(x.dtype) * x + (1 - m.to(x.dtype))),
    "the opposite": (COUNTS, lambda m, x: ~m + m * x),
    "less what is left": (COUNTS, lambda m, x: 1 - m * (1 - x)),
    "a share": (torch.randn(B, N), lambda m, x: torch.sigmoid(m) * x + (1 - torch.sigmoid(m))),
    "at most a share": (torch.randn(B, N), lambda m, x: m.sin() * x + (1 - m.sin())),
    "half": (COUNTS, lambda m, x: m.to(x.dtype) * x + 0.5 * (1 - m.to(x.dtype))),
    "an input of numbers": (COUNTS.float(), lambda m, x: m * x + (1 - m)),
    "an input of integers": (COUNTS.long(), lambda m, x: m.to(x.dtype) * x + (1 - m.to(x.dtype))),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("form", [of_pairs, over_tokens])
def test_mixed_with_a_number(form, name):
    mask, mix = MIXED[name]
    report = assert_rewritten(form(mix), *arguments(mask), compiled=False)
    assert any("<= 1" in a for a in report.rewrites[0].assumptions) is name.startswith("an input")


OTHERS = {
    "no share": (torch.randn(B, N), lambda m, x: m * x + (1 - m)),
    "another share": (COUNTS.float(), lambda m, x: m * x + (1 - m.roll(1, -1))),
    "of what may be negative": (COUNTS, lambda m, x: m.to(x.dtype) * (x - 0.5) + (1 - m.to(x.dtype))),
    "a share made of data": (torch.randn(B, N), lambda m, x: (1 + m.sin()) * x - m.sin()),
    "a share that may be more": (torch.randn(B, N), lambda m, x: 2 * m.sin() * x + (1 - 2 * m.sin())),
    "less than nothing": (COUNTS, lambda m, x: m.to(x.dtype) * x - (1 - m.to(x.dtype))),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("form", [of_pairs, over_tokens])
def test_what_is_no_mixture(form, name):
    mask, mix = OTHERS[name]
    assert_refused(form(mix), *arguments(mask))


def test_the_mask_is_looked_at_in_every_call(without_inductor):
    """Of numbers that mix nothing the rewritten graph says nothing: then the program's own runs."""
    run = over_tokens(MIXED["an input of numbers"][1])
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="lightning", options={"validate": "off"})
    for mask in (COUNTS.float(), 1.5 * COUNTS.float(), COUNTS.float()):
        args = arguments(mask)
        torch.testing.assert_close(compiled(*args), run(*args), rtol=1e-3, atol=1e-4)

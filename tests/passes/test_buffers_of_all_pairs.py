"""Buffers of all pairs of positions that are made causal where they are used; and near twins."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lacompile
from lacompile.testing import assert_refused, assert_rewritten

H, L, N = 4, 64, 17
SLOPES = torch.tensor([2.0 ** -(2 * (h + 1)) for h in range(H)])[:, None, None]


def apart(n=L):
    i = torch.arange(n)
    return i[:, None] - i


def inputs(n=N):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, H, n, d, generator=generator, requires_grad=True) for d in (4, 4, 5)]


class Attention(nn.Module):
    def __init__(self, buffer, weights):
        super().__init__()
        self.weights = weights
        self.rates = nn.Parameter(torch.rand(H, 1, 1, generator=torch.Generator().manual_seed(1)))
        self.register_buffer("pairs", buffer)
        self.register_buffer("causal", torch.ones(L, L, dtype=torch.bool).tril())

    def forward(self, q, k, v):
        n = q.shape[2]
        return self.weights(self, q @ k.mT, self.pairs[..., :n, :n], self.causal[:n, :n]) @ v


def biased(m, scores, pairs, causal):
    return scores * pairs.masked_fill(~causal, float("-inf")).exp()


def chosen(m, scores, pairs, causal):
    return torch.where(causal, scores * pairs.exp(), 0.0)


def a_factor(m, scores, pairs, causal):
    return torch.tril(scores * pairs)


def a_factor_first(m, scores, pairs, causal):
    return scores * (pairs * causal)


def learned(m, scores, pairs, causal):
    return scores * torch.exp(-m.rates.exp() * pairs) * causal


FOUND = {
    "ALiBi": (-SLOPES * apart().abs(), biased),
    "ALiBi, chosen": (-SLOPES * apart().abs(), chosen),
    "ALiBi of one head": (-0.1 * apart().abs(), biased),
    "ALiBi, signed": ((-SLOPES * apart()), biased),
    "signed, chosen": ((-SLOPES * apart()), chosen),
    "of a batch": ((-SLOPES * apart().abs())[None], biased),
    "whole numbers": (apart().abs(), learned),
    "whole numbers in fp32": (apart().abs().float(), learned),
    "every other": (2 * apart().abs(), learned),
    "with a dimension for heads": (apart().abs()[None], learned),
    "weights": (torch.exp(-SLOPES * apart().abs()), a_factor),
    "weights, masked first": (torch.exp(-SLOPES * apart().abs()), a_factor_first),
    "powers": ((1 - 2.0 ** (-3 - torch.arange(H)))[:, None, None] ** apart().abs(), a_factor),
    "in bf16": (torch.exp(-SLOPES * apart().abs()).to(torch.bfloat16), a_factor),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name):
    buffer, weights = FOUND[name]
    assert_rewritten(Attention(buffer, weights), *inputs(), compiled=False)


def test_the_other_half_is_that_over_later_positions():
    def backwards(m, scores, pairs, causal):
        return torch.triu(scores * pairs)

    assert_rewritten(Attention(torch.exp(-SLOPES * apart().abs()), backwards), *inputs(), compiled=False)


def test_both_halves_are_two():
    """What comes before and what comes later: a sum of two attentions."""

    def both(m, scores, pairs, causal):
        return scores * pairs

    assert_rewritten(Attention(torch.exp(-SLOPES * apart().abs()), both), *inputs(), count=2, compiled=False)


def but(buffer, row, column, factor=1.5):
    changed = buffer.clone()
    changed[..., row, column] = changed[..., row, column] * factor
    return changed


def shifted(m, scores, pairs, causal):
    return torch.triu(scores * pairs, -3)


WEIGHTS = torch.exp(-SLOPES * apart().abs())
TWINS = {
    "one pair further": (but(-SLOPES * apart().abs(), 9, 4), biased),
    "one pair above the diagonal, which is masked": (but(WEIGHTS, 4, 9), a_factor),
    "a whole number off": (but(apart().abs(), 9, 4, 2), learned),
    "squares": (-SLOPES * apart() ** 2, biased),
    "roots": (torch.exp(-SLOPES * apart().abs().sqrt()), a_factor),
    "few later positions too": (WEIGHTS, shifted),
    "a diagonal of its own": (but(WEIGHTS, range(L), range(L), 0.5), a_factor),
}


@pytest.mark.parametrize("name", TWINS)
def test_twins(name):
    buffer, weights = TWINS[name]
    assert_refused(Attention(buffer, weights), *inputs(), options={"validate": "off"})


def test_the_numbers_are_assumed(without_inductor):
    """Where the buffer is changed, the original graph runs."""
    module, args = Attention(WEIGHTS.clone(), a_factor), inputs()
    run = torch.compile(module, backend="lightning")
    torch._dynamo.reset()
    run(*args)
    assert len(lacompile.last_report().rewrites) == 1
    module.pairs[..., 9, 4] = 3.0
    torch.testing.assert_close(run(*args), module(*args))

"""Masks of tokens, as of padding, beside the causal one: truths of data on a part of the positions."""

from __future__ import annotations

import pytest
import torch

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv, slopes
from .forms import B, D, E, H, mask

N = 12


def arguments(n=N):
    return [*qkv(B, H, n, D, E), slopes(), torch.rand(B, n) > 0.3]


def causal(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


def of_keys(kept):
    return kept[:, None, None, :]


def of_queries(kept):
    return kept[:, None, :, None]


MASKS = {
    "where": lambda s, n, kept: torch.where(of_keys(kept) & causal(n), s, 0.0),
    "not both": lambda s, n, kept: s.masked_fill(~(of_keys(kept) & causal(n)), 0.0),
    "either not": lambda s, n, kept: s.masked_fill(~of_keys(kept) | ~causal(n), 0.0),
    "a product": lambda s, n, kept: s * (of_keys(kept) & causal(n)),
    "as numbers": lambda s, n, kept: s * (causal(n) & of_keys(kept)).float(),
    "keys and queries": lambda s, n, kept: s * (of_keys(kept) & of_queries(kept) & causal(n)),
    "logical": lambda s, n, kept: s * torch.logical_and(of_keys(kept), causal(n)).to(s.dtype),
    "filled": lambda s, n, kept: s * (of_keys(kept) & causal(n)).masked_fill(~of_queries(kept), False),
    "not all three": lambda s, n, kept: s.masked_fill(~(causal(n) & of_keys(kept) & of_queries(kept)), 0.0),
    "any of three not": lambda s, n, kept: s.masked_fill(~of_keys(kept) | ~of_queries(kept) | ~causal(n), 0.0),
    "not both positions": lambda s, n, kept: s.masked_fill(~(of_keys(kept) & of_queries(kept)) | ~causal(n), 0.0),
    "equal to zero": lambda s, n, kept: s.masked_fill((causal(n) & of_keys(kept) & of_queries(kept)) == 0, 0.0),
    "a product of truths": lambda s, n, kept: s * (of_keys(kept) * of_queries(kept) * causal(n)),
    "a product as numbers": lambda s, n, kept: s * ((of_keys(kept) * of_queries(kept)).float() * causal(n)),
}

# Each differs from all of the above somewhere, or may.
TWINS = {
    "both positions": lambda s, n, kept: s * ((s.detach() > 0) & causal(n)),
    "exclusive or": lambda s, n, kept: s * (of_keys(kept) ^ causal(n)),
    "whole numbers": lambda s, n, kept: s * (of_keys(kept).long() * 2 & causal(n)),
    "a sum of truths": lambda s, n, kept: s * ((of_keys(kept) & causal(n)) + causal(n).mT),
    "equal to one": lambda s, n, kept: s.masked_fill((causal(n) & of_keys(kept) & of_queries(kept)) == 1, 0.0),
    "all the others": lambda s, n, kept: s * (~(of_keys(kept) & of_queries(kept)) | causal(n)),
    "one of two": lambda s, n, kept: s * ((of_keys(kept) ^ of_queries(kept)) & causal(n)),
    "equal truths": lambda s, n, kept: s * ((of_keys(kept) == of_queries(kept)) & causal(n)),
    "bits": lambda s, n, kept: s * (of_keys(kept).int() * 2 & of_queries(kept).int() * 3),
    "signs": lambda s, n, kept: s * ((of_keys(kept) & causal(n)) * 2 - 1),
}


def form(put):
    def run(q, k, v, slope, kept):
        n = q.shape[2]
        return (put(q @ k.mT, n, kept) * mask(slope, n)) @ v

    return run


def without_decay(put):
    return lambda q, k, v, slope, kept: put(q @ k.mT, q.shape[2], kept) @ v


@pytest.mark.parametrize("made", [form, without_decay])
@pytest.mark.parametrize("name", MASKS)
def test_is_rewritten(name, made):
    assert_rewritten(made(MASKS[name]), *arguments(), compiled=False)


@pytest.mark.parametrize("name", ["where", "either not", "keys and queries"])
def test_any_length(name):
    assert_rewritten(form(MASKS[name]), *arguments(17), after=arguments(), compiled=False)


@pytest.mark.parametrize("name", TWINS)
def test_near_twins_are_left_alone(name):
    assert_refused(without_decay(TWINS[name]), *arguments())


BOTH_WAYS = {
    "or": lambda s, n, kept: s * (of_keys(kept) | causal(n)),
    "not": lambda s, n, kept: s * ~(of_keys(kept) & causal(n)),
}


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_masks_that_let_later_tokens_through(name):
    assert_rewritten(without_decay(BOTH_WAYS[name]), *arguments(), count=2, compiled=False)


ADDED = {
    "less a billion": lambda d, s, kept: torch.exp(-s * d + (1 - kept) * -1e9),
    "from a triangle": lambda d, s, kept: torch.exp(-s * d + torch.triu(torch.full_like(d, -1e9), 1)),
    "less ten thousand": lambda d, s, kept: torch.exp(-s * d + (1 - kept) * -1e4),
    "times the rate": lambda d, s, kept: torch.exp(s * (-d - (1 - kept) * 1e7)),
}


def added(put, known):
    def run(q, k, v, slope, kept):
        i = torch.arange(q.shape[2], dtype=torch.float32)
        rate = torch.tensor([0.1, 0.2, 0.3]) if known else 0.1
        d = i[:, None] - i[None, :]
        m = put(d, rate[:, None, None] if known else rate, torch.ones_like(d).tril())
        return (q @ k.mT * m) @ v

    return run


@pytest.mark.parametrize("known", [False, True], ids=["one rate", "a rate for each head"])
@pytest.mark.parametrize("name", ADDED)
def test_a_mask_that_is_added_in_the_exponent(name, known):
    assert_rewritten(added(ADDED[name], known), *arguments(), compiled=False)


def test_a_diagonal_of_its_own():
    def run(q, k, v, slope, kept):
        weighted = (q @ k.mT * mask(slope, q.shape[2])).tril(-1)
        return (weighted + torch.diag_embed(0.3 * (q * k).sum(-1))) @ v

    assert_rewritten(run, *arguments(), compiled=False)
    assert_rewritten(run, *arguments(17), after=arguments(), compiled=False)


def test_too_little_is_added_to_hide():
    """What is above the diagonal is small, and counts; it grows with the distance, which no decay does."""
    run = added(lambda d, s, kept: torch.exp(-s * d + (1 - kept) * -90.0), False)
    assert_refused(run, *arguments())


def test_a_choice_by_the_opposite_of_two_truths():
    """Computed, in a gate, and not looked into: the condition stays one."""

    def run(q, k, v, slope, kept):
        g = -torch.nn.functional.softplus(v[..., 0]).masked_fill(~(kept & (v[:, 0, :, 1] > 0))[:, None], 0.5)
        sums = g.cumsum(-1)
        return (q @ k.mT * (sums[..., :, None] - sums[..., None, :]).exp().tril()) @ v

    assert_rewritten(run, *arguments(), compiled=False)

"""Rows that are read from the prefix up to them anew, one after the other, with their normaliser; and near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D = 2, 2, 10, 4


def arguments():
    return [(F.elu(x) + 1).detach().requires_grad_() if n < 2 else x for n, x in enumerate(qkv(B, H, N, D))]


def rows(row):
    def run(q, k, v):
        return torch.cat([row(q[:, :, t : t + 1], k, v, t) for t in range(N)], 2)

    return run


def normalised(q, k, v, t):
    scores = q @ k[:, :, : t + 1].mT
    return scores @ v[:, :, : t + 1] / (scores.sum(-1, keepdim=True) + 1e-6)


def normalised_scores(q, k, v, t):
    scores = q @ k[:, :, : t + 1].mT
    return scores / scores.sum(-1, keepdim=True).clamp(min=1e-6) @ v[:, :, : t + 1]


def normalised_by_a_mean(q, k, v, t):
    scores = q @ k[:, :, : t + 1].mT
    return scores @ v[:, :, : t + 1] / (scores.mean(-1, keepdim=True) * (t + 1) + 1e-6)


@pytest.mark.parametrize("row", [normalised, normalised_scores, normalised_by_a_mean])
def test_the_normaliser_is_one_of_its_own(row):
    assert_rewritten(rows(row), *arguments(), count=2, compiled=False)


def of_one_more(q, k, v, t):
    """A normaliser that sees the token behind the row."""
    scores = q @ k[:, :, : t + 2].mT
    return scores[..., : t + 1] @ v[:, :, : t + 1] / (scores.sum(-1, keepdim=True) + 1e-6)


def of_one_less(q, k, v, t):
    scores = q @ k[:, :, : t + 1].mT
    return scores @ v[:, :, : t + 1] / (scores[..., :t].sum(-1, keepdim=True) + 1e-6)


def of_all(q, k, v, t):
    scores = q @ k.mT
    return scores[..., : t + 1] @ v[:, :, : t + 1] / (scores.sum(-1, keepdim=True) + 1e-6)


def one_row_of_another(q, k, v, t):
    scores = q @ k[:, :, : t + 1].mT
    return scores @ v[:, :, : t + 1] / (scores.sum(-1, keepdim=True) + (1e-6 if t != 4 else 1e-2))


@pytest.mark.parametrize("row", [of_one_more, of_one_less, of_all, one_row_of_another])
def test_other_normalisers_are_left_alone(row):
    assert_refused(rows(row), *arguments())


# ---------------------------------------------------------------------------------------------- elementwise products


def elementwise(total):
    """Scores and results as sums of products, divided by what ``total`` makes of the row and the keys so far."""

    def row(q, k, v, t):
        scores = (q * k[:, :, : t + 1]).sum(-1)
        return (scores[..., None] * v[:, :, : t + 1]).sum(2, keepdim=True) / total(q, k, scores, t)

    return row


def of_scores(q, k, scores, t):
    return scores.sum(-1)[..., None, None]


def of_summed_keys(q, k, scores, t):
    return (q * k[:, :, : t + 1].sum(2, keepdim=True)).sum(-1, keepdim=True)


def of_a_product_with_summed_keys(q, k, scores, t):
    return q @ k[:, :, : t + 1].sum(2)[..., None]


@pytest.mark.parametrize("total", [of_scores, of_summed_keys, of_a_product_with_summed_keys])
def test_rows_by_elementwise_products(total):
    assert_rewritten(rows(elementwise(total)), *arguments(), count=2, compiled=False)


def decayed(q, k, v, t):
    scores = (q * k[:, :, : t + 1]).sum(-1) * 0.9 ** torch.arange(t, -1, -1)
    return (scores[..., None] * v[:, :, : t + 1]).sum(2, keepdim=True)


def without_a_normaliser(q, k, v, t):
    return elementwise(lambda *_: 2.0)(q, k, v, t)


@pytest.mark.parametrize("row", [decayed, without_a_normaliser])
def test_rows_by_elementwise_products_alone(row):
    assert_rewritten(rows(row), *arguments(), compiled=False)


def of_summed_keys_behind(q, k, scores, t):
    return (q * k[:, :, : t + 2].sum(2, keepdim=True)).sum(-1, keepdim=True)


def of_the_row_before(q, k, scores, t):
    return scores[..., : max(t, 1)].sum(-1)[..., None, None]


@pytest.mark.parametrize("total", [of_summed_keys_behind, of_the_row_before])
def test_other_normalisers_by_elementwise_products(total):
    assert_refused(rows(elementwise(total)), *arguments())


def values_of_the_row_before(q, k, v, t):
    scores = (q * k[:, :, : t + 1]).sum(-1)
    return (scores[..., None] * v[:, :, max(t - 1, 0) : t + 1].mean(2, keepdim=True)).sum(2, keepdim=True)


def one_row_of_squares(q, k, v, t):
    scores = (q * k[:, :, : t + 1]).sum(-1)
    return ((scores.square() if t == 4 else scores)[..., None] * v[:, :, : t + 1]).sum(2, keepdim=True)


@pytest.mark.parametrize("row", [values_of_the_row_before, one_row_of_squares])
def test_twins_by_elementwise_products(row):
    assert_refused(rows(row), *arguments())

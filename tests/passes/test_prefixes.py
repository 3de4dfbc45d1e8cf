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

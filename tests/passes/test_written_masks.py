"""Masks that a loop writes row by row, or puts together from rows, and near twins."""

from __future__ import annotations

import pytest
import torch

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv
from .forms import B, D, E, H

N = 10
NOTHING = float("-inf")


def weighed(q, k, v, exponent):
    slopes = torch.tensor([0.1, 0.3, 0.5])[:, None, None]
    return (q @ k.mT * torch.exp(slopes * exponent)) @ v


def turned(q, k, v):
    mask = torch.full((N, N), NOTHING)
    for i in range(N):
        mask[i, : i + 1] = -1.0 * torch.arange(i + 1).flip(0)
    return weighed(q, k, v, mask)


def counted_down(q, k, v):
    mask = torch.full((N, N), NOTHING)
    for i in range(N):
        mask[i, : i + 1] = -torch.arange(i, -1, -1)
    return weighed(q, k, v, mask)


def filled_behind(q, k, v):
    mask = torch.zeros(N, N)
    for i in range(N):
        mask[i, : i + 1] = torch.arange(i + 1) - i
    return weighed(q, k, v, mask.masked_fill(torch.ones(N, N).triu(1).bool(), NOTHING))


def stacked(q, k, v):
    rows = [torch.cat([-torch.arange(i, -1, -1).float(), torch.full((N - i - 1,), NOTHING)]) for i in range(N)]
    return weighed(q, k, v, torch.stack(rows))


def running_products(q, k, v):
    gate = torch.sigmoid(k[..., 0])
    earlier = torch.ones(N, N).tril(-1).bool()
    segments = gate[..., None].expand(B, H, N, N).masked_fill(~earlier, 1).cumprod(-2)
    return (q @ k.mT * segments.masked_fill(~torch.ones(N, N).tril().bool(), 0)) @ v


@pytest.mark.parametrize("form", [turned, counted_down, filled_behind, stacked, running_products])
def test_masks_by_rows(form):
    assert_rewritten(form, *qkv(B, H, N, D, E), compiled=False)


def one_row_short(q, k, v):
    mask = torch.full((N, N), NOTHING)
    for i in range(N):
        mask[i, : i + (i != 6)] = -torch.arange(i, -1, -1)[: i + (i != 6)]
    return weighed(q, k, v, mask)


def one_row_slower(q, k, v):
    mask = torch.full((N, N), NOTHING)
    for i in range(N):
        mask[i, : i + 1] = -torch.arange(i, -1, -1) * (0.5 if i == 6 else 1.0)
    return weighed(q, k, v, mask)


def one_row_twice(q, k, v):
    mask = torch.full((N, N), NOTHING)
    for i in (*range(N), 6):
        mask[i, : i + 1] = -torch.arange(i, -1, -1) - (mask[i, : i + 1] == 0).float()
    return weighed(q, k, v, mask)


@pytest.mark.parametrize("twin", [one_row_short, one_row_slower, one_row_twice])
def test_twins_with_another_row(twin):
    assert_refused(twin, *qkv(B, H, N, D, E))

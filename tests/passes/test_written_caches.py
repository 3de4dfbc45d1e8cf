"""Keys and values that a loop keeps of all tokens so far, and reads all of with each token; and near twins."""

from __future__ import annotations

import pytest
import torch

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D, E = 2, 3, 10, 8, 6


def joined(q, k, v):
    keys, values, out = k[:, :, :0], v[:, :, :0], []
    for t in range(N):
        keys = torch.cat([keys, k[:, :, t : t + 1]], 2)
        values = torch.cat([values, v[:, :, t : t + 1]], 2)
        out.append(q[:, :, t : t + 1] @ keys.mT @ values)
    return torch.cat(out, 2)


def written(q, k, v):
    keys, values, out = torch.zeros(B, H, N, D), torch.zeros(B, H, N, E), []
    for t in range(N):
        keys, values = keys.clone(), values.clone()
        keys[:, :, t], values[:, :, t] = k[:, :, t], v[:, :, t]
        out.append(q[:, :, t : t + 1] @ keys.mT @ values)
    return torch.cat(out, 2)


def listed(q, k, v):
    keys, values, out = [], [], []
    for t in range(N):
        keys.append(k[:, :, t])
        values.append(v[:, :, t])
        weights = torch.tensor([0.9 ** (t - j) for j in range(t + 1)])
        scores = torch.einsum("bhd,jbhd->bhj", q[:, :, t], torch.stack(keys)) * weights
        out.append(torch.einsum("bhj,jbhe->bhe", scores, torch.stack(values)))
    return torch.stack(out, 2)


@pytest.mark.parametrize("form", [joined, written, listed])
def test_all_tokens_so_far(form):
    assert_rewritten(form, *qkv(B, H, N, D, E), compiled=False)


def a_window(q, k, v):
    out = [q[:, :, t : t + 1] @ k[:, :, max(0, t - 3) : t + 1].mT @ v[:, :, max(0, t - 3) : t + 1] for t in range(N)]
    return torch.cat(out, 2)


def the_values_of_before(q, k, v):
    out = [q[:, :, t : t + 1] @ k[:, :, 1 : t + 1].mT @ v[:, :, :t] for t in range(1, N)]
    return torch.cat(out, 2)


@pytest.mark.parametrize("twin", [a_window, the_values_of_before])
def test_near_twins(twin):
    assert_refused(twin, *qkv(B, H, N, D, E))

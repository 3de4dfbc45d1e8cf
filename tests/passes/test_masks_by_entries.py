"""Decay masks that a program writes entry by entry, with a gate for each token; and near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D = 2, 2, 9, 4


def arguments():
    operands = qkv(B, H, N, D)
    return [*operands, F.logsigmoid(torch.randn(B, H, N)).detach().requires_grad_()]


def summed(g, i, j):
    return g[:, :, j + 1 : i + 1].sum(-1).exp()


def multiplied(g, i, j):
    return g.exp()[:, :, j + 1 : i + 1].prod(-1)


def of_running_sums(g, i, j):
    sums = g.cumsum(-1)
    return (sums[:, :, i] - sums[:, :, j]).exp()


def of_one_rate(g, i, j):
    return torch.exp(-0.1 * (i - j) + torch.zeros(B, H))


def by_writes(entry):
    def run(q, k, v, g):
        mask = torch.zeros(B, H, N, N)
        for i in range(N):
            for j in range(i + 1):
                mask[:, :, i, j] = entry(g, i, j)
        return (q @ k.mT * mask) @ v

    return run


def by_stacks(entry):
    def run(q, k, v, g):
        rows = []
        for i in range(N):
            row = [entry(g, i, j) if j <= i else torch.zeros(B, H) for j in range(N)]
            rows.append(torch.stack(row, -1))
        return (q @ k.mT * torch.stack(rows, -2)) @ v

    return run


@pytest.mark.parametrize("put", [by_writes, by_stacks])
@pytest.mark.parametrize("entry", [summed, multiplied, of_running_sums, of_one_rate])
def test_masks_by_entries(put, entry):
    assert_rewritten(put(entry), *arguments(), grads=entry is not of_one_rate, compiled=False)


@pytest.mark.parametrize("put", [by_writes, by_stacks])
def test_products_of_what_is_given(put):
    """Of gates that an argument holds it is assumed that they are positive; others are left alone."""

    def entry(g, i, j):
        return g[:, :, j + 1 : i + 1].prod(-1)

    *operands, g = arguments()
    assert_rewritten(put(entry), *operands, torch.sigmoid(g).detach().requires_grad_(), compiled=False)
    assert_refused(put(entry), *operands, g, obligation="decay")


def with_one_gate_left_out(g, i, j):
    return g[:, :, j + 1 : i + (i != 6)].sum(-1).exp()


def with_one_entry_of_another_gate(g, i, j):
    return g[:, :, j : i + 1].sum(-1).exp() if (i, j) == (5, 2) else summed(g, i, j)


def with_one_entry_twice_as_large(g, i, j):
    return summed(g, i, j) * (2 if (i, j) == (4, 3) else 1)


def with_a_diagonal_that_decays_in_one_row(g, i, j):
    return g[:, :, i].exp() if i == j == 3 else summed(g, i, j)


def of_a_window(g, i, j):
    return g[:, :, max(j + 1, i - 3) : i + 1].sum(-1).exp()


TWINS = [
    with_one_gate_left_out, with_one_entry_of_another_gate, with_one_entry_twice_as_large,
    with_a_diagonal_that_decays_in_one_row, of_a_window,
]  # fmt: skip


@pytest.mark.parametrize("put", [by_writes, by_stacks])
@pytest.mark.parametrize("entry", TWINS)
def test_twins_by_entries(put, entry):
    assert_refused(put(entry), *arguments())


def test_products_of_features_are_data():
    def run(q, k, v, g):
        gates = F.logsigmoid(torch.sigmoid(k).prod(-1)).cumsum(-1)
        mask = (gates[..., None] - gates[..., None, :]).masked_fill(~torch.ones(N, N).tril().bool(), float("-inf"))
        return (q @ k.mT * mask.exp()) @ v

    assert_rewritten(run, *arguments(), compiled=False)

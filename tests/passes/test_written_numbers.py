"""A decay matrix that the program fills entry by entry: a table of numbers, read as the weights that they are."""

from __future__ import annotations

import pytest
import torch

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, N, D = 2, 8, 4


def filled(entry, dtype=torch.float32, *heads):
    matrix = torch.zeros(*heads, N, N, dtype=dtype)
    for i in range(N):
        for j in range(N):
            if (number := entry(i, j)) != 0:
                matrix[..., i, j] = number
    return matrix


def weighted(make):
    def run(q, k, v):
        return (q @ k.mT * make().to(q.dtype)) @ v

    return run


def arguments(heads=1):
    return [t.squeeze(1) for t in qkv(B, heads, N, D)]


DECAYS = {
    "powers": lambda i, j: 0.9 ** (i - j) if i >= j else 0,
    "strict": lambda i, j: 0.9 ** (i - j) if i > j else 0,
    "ones": lambda i, j: 1.0 if i >= j else 0,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", DECAYS)
def test_entries_that_are_a_decay(decay, dtype):
    assert_rewritten(weighted(lambda: filled(DECAYS[decay], dtype)), *arguments(), compiled=False)


def test_entries_of_each_head():
    rates = (0.9, 0.8, 0.7)

    def make():
        matrix = torch.zeros(3, N, N)
        for h, rate in enumerate(rates):
            for i in range(N):
                for j in range(i + 1):
                    matrix[h, i, j] = rate ** (i - j)
        return matrix

    assert_rewritten(weighted(make), *arguments(3), compiled=False)


def causal(i, j):
    return DECAYS["powers"](i, j)


TWINS = {
    "both sides": lambda i, j: 0.9 ** abs(i - j),
    "one entry above": lambda i, j: 1e-3 if (i, j) == (2, 5) else causal(i, j),
    "one entry off": lambda i, j: causal(i, j) * (1.001 if (i, j) == (5, 2) else 1),
    "a hole": lambda i, j: 0 if (i, j) == (4, 2) else causal(i, j),
    "by rows": lambda i, j: causal(i, j) / (i + 1) ** (j % 2),
    "logarithms": lambda i, j: (j - i) * 0.1 if i > j else 0,
}


@pytest.mark.parametrize("twin", TWINS)
def test_entries_that_are_nearly_one(twin):
    assert_refused(weighted(lambda: filled(TWINS[twin])), *arguments())


def test_an_entry_written_after_the_matrix_was_read():
    def run(q, k, v):
        matrix = filled(causal).to(q.dtype)
        scores = q @ k.mT
        first = (scores * matrix.clone()) @ v
        matrix[3, 1] = 7.0
        return first, (scores * matrix) @ v

    assert_rewritten(run, *arguments(), compiled=False)


def test_powers_of_a_table():
    """An operation of PyTorch whose parts hand a number on, not a tensor."""

    def make():
        powers = torch.vander(torch.tensor([0.9, 0.8]), N, increasing=True)
        i = torch.arange(N)
        return powers[:, (i[:, None] - i).clamp(min=0)].tril()

    assert_rewritten(weighted(make), *arguments(2), compiled=False)

"""Weights that the program writes as lists of numbers: of positions, of rows, of features; and near twins."""

from __future__ import annotations

import pytest
import torch

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv
from .forms import distance

B, H, N, D, E, C = 2, 3, 12, 8, 6, 4
G = 0.9
RATES = (0.9, 0.7, 0.95)


def chunks(at_once, from_start, to_end, within):
    def f(q, k, v):
        state, out = torch.zeros(B, H, D, E), []
        row, key, inside = from_start(), to_end(), within()
        for a in range(0, N, C):
            qq, kk, vv = (x[:, :, a : a + C] for x in (q, k, v))
            out.append((qq @ kk.mT * inside) @ vv + (qq * row[..., None]) @ state)
            state = at_once() * state + (kk * key[..., None]).mT @ vv
        return torch.cat(out, 2)

    return f


def triangle(g):
    return [[g ** (i - j) if i >= j else 0.0 for j in range(C)] for i in range(C)]


one_rate = chunks(
    lambda: G**C,
    lambda: torch.tensor([G ** (i + 1) for i in range(C)]),
    lambda: torch.tensor([G ** (C - 1 - i) for i in range(C)]),
    lambda: torch.tensor(triangle(G)),
)
rate_of_each_head = chunks(
    lambda: torch.tensor([g**C for g in RATES])[:, None, None],
    lambda: torch.tensor([[g ** (i + 1) for i in range(C)] for g in RATES]),
    lambda: torch.tensor([[g ** (C - 1 - i) for i in range(C)] for g in RATES]),
    lambda: torch.tensor([triangle(g) for g in RATES]),
)


def by_distance(q, k, v):
    powers = torch.tensor([G**d for d in range(N)])
    return (q @ k.mT * powers[distance(N).clamp(min=0)].tril()) @ v


def by_rows(q, k, v):
    out = []
    for i in range(N):
        weights = torch.tensor([G ** (i - j) for j in range(i + 1)])
        out.append((q[:, :, i : i + 1] @ k[:, :, : i + 1].mT * weights) @ v[:, :, : i + 1])
    return torch.cat(out, 2)


def by_rows_from_the_end(q, k, v):
    powers, out = torch.tensor([G**d for d in range(N)]), []
    for i in range(N):
        weights = powers[: i + 1].flip(0)
        out.append((q[:, :, i : i + 1] @ k[:, :, : i + 1].mT * weights) @ v[:, :, : i + 1])
    return torch.cat(out, 2)


@pytest.mark.parametrize("form", [one_rate, rate_of_each_head, by_distance, by_rows, by_rows_from_the_end])
def test_weights_of_positions(form):
    assert_rewritten(form, *qkv(B, H, N, D, E), compiled=False)


def features(n):
    return torch.tensor([0.5**d for d in range(n)])


def of_queries(q, k, v):
    return (q * features(D) @ k.mT * torch.tensor(G).pow(distance(N)).tril()) @ v


def of_values(q, k, v):
    return (q @ k.mT * torch.tensor(G).pow(distance(N)).tril()) @ (v * features(E))


def of_queries_by_a_formula(q, k, v):
    return (q * 0.5 ** torch.arange(D) @ k.mT * torch.tensor(G).pow(distance(N)).tril()) @ v


def of_keys_in_a_loop(q, k, v):
    state, out = torch.zeros(B, H, D, E), []
    for t in range(N):
        state = G * state + (k[:, :, t] * features(D))[..., None] * v[:, :, t, None]
        out.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(out, 2)


@pytest.mark.parametrize("form", [of_queries, of_values, of_queries_by_a_formula, of_keys_in_a_loop])
def test_weights_of_features(form):
    assert_rewritten(form, *qkv(B, H, N, D, E), compiled=False)


def decay_of_each_feature(q, k, v):
    state, out = torch.zeros(B, H, D, E), []
    for t in range(N):
        state = features(D)[:, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(out, 2)


def one_chunk_decays_more(q, k, v):
    return chunks(
        lambda: G ** (C + 1),
        lambda: torch.tensor([G ** (i + 1) for i in range(C)]),
        lambda: torch.tensor([G ** (C - 1 - i) for i in range(C)]),
        lambda: torch.tensor(triangle(G)),
    )(q, k, v)


def no_power(q, k, v):
    powers = torch.tensor([G**d * (1.001 if d == 5 else 1.0) for d in range(N)])
    return (q @ k.mT * powers[distance(N).clamp(min=0)].tril()) @ v


@pytest.mark.parametrize("twin", [decay_of_each_feature, one_chunk_decays_more, no_power])
def test_near_twins(twin):
    assert_refused(twin, *qkv(B, H, N, D, E))


@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.tensor([0.999, 0.9999]),
        lambda: torch.tensor([0.9999, 0.9999]),
        lambda: torch.tensor([0.999, 0.9999], dtype=torch.float32).log().exp(),
        lambda: torch.full((2,), 0.9999),
        lambda: torch.tensor([0.75, 0.99], dtype=torch.bfloat16),
        lambda: torch.full((2,), 0.99, dtype=torch.bfloat16),
    ],
    ids=["list", "one number", "function", "filled", "list in bf16", "filled in bf16"],
)
def test_slow_rates_over_a_thousand_tokens(made):
    """What fp32 leaves of 0.9999 decays by another rate: the program's own, which validation runs, is taken."""

    def f(q, k, v):
        rates = made()[:, None, None].to(q.dtype)
        d = distance(q.shape[2])
        return (q @ k.mT * torch.where(d >= 0, rates ** d.clamp(min=0), 0.0)) @ v

    q, k, v = qkv(1, 2, 1024, 8)
    report = assert_rewritten(f, q, k, v, compiled=False)
    assert "fp64" in str(report)

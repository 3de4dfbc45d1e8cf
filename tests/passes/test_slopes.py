"""Slopes that the program computes from the numbers of its heads, in each form that reads them, and near twins."""

from __future__ import annotations

import pytest
import torch

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv
from .forms import B, D, E, H, distance

N, C = 12, 4

SLOPES = {
    "alibi": lambda: 2.0 ** (-8 * torch.arange(1, H + 1) / H),
    "torch.pow": lambda: torch.pow(2, -torch.arange(1, H + 1).float()),
    "exp2": lambda: torch.exp2(-torch.arange(1, H + 1).float()),
    "exp": lambda: torch.exp(-0.7 * torch.arange(1, H + 1)),
    "a start": lambda: 0.5 ** torch.arange(1, H + 1),
    "a reciprocal": lambda: 1 / 2.0 ** torch.arange(1, H + 1),
    "exp of a list": lambda: torch.exp(torch.tensor([-1.0, -2.0, -0.5])),
    "in proportion": lambda: (torch.arange(H) + 1) / H,
}


def square(slopes, h=H):
    def f(q, k, v):
        d = distance(q.shape[2])
        exponent = torch.where(d >= 0, -slopes().view(h, 1, 1) * d, float("-inf"))
        return (q @ k.mT * exponent.exp()) @ v

    return f


def powers(slopes, h=H):
    def f(q, k, v):
        gamma = torch.exp(-slopes())[:, None, None]
        return (q @ k.mT * (gamma ** distance(q.shape[2]).clamp(min=0)).tril()) @ v

    return f


def tokens(slopes, h=H):
    def f(q, k, v):
        gamma, state, out = torch.exp(-slopes())[:, None, None], torch.zeros(B, h, D, E), []
        for t in range(q.shape[2]):
            state = gamma * state + k[:, :, t, :, None] * v[:, :, t, None]
            out.append((q[:, :, t, None] @ state)[:, :, 0])
        return torch.stack(out, 2)

    return f


def chunks(slopes, h=H):
    def f(q, k, v):
        s, r = slopes().view(h, 1, 1), torch.arange(1, C + 1)
        from_start, to_end = torch.exp(-s * r[:, None]), torch.exp(-s * (C - r[:, None]))
        inside, state, out = torch.exp(-s * (r[:, None] - r)).tril(), torch.zeros(B, h, D, E), []
        for a in range(0, q.shape[2], C):
            qq, kk, vv = (x[:, :, a : a + C] for x in (q, k, v))
            out.append((qq @ kk.mT * inside) @ vv + (qq * from_start) @ state)
            state = state * torch.exp(-s * C) + (kk * to_end).mT @ vv
        return torch.cat(out, 2)

    return f


FORMS = [square, powers, tokens, chunks]
BY_TURNS = [(name, FORMS[(a + b) % 4]) for a, name in enumerate(SLOPES) for b in (0, 1)]
"""Each formula in two of the forms, and each form with four formulas."""


@pytest.mark.parametrize(("name", "form"), BY_TURNS)
def test_slopes_by_a_formula(name, form):
    assert_rewritten(form(SLOPES[name]), *qkv(B, H, N, D, E), compiled=False)


@pytest.mark.parametrize("form", FORMS)
def test_as_many_heads_as_tokens(form):
    def slopes():
        return (torch.arange(N) + 1) / N

    assert_rewritten(form(slopes, N), *qkv(B, N, N, D, E), compiled=False)


def groups(slopes):
    def f(q, k, v):
        gamma, state, out = torch.exp(-slopes())[:, None, None], torch.zeros(B, 2 * H, D, E), []
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        for t in range(q.shape[2]):
            state = gamma * state + k[:, :, t, :, None] * v[:, :, t, None]
            out.append((q[:, :, t, None] @ state)[:, :, 0])
        return torch.stack(out, 2)

    return f


def test_slopes_in_proportion_to_the_head_of_a_group():
    q, k, v = qkv(B, 2 * H, N, D, E)
    assert_rewritten(groups(lambda: (torch.arange(2 * H) + 1) / 6), q, k[:, :H], v[:, :H], compiled=False)


def slope_of_the_row(q, k, v):
    d = distance(N)
    return (q @ k.mT * torch.exp(-(2.0 ** -torch.arange(N))[:, None] * d).tril()) @ v


def slope_of_the_key(q, k, v):
    d = distance(N)
    return (q @ k.mT * torch.exp(-(torch.arange(N) + 1) / N * d).tril()) @ v


def distance_times_distance(q, k, v):
    d = distance(N)
    return (q @ k.mT * torch.exp(-0.1 * d * d).tril()) @ v


@pytest.mark.parametrize("twin", [slope_of_the_row, slope_of_the_key, distance_times_distance])
def test_twins_whose_slope_is_of_a_position(twin):
    assert_refused(twin, *qkv(B, H, N, D, E))


def sign_behind_the_slope(slopes):
    """As MiniMax's layer does it: which way a pair of positions lies is asked of its distance times the slope."""

    def f(q, k, v):
        d = slopes()[:, None, None] * distance(q.shape[2])
        return (q @ k.mT * torch.where(d >= 0, -d, float("-inf")).exp()) @ v

    return f


SIGNED = {
    "a list": lambda: torch.tensor([0.1, 0.3, 0.5]),
    "a list of few digits": lambda: torch.tensor([0.5, 0.25, 0.125]),
    "alibi": SLOPES["alibi"],
}


@pytest.mark.parametrize("name", SIGNED)
def test_the_sign_of_a_distance_times_a_slope(name):
    assert_rewritten(sign_behind_the_slope(SIGNED[name]), *qkv(B, H, N, D, E), compiled=False)


UNSIGNED = {
    "one that is negative": lambda: torch.tensor([0.1, -0.3, 0.5]),
    "one that is nothing": lambda: torch.tensor([0.1, 0.0, 0.5]),
    "one that is nothing in its format": lambda: torch.tensor([0.1, 1e-46, 0.5]),
    "a power that is nothing in its format": lambda: 2.0 ** (-80 * torch.arange(1, H + 1)),
}


@pytest.mark.parametrize("name", UNSIGNED)
def test_the_sign_of_a_distance_times_a_slope_without_one(name):
    assert_refused(sign_behind_the_slope(UNSIGNED[name]), *qkv(B, H, N, D, E), obligation="separable")

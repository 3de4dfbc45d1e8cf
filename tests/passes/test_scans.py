"""States of all tokens by a scan that doubles its reach with each step; and near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv, slopes

B, H, D, E = 2, 3, 8, 6


def by_padding(step):
    def f(q, k, v, slope):
        state, reach = k[..., :, None] * v[..., None, :], 1
        while reach < q.shape[2]:
            state = state + step(slope, reach) * F.pad(state[:, :, :-reach], (0, 0, 0, 0, reach, 0))
            reach *= 2
        return torch.einsum("bhnd,bhnde->bhne", q, state)

    return f


def by_joining(step):
    def f(q, k, v, slope):
        state, reach = torch.einsum("bhnd,bhne->bhnde", k, v), 1
        while reach < q.shape[2]:
            later = state[:, :, reach:] + step(slope, reach) * state[:, :, :-reach]
            state = torch.cat([state[:, :, :reach], later], 2)
            reach *= 2
        return torch.einsum("bhnd,bhnde->bhne", q, state)

    return f


def by_writing(step):
    def f(q, k, v, slope):
        state, reach = k[..., :, None] * v[..., None, :], 1
        while reach < q.shape[2]:
            new = state.clone()
            new[:, :, reach:] = state[:, :, reach:] + step(slope, reach) * state[:, :, :-reach]
            state, reach = new, reach * 2
        return torch.einsum("bhnd,bhnde->bhne", q, state)

    return f


STEPS = {
    "no decay": lambda slope, reach: 1,
    "a number": lambda slope, reach: 0.9**reach,
    "heads": lambda slope, reach: torch.exp(-slope * reach)[:, None, None, None],
    "powers": lambda slope, reach: slope.sigmoid()[:, None, None, None] ** reach,
}


@pytest.mark.parametrize("n", [8, 12])
@pytest.mark.parametrize("form", [by_padding, by_joining, by_writing])
@pytest.mark.parametrize("step", STEPS)
def test_doubling(step, form, n):
    assert_rewritten(form(STEPS[step]), *qkv(B, H, n, D, E), slopes(), compiled=False)


def one_step_too_few(q, k, v, slope):
    state = k[..., :, None] * v[..., None, :]
    for reach in (1, 2):
        state = state + 0.9**reach * F.pad(state[:, :, :-reach], (0, 0, 0, 0, reach, 0))
    return torch.einsum("bhnd,bhnde->bhne", q, state)


def a_step_that_overlaps(q, k, v, slope):
    state = k[..., :, None] * v[..., None, :]
    for reach in (1, 2, 3, 4):
        state = state + 0.9**reach * F.pad(state[:, :, :-reach], (0, 0, 0, 0, reach, 0))
    return torch.einsum("bhnd,bhnde->bhne", q, state)


def a_decay_that_does_not_double(q, k, v, slope):
    return by_joining(lambda slope, reach: 0.9)(q, k, v, slope)


@pytest.mark.parametrize("twin", [one_step_too_few, a_step_that_overlaps, a_decay_that_does_not_double])
def test_near_twins(twin):
    assert_refused(twin, *qkv(B, H, 8, D, E), slopes())

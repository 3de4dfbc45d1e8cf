"""Loops over tokens whose factors are exponentials, known numbers, or scaled keys; each with a near twin."""

from __future__ import annotations

import pytest
import torch

from lacompile import explain
from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

N, D = 8, 4


def heads(n=N, h=2):
    return qkv(1, h, n, D)


def outer(k, v, t):
    return k[:, :, t, :, None] * v[:, :, t, None, :]


def read(q, state, t):
    return (q[:, :, t, :, None] * state).sum(-2)


def test_features_by_exp():
    """exp of the key of one token is a factor of that key, and no decay."""

    def run(q, k, v):
        q, k, state, out = q.exp(), k.exp(), 0, []
        for t in range(N):
            state = state + outer(k, v, t)
            out.append(read(q, state, t))
        return torch.stack(out, 2)

    assert_rewritten(run, *heads(), compiled=False)


def test_a_decay_by_exp_of_the_key_is_no_feature():
    def run(q, k, v):
        state, out = torch.zeros(1, 2, D, D), []
        for t in range(N):
            state = state * k[:, :, t, :, None].sigmoid() + outer(k, v, t)
            out.append(read(q, state, t))
        return torch.stack(out, 2)

    assert_refused(run, *heads(), obligation="decay")


def rates():
    return 1 - torch.linspace(-3, -1, 4).exp()


def decayed(q, k, v, state, rate):
    out = []
    for t in range(q.shape[2]):
        state = outer(k, v, t) + state * rate(t)[:, None, None]
        out.append(read(q, state, t))
    return torch.stack(out, 2)


def test_a_decay_that_is_a_sum_of_known_numbers():
    assert_rewritten(
        lambda q, k, v: decayed(q, k, v, 0 * outer(k, v, 0), lambda t: rates()), *heads(h=4), compiled=False
    )


def test_known_numbers_that_differ_by_token():
    """Every other token decays by another number: no single rate, and no more than a step of it is rewritten."""

    def run(q, k, v):
        return decayed(q, k, v, 0 * outer(k, v, 0), lambda t: rates() if t % 2 else rates() / 2)

    assert all(r.length == "1" for r in explain(run)(*heads(4, h=4)).rewrites)


@pytest.mark.parametrize("known", [False, True], ids=["decay given", "decay a number"])
def test_keys_are_scaled_and_the_state_is_not(known):
    """The state goes in and out as the program has it, whatever its keys are divided by."""

    def run(q, k, v, state, g):
        out, k = [], k / D**0.5
        for t in range(q.shape[2]):
            state = outer(k, v, t) + state * (0.9 if known else torch.exp(g)[:, None, None])
            out.append(read(q, state, t))
        return torch.stack(out, 2), state

    state, g = torch.randn(1, 2, D, D, requires_grad=True), torch.tensor([-0.5, -0.1], requires_grad=True)
    report = assert_rewritten(run, *heads(), state, g, compiled=False)
    assert report.rewrites[0].initial_state and report.rewrites[0].final_state
    assert report.nodes_after < 40


def test_a_multiple_of_the_final_state():
    def run(q, k, v, g):
        weight = torch.exp(g[:, None] * torch.arange(N - 1, -1, -1))
        i = torch.arange(N)
        mask = torch.where(i[:, None] >= i, torch.exp(g[:, None, None] * (i[:, None] - i)), 0)
        return (q @ k.mT * mask) @ v, 3 * (k * weight[..., None]).mT @ v

    report = assert_rewritten(run, *heads(), torch.tensor([-0.5, -0.1], requires_grad=True), compiled=False)
    assert report.rewrites[0].final_state


def test_a_state_scaled_apart_from_its_keys():
    """What comes in counts twice in what goes out, and once in the outputs: that is no final state."""

    def run(q, k, v, state, g):
        out, first = [], state
        for t in range(q.shape[2]):
            state = outer(k, v, t) + state * torch.exp(g)[:, None, None]
            out.append(read(q, state, t))
        return torch.stack(out, 2), state + first * torch.exp(g * N)[:, None, None]

    state, g = torch.randn(1, 2, D, D, requires_grad=True), torch.tensor([-0.5, -0.1], requires_grad=True)
    report = assert_rewritten(run, *heads(), state, g, compiled=False)
    assert not report.rewrites[0].final_state


def test_no_step_in_the_middle_of_a_delta_rule():
    """Where sums grow out of hand the state becomes a tensor like any other: one token against it is no decoding."""

    def run(q, k, v, beta):
        state, out = torch.zeros(1, 2, D, D), []
        for t in range(q.shape[2]):
            error = v[:, :, t] - read(k, state, t)
            state = state + k[:, :, t, :, None] * (beta[:, :, t, None] * error)[..., None, :]
            out.append(read(q, state, t))
        return torch.stack(out, 2)

    for n in (6, 16, 24):
        assert_refused(run, *heads(n), torch.rand(1, 2, n), obligation="recurrence")


@pytest.mark.parametrize("rates", [(0.9, 0.9), (0.9, 0.8)], ids=["one rate", "a number for each head"])
def test_heads_and_tokens_written_one_by_one(rates):
    """Rows of one head follow each other along the tokens, and two heads at the same tokens along the heads."""

    def run(q, k, v):
        out = torch.zeros_like(q)
        for h in range(q.shape[1]):
            state = torch.zeros(D, D)
            for t in range(q.shape[0]):
                state = rates[h] * state + torch.outer(k[t, h], v[t, h])
                out[t, h] = q[t, h] @ state
        return out

    args = [torch.randn(3, 2, D, requires_grad=True) for _ in range(3)]
    assert_rewritten(run, *args, count=len(set(rates)), compiled=False)

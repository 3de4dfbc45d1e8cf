"""Queries and keys turned by their position (RoPE), where the layer's own step does it to one token or chunk."""

from __future__ import annotations

import pytest
import torch

from lacompile.backend import lightning
from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D = 2, 2, 12, 8
ANGLES = torch.arange(float(N))[:, None] / 100 ** (torch.arange(0, D, 2) / D)
PAIRS = ANGLES.repeat_interleave(2, -1)
HALVES = torch.cat((ANGLES, ANGLES), -1)


def of_pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def of_halves(x):
    return torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)


def turned(rotated, angles):
    return lambda x, at: x * angles.cos()[at] + rotated(x) * angles.sin()[at]


ROTATIONS = {
    "pairs": turned(of_pairs, PAIRS),
    "halves": turned(of_halves, HALVES),
    "scaled by both": lambda x, at: x * PAIRS.cos()[at] + x * PAIRS.sin()[at],
}


def tokens(turn, of_keys=None):
    def run(q, k, v):
        state, out = torch.zeros(B, H, D, D), []
        for t in range(q.shape[2]):
            at = slice(t, t + 1)
            q_t, k_t, v_t = turn(q[:, :, at], at), (of_keys or turn)(k[:, :, at], at), v[:, :, at]
            state = 0.9 * state + k_t.mT @ v_t
            out.append(q_t @ state)
        return torch.cat(out, 2)

    return run


def chunks(turn, of_keys=None):
    def run(q, k, v):
        state, out = torch.zeros(B, H, D, D), []
        for a in range(0, q.shape[2], 4):
            at = slice(a, a + 4)
            q_c, k_c, v_c = turn(q[:, :, at], at), (of_keys or turn)(k[:, :, at], at), v[:, :, at]
            out.append((q_c @ k_c.mT).tril() @ v_c + q_c @ state)
            state = state + k_c.mT @ v_c
        return torch.cat(out, 2)

    return run


def inputs(form):
    return qkv(B, H, 5 if form is tokens else N, D)


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("form", [tokens, chunks])
def test_a_step_that_turns(form, name):
    assert_rewritten(form(ROTATIONS[name]), *inputs(form), compiled=False)


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("form", [tokens, chunks])
def test_exponentials_that_were_turned(form, name):
    """Before the loop, and by each step: an exponential of all features is no decay."""
    turn = ROTATIONS[name]

    def run(q, k, v):
        q, k = (turn(x.exp(), slice(0, x.shape[2])) for x in (q, k))
        return form(lambda x, at: x)(q, k, v)

    assert_rewritten(run, *inputs(form), compiled=False)
    assert_rewritten(form(lambda x, at: turn(x.exp(), at)), *inputs(form), compiled=False)


def with_own_tables(rotated, repeated, frequencies, scaled=False):
    """As a layer's own step does: the tables of its positions, which are 1 and 0 at the first, are made there."""

    def turn(x, at, sign=1):
        positions = torch.arange(at.start, at.stop)[:, None]
        cos, sin = (repeated(f(positions * frequencies())) for f in (torch.cos, torch.sin))
        if scaled:
            scale = repeated(SCALE ** (sign * positions / 64))
            cos, sin = cos * scale, sin * scale
        return x * cos + rotated(x) * sin

    return turn


SCALE = (torch.arange(0, D, 2) + 0.4 * D) / (1.4 * D)
FREQUENCIES = 1 / 100 ** (torch.arange(0, D, 2) / D)
OWN = {
    "pairs": with_own_tables(of_pairs, lambda x: x.repeat_interleave(2, -1), lambda: FREQUENCIES),
    "halves": with_own_tables(of_halves, lambda x: torch.cat((x, x), -1), lambda: FREQUENCIES),
    "made there": with_own_tables(
        of_halves, lambda x: torch.cat((x, x), -1), lambda: 1 / 100 ** (torch.arange(0, D, 2) / D)
    ),
    "scaled": with_own_tables(of_pairs, lambda x: x.repeat_interleave(2, -1), lambda: FREQUENCIES, scaled=True),
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("form", [tokens, chunks])
def test_a_step_that_makes_its_tables(form, name):
    turn = OWN[name]
    assert_rewritten(form(turn, lambda x, at: turn(x, at, -1)), *inputs(form), compiled=False)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("form", [tokens, chunks])
def test_a_step_that_turns_exponentials(form, name):
    def turn(x, at):
        return OWN[name](x.exp(), at)

    assert_rewritten(form(turn), *inputs(form), compiled=False)


def test_two_factors_at_one_token():
    """The same call with other numbers is another one, though both are of features alone."""
    first, second = PAIRS.cos(), HALVES.sin() + 2

    def run(q, k, v):
        state, out = torch.zeros(B, H, D, D), []
        for t in range(N):
            q_t, k_t = q[:, :, t : t + 1] * first[t : t + 1].exp().log(), k[:, :, t : t + 1] * second[t : t + 1]
            k_t = k_t + k[:, :, t : t + 1] * torch.cos(torch.arange(t, t + 1)[:, None] * HALVES[1])
            state = 0.9 * state + k_t.mT @ v[:, :, t : t + 1]
            out.append(q_t @ state)
        return torch.cat(out, 2)

    assert_rewritten(run, *qkv(B, H, N, D), compiled=False)


@pytest.mark.parametrize("form", [tokens, chunks])
def test_another_turn_for_the_states_of_one_step_is_left_alone(form):
    """At one token the keys are turned by the angles of another one."""
    turn = OWN["pairs"]

    def late(x, at):
        return turn(x, at) if at.start else turn(x, slice(at.start + 1, at.stop + 1))

    assert_rewritten(form(turn, late), *inputs(form), compiled=False)


def whole(repeated):
    """Tables that the program makes from the positions, and repeats behind the cosine."""

    def run(q, k, v):
        angles = torch.arange(float(q.shape[2]))[:, None] / 100 ** (torch.arange(0, D, 2) / D)
        cos, sin = repeated(angles.cos()), repeated(angles.sin())
        q, k = (x * cos + of_pairs(x) * sin for x in (q, k))
        return (q @ k.mT).tril() @ v

    return run


@pytest.mark.parametrize(
    "repeated",
    [
        lambda x: x.repeat_interleave(2, -1),
        lambda x: torch.stack((x, x), -1).flatten(-2),
        lambda x: torch.cat((x, x), -1),
        lambda x: x[:, torch.arange(D) // 2],
    ],
    ids=["interleaved", "stacked", "joined", "indexed"],
)
def test_tables_that_are_repeated(repeated):
    assert_rewritten(whole(repeated), *qkv(B, H, N, D), compiled=False)


def test_what_was_turned_last(without_inductor):
    """Each token is added twice, once turned as the one before it: no sum of one product."""

    def run(q, k, v):
        state, out, turn = torch.zeros(B, H, D, D), [], ROTATIONS["pairs"]
        for t in range(N):
            k_t = turn(k[:, :, t : t + 1], slice(t, t + 1)) + turn(k[:, :, max(t - 1, 0)][:, :, None], slice(t, t + 1))
            state = 0.9 * state + k_t.mT @ v[:, :, t : t + 1]
            out.append(q[:, :, t : t + 1] @ state)
        return torch.cat(out, 2)

    args = qkv(B, H, N, D)
    exact = run(*(x.double() for x in args))
    got = torch.compile(run, backend=lightning)(*args)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ROTATIONS)
def test_a_state_that_is_turned_is_left_alone(name):
    def run(q, k, v):
        state, out = torch.zeros(B, H, D, D), []
        for t in range(N):
            state = 0.9 * ROTATIONS[name](state, slice(t, t + 1)) + k[:, :, t, :, None] * v[:, :, t, None]
            out.append(q[:, :, t : t + 1] @ state)
        return torch.cat(out, 2)

    assert_refused(run, *qkv(B, H, N, D))

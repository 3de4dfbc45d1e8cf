"""Attentions over later positions: turned inputs, loops that go backwards, triangles above the diagonal; and twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D = 2, 3, 12, 4
DISTANCE = torch.arange(N)[:, None] - torch.arange(N)
BEHIND = DISTANCE <= 0


def arguments():
    return [*qkv(B, H, N, D), torch.randn(B, H, N, requires_grad=True)]


def turned(x):
    return x.flip(2)


def parallel(q, k, v, x):
    total = F.logsigmoid(x).cumsum(-1)
    weights = torch.exp((total[..., :, None] - total[..., None, :]).masked_fill(DISTANCE < 0, float("-inf")))
    return (q @ k.mT * weights) @ v


def decayed(q, k, v, x):
    return (q @ k.mT * torch.where(DISTANCE >= 0, 0.9 ** DISTANCE.clamp(min=0), 0.0)) @ v


def over_tokens(q, k, v, x, order=range(N), state=None, before=False):
    state = q.new_zeros(B, H, D, D) if state is None else state
    out = [None] * N
    for t in order:
        read = state
        state = torch.sigmoid(x[:, :, t, None, None]) * state + k[:, :, t, :, None] * v[:, :, t, None]
        out[t] = (q[:, :, t, None] @ (read if before else state))[:, :, 0]
    return torch.stack(out, 2), state


def backwards(*args, **options):
    return over_tokens(*args, order=range(N - 1, -1, -1), **options)


def suffix_sums(q, k, v, x):
    """What a token decays by from itself back to the row, as where gates are summed from the end."""
    total = F.logsigmoid(x).flip(-1).cumsum(-1).flip(-1)
    weights = torch.exp((total[..., :, None] - total[..., None, :]).masked_fill(~BEHIND, float("-inf")))
    return (q @ k.mT * weights) @ v


def by_triangle(q, k, v, x):
    return (q @ k.mT * (0.9 ** (-DISTANCE).clamp(min=0)).triu()) @ v


def without_the_diagonal(q, k, v, x):
    return (q @ k.mT * (0.9 ** (-DISTANCE).clamp(min=0)).triu(1)) @ v


def all_turned(f):
    return lambda *args: turned(f(*map(turned, args)))


def inputs_turned(f):
    return lambda *args: f(*map(turned, args))


def normalised(q, k, v, x):
    scores = (q.sigmoid() @ k.sigmoid().mT) * (0.9 ** (-DISTANCE).clamp(min=0)).triu()
    return scores @ v / scores.sum(-1, keepdim=True)


ONE = {
    "turned inputs": inputs_turned(decayed),
    "turned inputs, gates": inputs_turned(parallel),
    "turned": all_turned(decayed),
    "turned, gates": all_turned(parallel),
    "turned, tokens": all_turned(lambda *args: over_tokens(*args)[0]),
    "tokens": lambda *args: backwards(*args)[0],
    "tokens, a read before": lambda *args: backwards(*args, before=True)[0],
    "suffix sums": suffix_sums,
    "triangle": by_triangle,
    "triangle without the diagonal": without_the_diagonal,
}


@pytest.mark.parametrize("name", ONE)
def test_one_direction(name):
    assert_rewritten(ONE[name], *arguments(), compiled=False)


def test_a_normaliser_beside_it():
    assert_rewritten(normalised, *arguments(), count=2, compiled=False)


@pytest.mark.parametrize("before", [False, True])
def test_a_given_state(before):
    state = torch.randn(B, H, D, D, requires_grad=True)
    f = lambda *args: backwards(*args[:4], state=args[4], before=before)[0]  # noqa: E731
    assert_rewritten(f, *arguments(), state, compiled=False)


def test_the_state_at_the_beginning():
    assert_rewritten(backwards, *arguments(), compiled=False)


BOTH = {
    "sum": lambda *args: decayed(*args) + all_turned(decayed)(*args),
    "sum, gates": lambda *args: parallel(*args) + all_turned(parallel)(*args),
    "cat": lambda *args: torch.cat([parallel(*args), all_turned(parallel)(*args)], -1),
    "two loops": lambda *args: over_tokens(*args)[0] * backwards(*args)[0],
    "by distance": lambda q, k, v, x: (q @ k.mT * 0.9 ** DISTANCE.abs()) @ v,
}


@pytest.mark.parametrize("name", BOTH)
def test_both_directions(name):
    assert_rewritten(BOTH[name], *arguments(), count=2, compiled=False)


def test_any_length():
    def run(x):
        q, k, v = x.flip(1).split(D, -1)
        n = torch.arange(x.shape[1])
        apart = n[:, None] - n
        o = (q @ k.mT * torch.where(apart >= 0, 0.9 ** apart.clamp(min=0), 0.0)) @ v
        return o.flip(1) + x[..., :D]

    first, later = (torch.randn(B, n, 3 * D, requires_grad=True) for n in (N, 7))
    assert_rewritten(run, first, compiled=False, after=[later])


def test_features_that_are_turned():
    """The last feature of a query with the first one of a key."""
    f = lambda q, k, v, x: decayed(q.flip(-1), k, v.flip(-1), x)  # noqa: E731
    assert_rewritten(f, *arguments(), compiled=False)


TWINS = {
    "keys turned alone": lambda q, k, v, x: decayed(q, turned(k), v, x),
    "queries turned alone": lambda q, k, v, x: (turned(q) @ k.mT).tril() @ v,
    "a window behind": lambda q, k, v, x: (q @ k.mT * (BEHIND & (DISTANCE > -5))) @ v,
    "a triangle from the end": lambda q, k, v, x: (q @ k.mT * (DISTANCE.flip(0) >= 0)) @ turned(v),
    "a triangle two off": lambda q, k, v, x: (q @ k.mT).triu(2) @ v,
    "growing": lambda q, k, v, x: (q @ k.mT * (0.9 ** DISTANCE.clamp(max=0)).triu()).tril() @ v,
}


@pytest.mark.parametrize("name", TWINS)
def test_twins(name, without_inductor):
    """What is rewritten of them is what they compute."""
    f, args = TWINS[name], arguments()
    torch._dynamo.reset()
    made = torch.compile(f, backend="lightning", options={"validate": "off"})
    torch.testing.assert_close(made(*args), f(*args), rtol=1e-4, atol=1e-5)


def test_a_window_is_left_alone():
    assert_refused(TWINS["a window behind"], *arguments(), obligation="causal-range")

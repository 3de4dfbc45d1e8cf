"""Queries, keys and values by products with matrices that are plain tensors, and no parameters; near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.passes.lift.domain.affine import Aff
from lacompile.passes.lift.domain.digits import digits_of
from lacompile.passes.lift.domain.space import Space
from lacompile.testing import assert_refused, assert_rewritten

N, D, GAMMA = 8, 4, 0.9


def heads(y, h):
    return y.view(y.shape[0], y.shape[1], h, D).transpose(1, 2)


def of_each_head(w, h):
    """``[C, H * D]`` as ``[H, C, D]``."""
    return w.view(-1, h, D).transpose(0, 1)


PROJECTIONS = {
    "product": lambda x, w, h: heads(x @ w, h),
    "linear": lambda x, w, h: heads(F.linear(x, w), h),
    "einsum": lambda x, w, h: torch.einsum("bnc,chd->bhnd", x, w.view(-1, h, D)),
    "a matrix for each head": lambda x, w, h: x[:, None] @ of_each_head(w, h),
}


def weight(n):
    place = torch.arange(n)
    return (GAMMA ** (place[:, None] - place).float()).tril()


def square(q, k, v):
    return (q @ k.mT * weight(q.shape[2])) @ v


def tokens(q, k, v):
    state, out = torch.zeros(*q.shape[:2], D, D), []
    for t in range(q.shape[2]):
        q_t, k_t, v_t = (y[:, :, t : t + 1] for y in (q, k, v))
        state = GAMMA * state + k_t.mT @ v_t
        out.append(q_t @ state)
    return torch.cat(out, 2)


def tokens_by_index(q, k, v):
    state, out = torch.zeros(*q.shape[:2], D, D), []
    for t in range(q.shape[2]):
        state = GAMMA * state + k[:, :, t, :, None] * v[:, :, t, None]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
    return torch.stack(out, 2)


def chunks(q, k, v, size=4, of_keys=True):
    state, out, inside = torch.zeros(*q.shape[:2], D, D), [], weight(size)
    before, behind = GAMMA * inside[:, :1], inside[-1:].mT
    for a in range(0, q.shape[2], size):
        q_c, k_c, v_c = (y[:, :, a : a + size] for y in (q, k, v))
        out.append((q_c @ k_c.mT * inside) @ v_c + ((q_c * before) @ state if of_keys else (q_c @ state) * before))
        state = GAMMA**size * state + ((k_c * behind).mT @ v_c if of_keys else k_c.mT @ (v_c * behind))
    return torch.cat(out, 2)


def chunks_of_weighed_values(q, k, v):
    return chunks(q, k, v, of_keys=False)


FORMS = [square, tokens, tokens_by_index, chunks, chunks_of_weighed_values]


def inputs(batch, h):
    torch.manual_seed(0)
    c = h * D
    return [torch.randn(batch, N, c, requires_grad=True), *(torch.randn(c, c, requires_grad=True) for _ in range(3))]


SIZES = [(1, 1), (2, 2), (1, 2), (2, 1)]
"""Of batch and heads: one of each, or several, come by turns, so that every projection and every form has all four."""


def by_turns(names, forms, sizes):
    return [(a, b, sizes[(m + n) % len(sizes)]) for m, a in enumerate(names) for n, b in enumerate(forms)]


@pytest.mark.parametrize(("name", "form", "sizes"), by_turns(PROJECTIONS, FORMS, SIZES))
def test_is_one_attention(name, form, sizes):
    batch, h = sizes

    def run(x, *w):
        return form(*(PROJECTIONS[name](x, m, h) for m in w))

    report = assert_rewritten(run, *inputs(batch, h), compiled=False)
    assert report.rewrites[0].length == str(N)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_one_product_for_all_three(form, batch):
    def run(x, w):
        return form(*(heads(y, 2) for y in (x @ w).chunk(3, -1)))

    x, *w = inputs(batch, 2)
    assert_rewritten(run, x, torch.cat(w, 1).detach(), compiled=False)


@pytest.mark.parametrize("form", FORMS)
def test_of_any_batch(form):
    def run(x, *w):
        return form(*(heads(x @ m, 2) for m in w))

    assert_rewritten(run, *inputs(3, 2), after=inputs(5, 2), compiled=False)


# ----------------------------------------------------------------------------------------- scores are no projection

WEIGHED = {
    "at once": lambda s, up, down: s * weight(N),
    "rows first": lambda s, up, down: (s * down[:, None]).tril() * up,
    "keys first": lambda s, up, down: (s * up).tril() * down[:, None],
}


@pytest.mark.parametrize("shape", [(N, D), (1, N, D), (1, 1, N, D), (1, 2, N, D)])
@pytest.mark.parametrize("name", WEIGHED)
def test_scores_of_one_sequence(name, shape):
    """Queries times keys of which neither has a batch, or both have one of one."""
    down = GAMMA ** torch.arange(float(N))

    def run(q, k, v):
        return WEIGHED[name](q @ k.mT, 1 / down, down) @ v

    torch.manual_seed(0)
    assert_rewritten(run, *(torch.randn(shape, requires_grad=True) for _ in range(3)), compiled=False)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_given_state_is_no_matrix(after, batch):
    def run(q, k, v, state):
        out, inside = [], weight(4)
        for a in range(0, N, 4):
            q_c, k_c, v_c = (y[:, a : a + 4] for y in (q, k, v))
            before = GAMMA * inside[:, :1]
            out.append((q_c @ k_c.mT * inside) @ v_c + ((q_c @ state) * before if after else (q_c * before) @ state))
            state = GAMMA**4 * state + (k_c * inside[-1:].mT).mT @ v_c
        return torch.cat(out, 1)

    torch.manual_seed(0)
    qkv = [torch.randn(batch, N, D, requires_grad=True) for _ in range(3)]
    report = assert_rewritten(run, *qkv, torch.randn(batch, D, D), compiled=False)
    assert report.rewrites[0].initial_state


DIGITS = {
    "quotient": (lambda i, div: [div(i, 2)], [{2}]),
    "remainder": (lambda i, div: [i - div(i, 2) * 2], [{1}]),
    "both": (lambda i, div: [div(i, 2), i - div(i, 2) * 2], [{2}, {1}]),
    "in two ways": (lambda i, div: [div(i, 2), i - div(i, 6) * 6], [{2, 6}, {1, 2}]),
    "three": (lambda i, div: [div(i, 6), div(i, 2) - div(i, 6) * 3, i], [{6}, {2}, {1, 2, 6}]),
    "in ways that do not nest": (lambda i, div: [div(i, 2), div(i, 3)], [{1}, {1}]),
    "from elsewhere": (lambda i, div: [div(i, 2), div(i + 1, 4)], [{1}, {1}]),
    "whole": (lambda i, div: [i], [{1}]),
}


@pytest.mark.parametrize("name", DIGITS)
def test_digits_of_a_dimension(name):
    """By what their places are worth."""
    indices, worth = DIGITS[name]
    space = Space()
    found = digits_of(space, *([a] for a in indices(Aff.var(0), space.floordiv)))
    assert found == [{(0, step) for step in steps} for steps in worth]


# -------------------------------------------------------------------------------------------------------------- twins


def a_matrix_of_each_token(x, w, h):
    return torch.stack([heads((x[:, t] @ w.roll(t, 0))[:, None], h)[:, :, 0] for t in range(N)], 2)


def heads_of_neighbours(x, w, h):
    """Each head of a token by the matrix of the head that is as many places further as the token."""
    y = heads(x @ w, h)
    return torch.stack([y[:, :, t].roll(t, 1) for t in range(N)], 2)


OTHER_KEYS = {
    "a matrix of each token": a_matrix_of_each_token,
    "heads of neighbours": heads_of_neighbours,
    "heads that are stretches of tokens": lambda x, w, h: (x @ w).view(x.shape[0], h, N, D),
    "a matrix of each sequence": lambda x, w, h: heads(x @ torch.stack([w, w.T])[: x.shape[0]], h),
}


@pytest.mark.parametrize(("name", "form", "batch"), by_turns(OTHER_KEYS, FORMS, [1, 2]))
def test_other_keys(name, form, batch):
    """Rewritten or not, they are what they are."""

    def run(x, *w):
        return form(heads(x @ w[0], 2), OTHER_KEYS[name](x, w[1], 2), heads(x @ w[2], 2))

    assert_rewritten(run, *inputs(batch, 2), count=None, compiled=False)


def one_head_of_another_token(q, k, v):
    state, out = torch.zeros(*q.shape[:2], D, D), []
    for t in range(N):
        k_t = torch.stack([k[:, 0, t], k[:, 1, N - 1 - t]], 1)[:, :, None]
        state = GAMMA * state + k_t.mT @ v[:, :, t : t + 1]
        out.append(q[:, :, t : t + 1] @ state)
    return torch.cat(out, 2)


def exchanged_at_one_token(q, k, v, dim):
    state, out = torch.zeros(*q.shape[:2], D, D), []
    for t in range(N):
        v_t = v[:, :, t : t + 1].flip(dim) if t == 3 else v[:, :, t : t + 1]
        state = GAMMA * state + k[:, :, t : t + 1].mT @ v_t
        out.append(q[:, :, t : t + 1] @ state)
    return torch.cat(out, 2)


def heads_exchanged_at_one_token(q, k, v):
    return exchanged_at_one_token(q, k, v, 1)


def batches_exchanged_at_one_token(q, k, v):
    return exchanged_at_one_token(q, k, v, 0)


def weights_of_keys_turned(q, k, v):
    state, out, inside = torch.zeros(*q.shape[:2], D, D), [], weight(4)
    for a in range(0, N, 4):
        q_c, k_c, v_c = (y[:, :, a : a + 4] for y in (q, k, v))
        out.append((q_c @ k_c.mT * inside) @ v_c + (q_c * GAMMA * inside[:, :1]) @ state)
        state = GAMMA**4 * state + (k_c * inside[:, :1]).mT @ v_c
    return torch.cat(out, 2)


TWINS = [
    (one_head_of_another_token, 1), (one_head_of_another_token, 2), (heads_exchanged_at_one_token, 1),
    (heads_exchanged_at_one_token, 2), (batches_exchanged_at_one_token, 2), (weights_of_keys_turned, 1),
    (weights_of_keys_turned, 2),
]  # fmt: skip


@pytest.mark.parametrize("form, batch", TWINS)
def test_other_steps(form, batch):
    def run(x, *w):
        return form(*(heads(x @ m, 2) for m in w))

    assert_refused(run, *inputs(batch, 2))

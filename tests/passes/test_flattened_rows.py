"""Rows of all sequences in one dimension, as where ``(x.view(-1, C) @ w).view(B, N, -1)`` projects them; twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile import explain
from lacompile.testing import assert_refused, assert_rewritten

from .test_plain_matrices import FORMS, chunks, square, tokens, weight

B, H, N, D = 2, 2, 8, 4
C = H * D


def inputs(*more):
    torch.manual_seed(0)
    shapes = ((B, N, C), (C, 3 * C), *more)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def heads(rows):
    return rows.view(B, N, H, D).transpose(1, 2)


PROJECTIONS = {
    "product": lambda x, w: (x.reshape(-1, C) @ w).chunk(3, -1),
    "linear": lambda x, w: F.linear(x.flatten(0, 1), w.T).chunk(3, -1),
    "with a bias": lambda x, w: torch.addmm(w[0], x.view(B * N, C), w).chunk(3, -1),
    "a function of rows": lambda x, w: [y.softmax(-1) for y in (x.reshape(-1, C) @ w).chunk(3, -1)],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PROJECTIONS)
def test_is_one_attention(name, form):
    def run(x, w):
        return form(*(heads(y) for y in PROJECTIONS[name](x, w)))

    report = assert_rewritten(run, *inputs(), compiled=False)
    assert report.rewrites[0].length == str(N)


@pytest.mark.parametrize("form", [square, tokens])
def test_sequences_that_alternate(form):
    def run(x, w):
        rows = (x.transpose(0, 1).reshape(-1, C) @ w).chunk(3, -1)
        return form(*(y.view(N, B, H, D).permute(1, 2, 0, 3) for y in rows))

    report = assert_rewritten(run, *inputs(), compiled=False)
    assert report.rewrites[0].length == str(N)


def test_rows_that_are_an_input():
    def run(q, k, v):
        return square(heads(q), heads(k), heads(v))

    torch.manual_seed(0)
    assert_rewritten(run, *(torch.randn(B * N, C, requires_grad=True) for _ in range(3)), compiled=False)


def gated(x, w, wg):
    rows = x.reshape(-1, C)
    gates = F.logsigmoid(rows @ wg).view(B, N, H).transpose(1, 2)
    return [*(heads(y) for y in (rows @ w).chunk(3, -1)), gates]


def gated_square(q, k, v, g):
    total = g.cumsum(-1)
    return (q @ k.mT * (total[..., :, None] - total[..., None, :]).exp().tril()) @ v


def gated_chunks(q, k, v, g):
    state, out = torch.zeros(B, H, D, D), []
    for a in range(0, N, 4):
        q_c, k_c, v_c, g_c = (y[:, :, a : a + 4] for y in (q, k, v, g))
        total = g_c.cumsum(-1)
        out.append(gated_square(q_c, k_c, v_c, g_c) + (q_c * total.exp()[..., None]) @ state)
        state = total[..., -1, None, None].exp() * state + (k_c * (total[..., -1:] - total).exp()[..., None]).mT @ v_c
    return torch.cat(out, 2)


@pytest.mark.parametrize("form", [gated_square, gated_chunks])
def test_gates_of_all_rows(form):
    report = assert_rewritten(lambda *args: form(*gated(*args)), *inputs((C, H)), compiled=False)
    assert report.rewrites[0].decay_per_token


TOTALS = {
    "of a row less that of a key": lambda total: (total[..., :, None] - total[..., None, :]).exp().tril(),
    "of a row before less that of a key": lambda total: (
        (total[..., :, None] - total[..., None, :]).exp().tril() * (total[..., :1, None] - total[..., 1:2, None]).exp()
    ),
    "of a row": lambda total: total[..., :, None].exp().expand(-1, -1, -1, N).tril(),
    "of a key": lambda total: total[..., None, :].exp().expand(-1, -1, N, -1).tril(),
}


@pytest.mark.parametrize("name", TOTALS)
def test_gates_that_are_summed_over_all_rows(name):
    """Rewritten or not, they are what they are: from one row of a sequence to another all sums grow alike."""

    def run(x, w, wg):
        q, k, v, g = gated(x, w, wg)
        total = (g.transpose(1, 2).reshape(-1, H) / 8).cumsum(0).view(B, N, H).transpose(1, 2)
        return (q @ k.mT * TOTALS[name](total)) @ v

    args = inputs((C, H))
    torch._dynamo.reset()
    count = len(explain(run)(*args).rewrites)
    assert_rewritten(run, *args, count=count, compiled=False)


def test_chunks_that_are_sequences_of_their_own():
    """No token of an earlier chunk is read: a chunk is no other dimension than a batch is."""

    def run(x, w):
        q, k, v = (heads(y).unflatten(2, (2, 4)) for y in (x.reshape(-1, C) @ w).chunk(3, -1))
        return (q @ k.mT * weight(4)) @ v

    report = assert_rewritten(run, *inputs(), compiled=False)
    assert report.rewrites[0].length == "4"


# -------------------------------------------------------------------------------------------------------------- twins


def one_sequence_of_all_rows(q, k, v):
    """The state of one sequence is where the next one begins."""
    q, k, v = (y.transpose(0, 1).flatten(1, 2) for y in (q, k, v))
    return (q @ k.mT * weight(B * N)) @ v


def of_a_row_before(q, k, v):
    """The first token of a sequence reads the last one of the sequence before."""
    k, v = (y.transpose(0, 1).flatten(1, 2).roll(1, 1).unflatten(1, (B, N)).transpose(0, 1) for y in (k, v))
    return square(q, k, v)


def of_another_sequence(q, k, v):
    return square(q, k.flip(0), v)


def rows_of_another_length(q, k, v):
    """Stretches of six rows, where the sequences have eight."""
    q, k, v = (y.transpose(0, 1).flatten(1, 2)[:, :12].unflatten(1, (2, 6)) for y in (q, k, v))
    return (q @ k.mT * weight(6)) @ v


def no_longer_than_the_batch_is_far(q, k, v):
    """Of the second sequence each row reads one token more than of the first."""
    place, batch = torch.arange(N), torch.arange(B)[:, None, None, None]
    seen = (place[:, None] + batch >= place).float()
    return (q @ k.mT * 0.9 ** (place[:, None] - place).abs().float() * seen) @ v


def keys_of_all_sequences(q, k, v):
    """A row reads the tokens up to it of its own sequence, and all of those before."""
    rows = torch.arange(B * N)
    scores = q.transpose(0, 1).flatten(1, 2) @ k.transpose(0, 1).flatten(1, 2).mT
    seen = 0.9 ** (rows[:, None] % N - rows % N).float() * (rows[:, None] >= rows)
    return (scores * seen) @ v.transpose(0, 1).flatten(1, 2)


TWINS = [
    one_sequence_of_all_rows, of_a_row_before, of_another_sequence, rows_of_another_length,
    no_longer_than_the_batch_is_far, keys_of_all_sequences,
]  # fmt: skip


@pytest.mark.parametrize("form", TWINS)
def test_other_sequences(form):
    """Rewritten or not, they are what they are."""

    def run(x, w):
        return form(*(heads(y) for y in (x.reshape(-1, C) @ w).chunk(3, -1)))

    args = inputs()
    torch._dynamo.reset()
    count = len(explain(run)(*args).rewrites)
    assert_rewritten(run, *args, count=count, compiled=False)


@pytest.mark.parametrize("form", [no_longer_than_the_batch_is_far, keys_of_all_sequences])
def test_that_is_none(form):
    assert_refused(lambda x, w: form(*(heads(y) for y in (x.reshape(-1, C) @ w).chunk(3, -1))), *inputs())


@pytest.mark.parametrize("form", [tokens, chunks])
def test_a_state_that_goes_on_to_the_next_sequence(form):
    def run(x, w):
        q, k, v = (y.view(B * N, H, D).transpose(0, 1)[None] for y in (x.reshape(-1, C) @ w).chunk(3, -1))
        return form(q, k, v)

    report = assert_rewritten(run, *inputs(), compiled=False)
    assert report.rewrites[0].length == str(B * N)


# ------------------------------------------------------------------------------- rows of what a loop has written


def filled(x, w, read=lambda out: None):
    """What each token reads, written into its place of one tensor; ``read`` is told of it after each write."""
    q, k, v = (y.view(B, N, H, D) for y in (x @ w).chunk(3, -1))
    state, out, seen = x.new_zeros(B, H, D, D), x.new_zeros(B, N, H, D), []
    for t in range(N):
        state = 0.9 * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        out[:, t] = (q[:, t, :, None, :] @ state)[:, :, 0]
        seen.append(read(out))
    return out, [y for y in seen if y is not None]


OF_ROWS = {
    "a norm": lambda rows: F.layer_norm(rows, (C,)),
    "groups of each row": lambda rows: F.group_norm(rows, H),
    "a product": lambda rows: rows @ torch.ones(C, C).tril(),
}


@pytest.mark.parametrize("join", [lambda o: o.view(B * N, C), lambda o: o.reshape(-1, C)], ids=["view", "reshape"])
@pytest.mark.parametrize("name", OF_ROWS)
def test_rows_of_what_was_written(name, join):
    def run(x, w):
        return OF_ROWS[name](join(filled(x, w)[0])).view(B, N, C)

    report = assert_rewritten(run, *inputs(), compiled=False)
    assert report.rewrites[0].length == str(N)


def test_rows_that_are_read_half_way_too():
    """Those were other numbers then."""

    def run(x, w):
        out, seen = filled(x, w, lambda out: F.layer_norm(out.reshape(B * N, C).clone(), (C,)))
        return F.layer_norm(out.reshape(B * N, C), (C,)), seen[2]

    assert_rewritten(run, *inputs(), compiled=False)


def twice(out):
    out.mul_(2)


def nothing(out):
    out.zero_()


def one_row(out):
    out[:, 3] = 1


@pytest.mark.parametrize("write", [twice, nothing, one_row])
def test_what_is_written_after_the_rows_were_read(write):
    """They are not computed from what the tensor is in the end."""

    def run(x, w):
        out = filled(x, w)[0]
        rows = F.layer_norm(out.reshape(B * N, C).clone(), (C,))
        write(out)
        return rows

    assert_refused(run, *inputs(), obligation="causal-range", options={"validate": "off"})


@pytest.mark.parametrize("write", [twice, one_row])
def test_the_result_is_what_was_written_last(write):
    def run(x, w):
        out = filled(x, w)[0]
        rows = F.layer_norm(out.reshape(B * N, C).clone(), (C,))
        write(out)
        return rows, out

    args = inputs()
    torch._dynamo.reset()
    count = len(explain(run)(*args).rewrites)
    assert_rewritten(run, *args, count=count, compiled=False, options={"validate": "off"})

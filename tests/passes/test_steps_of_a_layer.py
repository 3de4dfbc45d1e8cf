"""A layer's own step called for each token or chunk: its norms see batch and tokens as one dimension; near twins."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from lacompile.decision import decide
from lacompile.options import Options
from lacompile.testing import assert_refused, assert_rewritten

from .test_filled import compared

B, H, N, D = 2, 3, 8, 4
C = H * D
RATES = torch.tensor([0.9, 0.8, 0.7])


def inputs(batch=B):
    torch.manual_seed(0)
    x, q, k, v = torch.randn(batch, N, C), *torch.randn(3, batch, H, N, D)
    w, w2 = torch.randn(2, C, C) / C**0.5
    return [a.requires_grad_() for a in (x, q, k, v, w, w2)]


def merged(o):
    """``[B, H, tokens, D]`` as ``[B, tokens, H * D]``."""
    return o.transpose(1, 2).reshape(o.shape[0], o.shape[2], C)


def tokens(q, k, v):
    """What each token reads, ``[B, 1, H * D]``."""
    state = q.new_zeros(q.shape[0], H, D, D)
    for t in range(N):
        state = RATES[:, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        yield merged(q[:, :, t, None] @ state)


def chunks(q, k, v, size=4):
    """What the tokens of each chunk read, ``[B, size, H * D]``."""
    slope = -RATES.log()[:, None, None]
    state = q.new_zeros(q.shape[0], H, D, D)
    for a in range(0, N, size):
        q_c, k_c, v_c = (x[:, :, a : a + size] for x in (q, k, v))
        n = q_c.shape[2]
        i = torch.arange(n)[:, None]
        inside = (q_c @ k_c.mT * torch.exp(-slope * (i - i.T)).tril()) @ v_c
        yield merged(inside + (q_c * torch.exp(-slope * (i + 1))) @ state)
        state = state * torch.exp(-slope * n) + (k_c * torch.exp(-slope * (n - 1 - i))).mT @ v_c


def rows(y):
    return y.reshape(-1, C)


def group_norm(y):
    return F.group_norm(y, H)


def hand_written_silu(y):
    return y * torch.sigmoid(y)


STEPS = {
    "group norm": lambda y, x, w, u: group_norm(rows(y)).reshape(y.shape),
    "view, not reshape": lambda y, x, w, u: group_norm(y.view(-1, C)).view(y.shape[0], -1, C),
    "flatten and unflatten": lambda y, x, w, u: group_norm(y.flatten(0, 1)).unflatten(0, (y.shape[0], -1)),
    "features before tokens": lambda y, x, w, u: group_norm(y.transpose(1, 2)).transpose(1, 2),
    "swapped axes": lambda y, x, w, u: group_norm(y.swapaxes(1, 2)).swapaxes(1, 2),
    "norm of each head": lambda y, x, w, u: F.layer_norm(y.reshape(-1, H, D), (D,)).reshape(y.shape),
    "rms norm of rows of heads": lambda y, x, w, u: F.rms_norm(y.reshape(-1, D), (D,)).reshape(y.shape),
    "heads first": lambda y, x, w, u: (
        F.layer_norm(y.unflatten(2, (H, D)).permute(2, 0, 1, 3).contiguous(), (D,)).permute(1, 2, 0, 3).flatten(2)
    ),
    "one norm of all that a step has": lambda y, x, w, u: F.layer_norm(y.flatten(1), (y[0].numel(),)).view(y.shape),
    "activation": lambda y, x, w, u: torch.tanh(rows(y)).reshape(y.shape),
    "matrix product": lambda y, x, w, u: (rows(y) @ w).reshape(y.shape),
    "gate and projection": lambda y, x, w, u: F.linear(F.silu(F.linear(x, w)) * group_norm(rows(y)).view(x.shape), u),
    "all of it by rows": lambda y, x, w, u: F.linear(F.silu(rows(x) @ w) * group_norm(rows(y)), u).view(x.shape),
    "gate by hand": lambda y, x, w, u: (hand_written_silu(rows(x) @ w) * group_norm(rows(y))).reshape(y.shape),
    "read twice": lambda y, x, w, u: hand_written_silu(group_norm(rows(y))).reshape(y.shape),
    "residuals": lambda y, x, w, u: (lambda h: h + F.gelu(F.layer_norm(h, (C,)) @ u))(x + F.linear(y, w)),
}


def layer(step, form, join=torch.cat):
    def run(x, q, k, v, w, u):
        found, outs, at = form(q, k, v), [], 0
        for y in found:
            outs.append(step(y, x[:, at : at + y.shape[1]], w, u))
            at += y.shape[1]
        return join(outs, 1)

    return run


BY_TURNS = [*zip(STEPS, itertools.cycle([tokens, chunks])), ("group norm", chunks), ("residuals", tokens)]
"""What is done to the rows of a step does not depend on how many tokens it has."""


@pytest.mark.parametrize(("name", "form"), BY_TURNS)
def test_is_one_attention(name, form):
    report = assert_rewritten(layer(STEPS[name], form), *inputs(), compiled=False)
    assert f"N={N} H={H}" in str(report) and not report.near_misses


def written(outs, dim):
    """Into place, one after the other."""
    size = outs[0].shape[1]
    out = torch.empty(outs[0].shape[0], N, C)
    for n, y in enumerate(outs):
        out[:, n * size : (n + 1) * size] = y
    return out


@pytest.mark.parametrize("form", [tokens, chunks])
def test_written_into_place(form):
    report = assert_rewritten(layer(STEPS["all of it by rows"], form, written), *inputs(), compiled=False)
    assert f"N={N} H={H}" in str(report)


@pytest.mark.parametrize("form", [tokens, chunks])
def test_one_sequence(form):
    report = assert_rewritten(layer(STEPS["group norm"], form), *inputs(1), compiled=False)
    assert f"N={N} H={H}" in str(report)


@pytest.mark.parametrize("form", [tokens, chunks])
def test_of_any_batch(form):
    run = layer(STEPS["all of it by rows"], form)
    report = assert_rewritten(run, *inputs(), after=inputs(5), compiled=False)
    assert f"N={N} H={H}" in str(report)


@pytest.mark.parametrize("form", [tokens, chunks])
def test_inductor_compiles_it(form):
    assert_rewritten(layer(STEPS["gate and projection"], form), *inputs())


def test_a_join_of_another_layout_keeps_it():
    """What ``cat`` makes of tensors whose channels are last in memory has them there, too."""

    def run(x, q, k, v, w, u):
        return torch.cat([group_norm(y[:, :, None].permute(0, 3, 1, 2)) for y in chunks(q, k, v)], 2)

    def backend(gm, example_inputs):
        return (decide(gm, example_inputs, Options(validate="off")).rewritten or gm).forward

    args = [a.detach() for a in inputs()]
    torch._dynamo.reset()
    want, got = run(*args), torch.compile(run, backend=backend)(*args)
    assert want.stride() == got.stride() and not want.is_contiguous()
    torch.testing.assert_close(want, got)


# -------------------------------------------------------------------------------------------------------------- twins


def of_this_one(t, n=3):
    """Whether the step of a token is another one than those of the others."""
    return t == n


def another_order(y, t, w):
    y = y.reshape(B, H, D)
    return group_norm((y.transpose(1, 2) if of_this_one(t) else y).reshape(-1, C)).reshape(B, 1, C)


def another_norm(y, t, w):
    return F.group_norm(rows(y), 2 if of_this_one(t) else H).reshape(B, 1, C)


def another_epsilon(y, t, w):
    return F.group_norm(rows(y), H, eps=1e-3 if of_this_one(t) else 1e-5).reshape(B, 1, C)


def another_matrix(y, t, w):
    return (rows(y) @ (w.T if of_this_one(t) else w)).reshape(B, 1, C)


def along_the_batch(y, t, w):
    return F.softmax(rows(y), 0).reshape(B, 1, C)


def a_matrix_of_each_token(y, t, w):
    return (rows(y) @ (w + t)).reshape(B, 1, C)


def random(y, t, w):
    return F.dropout(rows(y), 0.5, training=True).reshape(B, 1, C)


TWINS = [another_order, another_norm, another_epsilon, another_matrix, along_the_batch, a_matrix_of_each_token, random]


@pytest.mark.parametrize("step", TWINS)
def test_steps_of_two_kinds(step):
    def run(x, q, k, v, w, u):
        return torch.cat([step(y, t, w) for t, y in enumerate(tokens(q, k, v))], 1)

    assert_refused(run, *inputs())


def test_a_step_whose_result_the_state_reads():
    def run(x, q, k, v, w, u):
        state, outs = q.new_zeros(B, H, D, D), []
        for t in range(N):
            state = RATES[:, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
            y = F.group_norm(merged(q[:, :, t, None] @ state).reshape(-1, C), H)
            state = state + y.view(B, H, D, 1)
            outs.append(y.view(B, 1, C))
        return torch.cat(outs, 1)

    assert_refused(run, *inputs())


def read_elsewhere(y, outs, w):
    outs.append(group_norm(rows(y)))
    return outs[-1].reshape(B, 1, C)


def written_over(y, outs, w):
    """Of one step, behind its norm."""
    outs.append(rows(y).contiguous() * 1)
    normed = group_norm(outs[-1])
    outs[-1].mul_(3)
    return (normed + outs[-1]).reshape(B, 1, C)


def written_between(y, outs, w):
    """What all steps read, so that each has a matrix of its own."""
    outs[:] = outs or [w * 1]
    y = F.linear(rows(y), outs[0]).reshape(B, 1, C)
    with torch.no_grad():
        outs[0].mul_(0.5)
    return y


@pytest.mark.parametrize("step", [read_elsewhere, written_over, written_between])
def test_what_must_stay_where_it_is(step):
    def run(x, q, k, v, w, u):
        outs = []
        return torch.cat([step(y, outs, w) for y in tokens(q, k, v)], 1), outs[-1]

    args = [a.detach() for a in inputs()]
    report = compared(run, *args)
    assert not report.rewrites


def test_one_of_them_is_read_elsewhere():
    """It stays where it is, and so do the others."""

    def run(x, q, k, v, w, u):
        outs = [F.linear(group_norm(rows(y)), w) for y in tokens(q, k, v)]
        return torch.cat([y.reshape(B, 1, C) for y in outs], 1), outs[3] * 2

    assert_refused(run, *inputs())


def test_a_step_without_gradients():
    def run(x, q, k, v, w, u):
        outs = []
        for t, y in enumerate(tokens(q, k, v)):
            with torch.set_grad_enabled(t != 3):
                outs.append(group_norm(rows(y)).reshape(B, 1, C))
        return torch.cat(outs, 1)

    assert_refused(run, *inputs())

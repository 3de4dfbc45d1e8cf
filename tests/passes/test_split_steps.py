"""Steps of a layer that take what they have apart again, as gates and halves; and near twins."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from lacompile.decision import decide
from lacompile.options import Options
from lacompile.testing import assert_refused, assert_rewritten

from .test_filled import compared
from .test_steps_of_a_layer import B, C, N, chunks, inputs, layer, tokens

HALF = C // 2


def gated(split):
    """A gated network behind each token, its weights repeated so that they fit."""

    def step(y, x, w, u):
        a, b = split(x + y @ w)
        return (F.silu(a) * b) @ u[:HALF]

    return step


STEPS = {
    "chunk": gated(lambda z: z.chunk(2, -1)),
    "torch.chunk, dim by name": gated(lambda z: torch.chunk(z, 2, dim=2)),
    "split": gated(lambda z: z.split(HALF, -1)),
    "split of sizes": gated(lambda z: torch.split(z, [HALF, HALF], dim=-1)),
    "tensor_split": gated(lambda z: z.tensor_split(2, -1)),
    "slices": gated(lambda z: (z[..., :HALF], z[..., HALF:])),
    "slices of all dimensions": gated(lambda z: (z[:, :, HALF:], z[:, :, :HALF])),
    "slices from the end": gated(lambda z: (z[..., :-HALF], z[..., -HALF:])),
    "every other one": gated(lambda z: (z[..., ::2], z[..., 1::2])),
    "narrow": gated(lambda z: (z.narrow(-1, 0, HALF), torch.narrow(z, 2, HALF, HALF))),
    "halves that overlap": gated(lambda z: (z[..., 1 : HALF + 1], z[..., :HALF])),
    "unbind": gated(lambda z: z.unflatten(-1, (2, HALF)).unbind(-2)),
    "unbind in front": gated(lambda z: z.unflatten(-1, (2, HALF)).permute(2, 0, 1, 3).unbind()),
    "select": gated(lambda z: [z.unflatten(-1, (HALF, 2)).select(-1, n) for n in range(2)]),
    "numbers": gated(lambda z: [z.unflatten(-1, (2, HALF))[:, :, n] for n in (-1, 0)]),
    "new dimensions": gated(lambda z: [z.unflatten(-1, (2, HALF))[None, ..., n, :][0] for n in range(2)]),
    "glu": lambda y, x, w, u: F.glu(x + y @ w, -1) @ u[:HALF],
    "glu, its default": lambda y, x, w, u: F.glu(x + y @ w) @ u[:HALF],
    "of two networks": lambda y, x, w, u: gated(lambda z: z.chunk(2, -1))(F.gelu(y @ u), x, w, u),
    "an unused half": lambda y, x, w, u: F.silu((x + y @ w).chunk(2, -1)[0]) @ u[:HALF],
    "nothing is used": lambda y, x, w, u: (lambda z: (z.chunk(2, -1), F.silu(z))[1])(x + y @ w),
    "a part of the weights": lambda y, x, w, u: F.linear(y, w[:HALF]),
    "one feature as a gate": lambda y, x, w, u: F.silu(y @ w) * (y @ u)[..., :1].sigmoid(),
}


BY_TURNS = [*zip(STEPS, itertools.cycle([tokens, chunks])), ("chunk", chunks), ("glu", chunks)]
"""How a step takes apart what it has does not depend on how many tokens it has."""


@pytest.mark.parametrize(("name", "form"), BY_TURNS)
def test_is_one_attention(name, form):
    report = assert_rewritten(layer(STEPS[name], form), *inputs(), compiled=False)
    assert not report.near_misses


@pytest.mark.parametrize("name", ["chunk", "unbind in front", "slices"])
def test_rows_without_a_dimension_of_tokens(name):
    """Stacked, where tokens have a dimension that the steps' values have not."""

    def run(x, q, k, v, w, u):
        steps = [y[:, 0] for y in tokens(q, k, v)]
        if name == "unbind in front":
            halves = [(y @ w).view(B, 2, HALF).transpose(0, 1).unbind(0) for y in steps]
        elif name == "chunk":
            halves = [(y @ w).chunk(2, 1) for y in steps]
        else:
            halves = [((y @ w)[:, :HALF], (y @ w)[:, HALF:]) for y in steps]
        return torch.stack([F.silu(a) * b for a, b in halves], 1)

    assert_rewritten(run, *inputs(), compiled=False)


@pytest.mark.parametrize("form", [tokens, chunks])
def test_of_any_batch(form):
    assert_rewritten(layer(STEPS["chunk"], form), *inputs(), after=inputs(5), compiled=False)


def test_weights_that_are_normed_in_each_step():
    run = layer(lambda y, x, w, u: y @ F.normalize(w, dim=-1), tokens)
    assert_rewritten(run, *inputs(), compiled=False)


def test_inductor_compiles_it():
    assert_rewritten(layer(STEPS["chunk"], tokens), *inputs())


# -------------------------------------------------------------------------------------------------------------- twins


def stepwise(step):
    """Each step is told its number."""

    def run(x, q, k, v, w, u):
        return torch.cat([step(t, y, w, u) for t, y in enumerate(tokens(q, k, v))], 1)

    return run


def silu_of_halves(a, b, u):
    return (F.silu(a) * b) @ u[:HALF]


def others_halves(t, y, w, u):
    a, b = (y @ w).chunk(2, -1)
    return silu_of_halves(*((b, a) if t == 3 else (a, b)), u)


def another_slice(t, y, w, u):
    z, n = y @ w, int(t == 3)
    return silu_of_halves(z[..., n : n + HALF], z[..., :HALF], u)


def halves_of_the_batch(t, y, w, u):
    """Rows of one sequence beside those of another."""
    a, b = (y @ w).chunk(2, 0)
    return torch.cat([F.silu(a) * b, F.silu(b) * a.flip(0)], 0) @ u


@pytest.mark.parametrize("step", [others_halves, another_slice])
def test_steps_of_two_kinds(step):
    assert_refused(stepwise(step), *inputs())


def test_halves_of_the_batch():
    """Which may be moved, since they are no part of what is joined; right in any case."""
    compared(stepwise(halves_of_the_batch), *[a.detach() for a in inputs()])


def written_half(y, outs, w):
    """Into a view of what was projected, that is read afterwards."""
    z = F.linear(y, w)
    a, b = z.chunk(2, -1)
    with torch.no_grad():
        a.mul_(0.5)
    return torch.cat([F.silu(a) * b, b], -1) + F.silu(z)


def half_that_is_kept(y, outs, w):
    a, b = F.linear(y, w).chunk(2, -1)
    outs.append(b)
    return torch.cat([F.silu(a) * b] * 2, -1)


def overwritten_in_place(y, outs, w):
    a, b = F.linear(y, w).chunk(2, -1)
    return torch.cat([F.silu(a, inplace=True) * b, a], -1)


@pytest.mark.parametrize("step", [written_half, half_that_is_kept, overwritten_in_place])
def test_what_must_stay_where_it_is(step):
    def run(x, q, k, v, w, u):
        outs = []
        y = torch.cat([step(y, outs, w) for y in tokens(q, k, v)], 1)
        return y, *outs

    report = compared(run, *[a.detach() for a in inputs()])
    assert not report.rewrites


def test_split_without_gradients():
    def run(x, q, k, v, w, u):
        outs = []
        for t, y in enumerate(tokens(q, k, v)):
            with torch.set_grad_enabled(t != 3):
                a, b = (y @ w).chunk(2, -1)
            outs.append(silu_of_halves(a, b, u))
        return torch.cat(outs, 1)

    assert_refused(run, *inputs())


def test_an_unused_random_number_is_drawn():
    """What nobody reads goes, and what draws random numbers stays."""

    def run(x, q, k, v, w, u):
        outs = []
        for y in tokens(q, k, v):
            z = F.linear(y, w)
            F.dropout(torch.ones(3), 0.5)
            z.chunk(2, -1)
            outs.append(F.silu(z))
        return torch.cat(outs, 1)

    found = []

    def backend(gm, example_inputs):
        found.append(decide(gm, example_inputs, Options(validate="off")).rewritten)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(run, backend=backend)(*inputs())
    called = [n.target for n in found[0].graph.nodes]
    assert called.count(F.dropout) == N and "chunk" not in called


def test_a_part_of_the_weights_that_was_written_to_is_another_one():
    def run(x, q, k, v, w, u):
        outs, w = [], w * 1
        for y in tokens(q, k, v):
            outs.append(F.linear(y, w[:HALF]))
            with torch.no_grad():
                w.mul_(0.9)
        return torch.cat(outs, 1)

    assert not compared(run, *[a.detach() for a in inputs()]).rewrites


@pytest.mark.parametrize("p, training", [(0.0, True), (0.5, False)])
def test_dropout_that_drops_nothing(p, training):
    run = layer(lambda y, x, w, u: x + F.dropout(y @ w, p, training) @ u, tokens)
    assert_rewritten(run, *inputs(), compiled=False)


def test_dropout_that_drops():
    assert_refused(layer(lambda y, x, w, u: x + F.dropout(y @ w, 0.5, True) @ u, tokens), *inputs())


def test_dropout_that_drops_by_default():
    assert_refused(layer(lambda y, x, w, u: x + F.dropout(y @ w) @ u, tokens), *inputs())

"""Functions of q, k, v that are called with a second length, for which Dynamo gives each of them a symbol of its own.

What is taken for one is guarded: a call in which the lengths differ is traced anew. Validation is off: it sees one.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.backend import decide
from lacompile.options import Options
from lacompile.testing.budgets import relative_error

from .forms import LOOPS, PARALLEL, B, D, E, H
from .loops import BY_TOKEN

OPTIONS = Options.split({"validate": "off"})[0]
FORMS = ["undecayed", *(name for name in LOOPS if not name.endswith("of_two"))]
"""Most have chunks, of 8 to 64 tokens: one, several or ragged. Two of them are several."""


def inputs(*lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    sizes = zip(lengths if len(lengths) > 1 else lengths * 3, (D, D, E), strict=True)
    return [torch.randn(B, H, n, d, generator=generator, dtype=torch.float64) for n, d in sizes]


def compiled(f):
    """The rewritten program, run as it is, and the number of rewrites of each graph."""
    counts = []

    def backend(gm, example_inputs):
        decision = decide(gm, example_inputs, OPTIONS)
        counts.append(len(decision.report.rewrites))
        return (decision.rewritten or gm).forward

    torch._dynamo.reset()
    return torch.compile(f, backend=backend), counts


def same(made, f, *args):
    assert relative_error(made(*args), f(*args)) < 1e-12


@pytest.mark.parametrize("name", FORMS)
def test_a_second_length(name):
    made, counts = compiled(f := (PARALLEL | LOOPS)[name])
    slope = torch.linspace(0.02, 0.4, H, dtype=torch.float64)
    for n in (4, 7) if name in BY_TOKEN else (16, 24):
        same(made, f, *inputs(n), slope)
    assert set(counts) == {1}


def gated(q, k, v, g):
    state, out = q.new_zeros(B, H, D, v.shape[-1]), []
    for t in range(q.shape[2]):
        state = torch.exp(g[:, :, t, None, None]) * state + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(out, 2)


def test_a_decay_for_each_token():
    made, counts = compiled(gated)
    for n in (4, 9, 7):
        q, k, v = inputs(n)
        same(made, gated, q, k, v, -k[..., 0].abs())
    assert counts == [1, 1, 1]


def rectangular(q, k, v):
    return (q @ k.mT).tril() @ v


def test_lengths_that_differ_later():
    """The rows beyond the keys read all of them; the keys beyond the rows are read by none."""
    made, counts = compiled(rectangular)
    for lengths in ((8,), (12,), (20,), (12, 9, 9), (9, 12, 12), (15,)):
        same(made, rectangular, *inputs(*lengths))
    assert counts == [1, 1, 0]


def test_lengths_that_differ_at_first():
    made, counts = compiled(rectangular)
    for lengths in ((8,), (12, 9, 9), (15,)):
        same(made, rectangular, *inputs(*lengths))
    assert counts == [1, 0]


def into_values(q, k, v):
    """The values may have more tokens than the loop goes over: there the result is zero."""
    out, state = torch.zeros_like(v), q.new_zeros(B, H, D, v.shape[-1])
    for t in range(q.shape[2]):
        state = 0.9 * state + k[:, :, t, :, None] * v[:, :, t, None]
        out[:, :, t] = (q[:, :, t, None] @ state)[:, :, 0]
    return out


def test_results_that_are_longer_later():
    made, counts = compiled(into_values)
    for lengths in ((4,), (7,), (7, 7, 10), (7, 9, 7), (7,)):
        same(made, into_values, *inputs(*lengths))
    assert counts[:2] == [1, 1]


@pytest.mark.parametrize("f", [rectangular, into_values])
def test_what_a_user_marks_as_dynamic_stays_dynamic(f):
    made, _ = compiled(f)
    for n in (4, 7):
        q, k, v = inputs(n)
        for x in (k, v):
            torch._dynamo.mark_dynamic(x, 2)
        same(made, f, q, k, v)


def test_batch_and_length_of_one_number():
    """Two sizes of one tensor are never taken for one."""

    def f(x, y):
        return (F.silu(x) @ y.mT).tril() @ y

    made, counts = compiled(f)
    generator = torch.Generator().manual_seed(0)
    for b, n in ((4, 8), (12, 12), (5, 9), (12, 7)):
        x, y = (torch.randn(b, n, D, generator=generator, dtype=torch.float64) for _ in range(2))
        same(made, f, x, y)
    assert counts == [1, 1]


def in_blocks(q, k, v):
    """The last block may be shorter, and each decays by its own length."""
    n, block = q.shape[2], 4
    slope, place = torch.tensor([0.05, 0.2, 0.4], dtype=q.dtype)[:, None, None], torch.arange(block) + 1
    from_start, to_end = torch.exp(-slope * place[:, None]), torch.exp(-slope * (block - place[:, None]))
    inside = torch.exp(-slope * (place[:, None] - place)).tril()
    state, out = q.new_zeros(B, H, D, v.shape[-1]), []
    for i in range((n + block - 1) // block):
        start, end = i * block, min(i * block + block, n)
        size = end - start
        qq, kk, vv = (x[:, :, start:end] for x in (q, k, v))
        own = (qq @ kk.mT * inside[:, :size, :size]) @ vv
        out.append(own + (qq * from_start[:, :size]) @ state)
        state = state * torch.exp(-slope * size) + (kk * to_end[:, -size:]).mT @ vv
    return torch.cat(out, 2), state


def of_one_tensor(x):
    return in_blocks(*x.split([D, D, E], -1))


@pytest.mark.parametrize("joined", [False, True])
def test_blocks_that_end_where_the_sequence_does(joined):
    f = of_one_tensor if joined else in_blocks
    made, counts = compiled(f)
    for n in (8, 12, 10):
        args = [torch.cat(inputs(n), -1)] if joined else inputs(n)
        for got, want in zip(made(*args), f(*args), strict=True):
            assert relative_error(got, want) < 1e-12
    assert set(counts) == {1}

"""Chunks of several heads at a second length: a loop is traced for one number of chunks, which settles the length.

Queries, keys and values come from one tensor, whose tokens are split into chunks before the loop.
"""

import pytest
import torch
from torch import nn

from lacompile.testing import assert_rewritten

B, H, D, C = 2, 4, 8, 16
SHORT, LONG = 2 * C, 3 * C


def tokens(n):
    return torch.randn(B, n, 3 * H * D, generator=torch.Generator().manual_seed(n)).requires_grad_()


def in_chunks(x):
    """``[B, n, H, D]`` to ``[B, chunks, H, C, D]``."""
    return x.unflatten(1, (-1, C)).transpose(2, 3)


def parts(x):
    return map(in_chunks, x.unflatten(-1, (3, H, D)).unbind(2))


def rows(x, own=None, read=None, keep=1.0):
    """A loop over chunks; ``own`` weighs the pairs inside of one, ``read`` what it reads of the state."""
    q, k, v = parts(x)
    state, out = torch.zeros(B, H, D, D), []
    for n in range(q.shape[1]):
        a, b, c = q[:, n], k[:, n], v[:, n]
        scores = (a @ b.mT).tril() if own is None else a @ b.mT * own
        out.append(scores @ c + (a if read is None else a * read) @ state)
        state = keep * state + (b if read is None else b * read.flip(0) / 0.9).mT @ c
    return torch.stack(out, 1)


def undecayed(x):
    return rows(x)


def decayed(x, keep=0.9**C):
    i = torch.arange(C)
    return rows(x, (0.9 ** (i[:, None] - i)).tril(), (0.9 ** (i + 1.0))[:, None], keep)


def unbound(x):
    state, out = torch.zeros(B, H, D, D), []
    for a, b, c in zip(*(t.unbind(1) for t in parts(x)), strict=True):
        out.append((a @ b.mT).tril() @ c + a @ state)
        state = state + b.mT @ c
    return torch.cat(out, 2)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(3 * H * D, 3 * H * D)

    def forward(self, x):
        return undecayed(self.proj(x))


@pytest.mark.parametrize("program", [undecayed, decayed, unbound, Layer()])
def test_one_attention(program):
    report = assert_rewritten(program, tokens(LONG), after=[tokens(SHORT)], compiled=False)
    assert [r.length for r in report.rewrites] == [str(LONG)]


def test_through_inductor():
    assert_rewritten(unbound, tokens(LONG), after=[tokens(SHORT)])


def test_each_number_of_chunks_is_a_program_of_its_own(without_inductor):
    made = torch.compile(undecayed, backend="lightning")
    torch._dynamo.reset()
    with torch.no_grad():
        for n in (2 * C, 3 * C, 5 * C, 2 * C):
            torch.testing.assert_close(made(tokens(n)), undecayed(tokens(n)), rtol=1e-4, atol=1e-3)


def test_a_state_that_decays_otherwise_than_its_chunks():
    assert_rewritten(lambda x: decayed(x, 0.9 ** (C - 1)), tokens(LONG), after=[tokens(SHORT)], compiled=False, count=0)


def test_a_state_that_counts_before_it_is_read():
    def program(x):
        q, k, v = parts(x)
        state, out = torch.zeros(B, H, D, D), []
        for n in range(q.shape[1]):
            state = state + k[:, n].mT @ v[:, n]
            out.append((q[:, n] @ k[:, n].mT).tril() @ v[:, n] + q[:, n] @ state)
        return torch.stack(out, 1)

    assert_rewritten(program, tokens(LONG), after=[tokens(SHORT)], compiled=False, count=0)


def padded(x, keep=1.0, view=False):
    """Chunks of a sequence that the program pads to a multiple of theirs."""
    n, behind = x.shape[1], -x.shape[1] % C
    q, k, v = (nn.functional.pad(t, (0, 0, 0, behind)) for t in x.chunk(3, -1))
    state, out = torch.zeros(B, H * D, H * D), []
    for i in range((n + behind) // C):
        a, b, c = (t.unflatten(1, (-1, C))[:, i] if view else t[:, i * C : (i + 1) * C] for t in (q, k, v))
        out.append((a @ b.mT).tril() @ c + a @ state)
        state = keep * state + b.mT @ c
    return torch.cat(out, 1)[:, :n]


@pytest.mark.parametrize(("length", "view"), [(LONG, False), (LONG - 3, False), (LONG - 3, True)])
def test_a_length_that_the_program_pads(length, view):
    report = assert_rewritten(lambda x: padded(x, view=view), tokens(length), after=[tokens(SHORT)], compiled=False)
    assert [r.length for r in report.rewrites] == [str(length)]


def test_a_length_that_the_program_pads_and_a_state_that_decays_by_chunks():
    assert_rewritten(lambda x: padded(x, 0.9), tokens(LONG - 3), after=[tokens(SHORT)], compiled=False, count=0)

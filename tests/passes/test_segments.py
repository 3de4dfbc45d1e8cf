"""Sequences of unequal length packed into one tensor, each gone over by itself; and near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D = 1, 2, 14, 4
ENDS = ((0, 5), (5, 9), (9, 14))


def arguments():
    return [*qkv(B, H, N, D), torch.randn(B, H, N, requires_grad=True)]


def rows(tensors, a, b):
    return [t[:, :, a:b] for t in tensors]


def plain(q, k, v, x):
    return (q @ k.mT).tril() @ v


def decayed(q, k, v, x):
    sums = F.logsigmoid(x).cumsum(-1)
    return (q @ k.mT * (sums[..., :, None] - sums[..., None, :]).exp().tril()) @ v


def skipping(q, k, v, x):
    return plain(q, k, v, x) + v * x[..., None]


def by_tokens(q, k, v, x):
    state, out = q.new_zeros(B, H, D, D), []
    for t in range(q.shape[2]):
        state = state * torch.sigmoid(x[:, :, t, None, None]) + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(out, 2)


def joined(f, ends=ENDS):
    def run(*args):
        return torch.cat([f(*rows(args, a, b)) for a, b in ends], 2)

    return run


def written(f, ends=ENDS):
    def run(*args):
        out = torch.zeros_like(args[2])
        for a, b in ends:
            out[:, :, a:b] = f(*rows(args, a, b))
        return out

    return run


@pytest.mark.parametrize("f", [plain, decayed, skipping, by_tokens])
@pytest.mark.parametrize("form", [joined, written])
def test_segments(form, f):
    assert_rewritten(form(f), *arguments(), count=3, compiled=False)


@pytest.mark.parametrize("f", [plain, decayed, by_tokens])
@pytest.mark.parametrize("form", [joined, written])
def test_one_that_is_longer_than_the_others_together(form, f):
    assert_rewritten(form(f, ((0, 4), (4, 14))), *arguments(), count=2, compiled=False)


def test_what_no_segment_covers_is_zero():
    def run(*args):
        out = torch.zeros_like(args[2])
        for a, b in ((1, 5), (7, 12)):
            out[:, :, a:b] = decayed(*rows(args, a, b))
        return out

    assert_rewritten(run, *arguments(), count=2, compiled=False)


def test_behind_a_projection():
    def run(q, k, v, x, w):
        return F.silu(joined(decayed)(q, k, v, x) @ w)

    assert_rewritten(run, *arguments(), torch.randn(D, D, requires_grad=True), count=3, compiled=False)


def test_the_state_that_each_leaves():
    def run(q, k, v, x):
        outs, states = [], []
        for a, b in ENDS:
            y, u, w = rows((q, k, v), a, b)
            outs.append(plain(y, u, w, None))
            states.append(u.mT @ w)
        return torch.cat(outs, 2), torch.stack(states)

    assert_rewritten(run, *arguments(), count=3, compiled=False)


def overlapping(q, k, v, x):
    """Keys of the sequence before, the last of them."""
    parts = [(q[:, :, a:b] @ k[:, :, max(a - 1, 0) : b].mT).tril(min(a, 1)) for a, b in ENDS]
    return torch.cat([p @ v[:, :, max(a - 1, 0) : b] for p, (a, b) in zip(parts, ENDS, strict=True)], 2)


def carried_over_one(q, k, v, x):
    """The last sequence also sees the first."""
    parts = [plain(*rows((q, k, v), a, b), None) for a, b in ENDS]
    parts[2] = parts[2] + q[:, :, 9:] @ (k[:, :, :5].mT @ v[:, :, :5])
    return torch.cat(parts, 2)


def one_without_a_mask(q, k, v, x):
    parts = [plain(*rows((q, k, v), a, b), None) for a, b in ENDS]
    parts[1] = q[:, :, 5:9] @ k[:, :, 5:9].mT @ v[:, :, 5:9]
    return torch.cat(parts, 2)


def one_that_looks_ahead(q, k, v, x):
    parts = [plain(*rows((q, k, v), a, b), None) for a, b in ENDS]
    parts[1] = (q[:, :, 5:9] @ k[:, :, 5:9].mT).triu() @ v[:, :, 5:9]
    return torch.cat(parts, 2)


def a_longer_one_that_sees_another(q, k, v, x):
    first, second = (plain(*rows((q, k, v), a, b), None) for a, b in ((0, 4), (4, 14)))
    return torch.cat([first, second + q[:, :, 4:] @ (k[:, :, :3].mT @ v[:, :, :3])], 2)


def test_a_longer_one_with_something_added():
    """The attention that is left is one by itself; what is added stays."""
    assert_rewritten(a_longer_one_that_sees_another, *arguments(), count=1, compiled=False)


@pytest.mark.parametrize("f", [overlapping, carried_over_one, one_without_a_mask, one_that_looks_ahead])
def test_what_is_not_side_by_side(f):
    assert_refused(f, *arguments())


def test_written_over():
    """Where two sequences are written to the same rows, the later one holds."""

    def run(*args):
        out = torch.zeros_like(args[2])
        out[:, :, 0:8] = plain(*rows(args, 0, 8))
        out[:, :, 5:14] = plain(*rows(args, 5, 14))
        return out

    assert_rewritten(run, *arguments(), count=2, compiled=False)

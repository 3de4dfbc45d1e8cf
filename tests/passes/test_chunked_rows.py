"""Results that are read chunk by chunk, before the chunks are flattened, and near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv
from .forms import B, D, H

N, C = 16, 4


def inputs():
    return [*qkv(B, H, N, D), torch.randn(B, H, N, requires_grad=True)]


def chunked(q, k, v, gate, least=0.0):
    """``[B, H, N / C, C, D]``; a chunk's state is counted from ``least`` on."""
    q, k, v = (x.unflatten(2, (N // C, C)) for x in (q, k, v))
    upto = F.logsigmoid(gate).unflatten(2, (N // C, C)).cumsum(-1)
    inside = (q @ k.mT * (upto[..., :, None] - upto[..., None, :]).exp().tril()) @ v
    added = (k * (upto[..., -1:] - upto).exp()[..., None]).mT @ v
    state, states = torch.zeros_like(added[:, :, 0]) + least, []
    for c in range(N // C):
        states.append(state)
        state = state * upto[:, :, c, -1].exp()[..., None, None] + added[:, :, c]
    return inside + (q * upto.exp()[..., None]) @ torch.stack(states, 2)


def as_it_is(q, k, v, gate):
    return chunked(q, k, v, gate)


def normed(q, k, v, gate):
    return F.rms_norm(chunked(q, k, v, gate), (D,)).flatten(2, 3)


def heads_last(q, k, v, gate):
    return torch.tanh(chunked(q, k, v, gate).permute(2, 0, 3, 1, 4)).flatten(1, 2)


def heads_and_features_joined(q, k, v, gate):
    return torch.tanh(chunked(q, k, v, gate).permute(0, 2, 3, 1, 4).flatten(3))


def rows(i):
    return i[..., None] - torch.arange(N)


def weighed(q, k, v, d, weight):
    """Rows numbered as ``d`` is, over all positions."""
    number = "xyz"[: d.dim() - 1]
    q = q.unflatten(2, d.shape[:-1])
    scores = torch.einsum(f"bh{number}d,bhjd->bh{number}j", q, k) * weight
    return torch.einsum(f"bh{number}j,bhje->b{number}he", scores, v).tanh()


def three_numbers(q, k, v, gate):
    d = rows(torch.arange(N).view(2, 2, C))
    return weighed(q, k, v, d, 0.9 ** d.clamp(min=0) * (d >= 0))


def earlier_ones(q, k, v, gate):
    d = rows(torch.arange(N).view(-1, C))
    return weighed(q, k, v, d, 0.9 ** d.clamp(min=0) * (d > 0))


def later_ones(q, k, v, gate):
    d = -rows(torch.arange(N).view(-1, C))
    return weighed(q, k, v, d, 0.9 ** d.clamp(min=0) * (d >= 0))


def queries_in_another_order(q, k, v, gate):
    d = rows(torch.arange(N).view(-1, C)).transpose(0, 1)
    return weighed(q, k, v, d, 0.9 ** d.clamp(min=0) * (d >= 0))


FORMS = [as_it_is, normed, heads_last, heads_and_features_joined, three_numbers, earlier_ones, later_ones]
FORMS.append(queries_in_another_order)


@pytest.mark.parametrize("form", FORMS)
def test_rows_by_chunk_and_place(form):
    assert_rewritten(form, *inputs(), compiled=form in (normed, three_numbers))


def chunks_that_overlap(q, k, v, gate):
    d = rows(torch.arange(3)[:, None] * C + torch.arange(5))
    scores = torch.einsum("bhxyd,bhjd->bhxyj", q[:, :, :15].unflatten(2, (3, 5)), k)
    return torch.einsum("bhxyj,bhje->bhxye", scores * (0.9 ** d.clamp(min=0) * (d >= 0)), v)


def one_place_more(q, k, v, gate):
    """The last place of each chunk is numbered as the first one of the next chunk but one."""
    d = rows(torch.arange(N).view(-1, C) + (torch.arange(C) == C - 1))
    return weighed(q, k, v, d, 0.9 ** d.clamp(min=0) * (d >= 0))


@pytest.mark.parametrize("twin", [one_place_more, chunks_that_overlap])
def test_twins_with_other_rows(twin):
    assert_refused(twin, *inputs())

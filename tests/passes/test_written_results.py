"""A result that the program writes into: the attention is what it was before, and the write stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.passes.lift.interpret import writes
from lacompile.testing import assert_rewritten

from .drawn import qkv, slopes
from .forms import B, D, H, mask

N = 12


def arguments(n=N):
    return [*qkv(B, H, n, D), slopes()]


def attention(q, k, v, slope):
    return (q @ k.mT * mask(slope, q.shape[2])) @ v


def residual(o, v):
    o += v
    return o


def divided(o, v):
    o /= D**0.5
    return o


def gated(o, v):
    return o.mul_(torch.sigmoid(v)).add_(v), o.sum()


def function(o, v):
    return F.relu_(o)


def function_by_name(o, v):
    F.relu_(o)
    return o


def read_in_between(o, v):
    first = o.relu()
    o += v
    second = o * 2
    o.clamp_(-1, 1)
    return o, first, second


def viewed_before(o, v):
    view, copy = o.transpose(1, 2), o.transpose(1, 2).reshape(o.shape[0], o.shape[2], -1)
    o += v
    return o, view, copy


def viewed_and_forgotten(o, v):
    view = o.transpose(1, 2)
    F.relu_(o)
    return view * 2


def written_for_nothing(o, v):
    first = o * 2
    F.relu_(o)
    return first


def written_in_part(o, v):
    twice = o * 2
    o[..., 3:5] += 1
    return o, twice


WRITES = [residual, divided, gated, function, function_by_name, read_in_between, viewed_before]
WRITES += [viewed_and_forgotten, written_for_nothing, written_in_part]


@pytest.mark.parametrize("write", WRITES)
def test_is_rewritten(write):
    assert_rewritten(lambda q, k, v, slope: write(attention(q, k, v, slope), v), *arguments())


@pytest.mark.parametrize("write", [residual, viewed_before])
def test_any_length(write):
    run = lambda q, k, v, slope: write(attention(q, k, v, slope), v)  # noqa: E731
    assert_rewritten(run, *arguments(17), after=arguments())


def test_one_head_after_the_other():
    def heads(q, k, v, slope):
        out = []
        for h in range(H):
            o = (q[:, h] @ k[:, h].mT * mask(slope, q.shape[2])[h]) @ v[:, h]
            o += v[:, h]
            out.append(o)
        return torch.stack(out, 1)

    assert_rewritten(heads, *arguments())


def test_a_fault_in_the_analysis_of_a_write_costs_what_is_written_into(monkeypatch):
    def broken(*args):
        raise RecursionError

    def f(q, k, v, slope):
        other = torch.zeros_like(v)
        other[:, :, 1] = v[:, :, 0]
        return attention(q, k, v, slope), other, other.view(-1)

    monkeypatch.setattr(writes, "written_at", broken)
    assert_rewritten(f, *arguments(), compiled=False)

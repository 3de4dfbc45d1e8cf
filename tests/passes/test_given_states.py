"""Sums and their normalisers that start from a given state, as a prefill behind a cache does; and near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile import explain
from lacompile.testing import assert_rewritten

from .drawn import qkv

B, H, N, D, E = 1, 2, 12, 4, 3


def arguments():
    return [*qkv(B, H, N, D, E), *(torch.rand(B, H, D, *e, requires_grad=True) for e in ((E,), ()))]


FEATURES = {"exp": torch.exp, "elu": lambda x: F.elu(x) + 1}


def running_sums(features):
    def run(q, k, v, s, z):
        q, k = features(q), features(k)
        s = s[:, :, None] + (k[..., None] * v[..., None, :]).cumsum(2)
        z = z[:, :, None] + k.cumsum(2)
        below = torch.einsum("bhnd,bhnd->bhn", q, z)[..., None] + 1e-6
        return torch.einsum("bhnd,bhnde->bhne", q, s) / below, s[:, :, -1]

    return run


def chunks(features, query=lambda q: q, size=4):
    def run(q, k, v, s, z):
        q, k, out = features(q), features(k), []
        for qc, kc, vc in zip(*(x.split(size, 2) for x in (q, k, v)), strict=True):
            scores = (qc @ kc.mT).tril()
            above = scores @ vc + query(qc) @ s
            below = scores.sum(-1, keepdim=True) + query(qc) @ z[..., None]
            out.append(above / (below + 1e-6))
            s, z = s + kc.mT @ vc, z + kc.sum(2)
        return torch.cat(out, 2), s

    return run


@pytest.mark.parametrize("form", [running_sums, chunks])
def test_features_by_exp(form):
    report = assert_rewritten(form(FEATURES["exp"]), *arguments(), count=2, compiled=False)
    assert all(r.initial_state for r in report.rewrites)
    assert any(r.final_state for r in report.rewrites)


def test_other_features():
    report = assert_rewritten(running_sums(FEATURES["elu"]), *arguments(), count=2, compiled=False)
    assert all(r.initial_state for r in report.rewrites)


@pytest.mark.parametrize("size", [5, 7])
def test_a_last_chunk_that_is_shorter(size):
    assert_rewritten(chunks(FEATURES["exp"], size=size), *arguments(), count=2, compiled=False)


def test_a_state_read_by_another_query():
    """What the state is multiplied by must be what the keys are."""
    torch._dynamo.reset()
    run = chunks(FEATURES["exp"], lambda q: q * q)
    assert not any(r.initial_state for r in explain(run)(*arguments()).rewrites)


def test_a_state_that_is_read_once_more():
    """Its features of both kinds beside every position are no small thing to add."""

    def run(q, k, v, s, z):
        q, k = q.exp(), k.exp()
        sums = s[:, :, None] + (k[..., None] * v[..., None, :]).cumsum(2)
        return torch.einsum("bhnd,bhnde->bhne", q, sums) + torch.einsum("bhnd,bhde->bhne", q * q, s) * z.sum()

    report = assert_rewritten(run, *arguments(), count=1, compiled=False)
    assert report.rewrites[0].initial_state


def test_keys_of_the_state_before():
    """A delta rule that starts from a state is no more than its steps."""

    def run(q, k, v, s, z):
        out = []
        for t in range(6):
            error = v[:, :, t] - torch.einsum("bhd,bhde->bhe", k[:, :, t], s)
            s = s + k[:, :, t, :, None] * error[..., None, :]
            out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
        return torch.stack(out, 2) * z.sum()

    torch._dynamo.reset()
    assert all(r.length == "1" for r in explain(run)(*arguments()).rewrites)

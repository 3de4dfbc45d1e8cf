"""Gates that are padded with ones to whole chunks: a token that is not there decays by nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D, C = 1, 2, 29, 8, 8
CHUNKS = -(-N // C)
EMPTY = CHUNKS * C - N


def chunked(log_gates):
    """All chunks at once, and a loop over states alone."""

    def run(q, k, v, a):
        q, k, v = (F.pad(t, (0, 0, 0, EMPTY)).reshape(B, H, CHUNKS, C, D) for t in (q, k, v))
        c = log_gates(a).cumsum(-1)
        weight = (c[..., :, None] - c[..., None, :]).masked_fill(~torch.ones(C, C).tril().bool(), -torch.inf).exp()
        intra, kv = (q @ k.mT * weight) @ v, (k * (c[..., -1:] - c).exp()[..., None]).mT @ v
        q, state, out = q * c.exp()[..., None], torch.zeros(B, H, D, D), []
        for i in range(CHUNKS):
            out.append(q[:, :, i] @ state + intra[:, :, i])
            state = c[:, :, i, -1].exp()[..., None, None] * state + kv[:, :, i]
        return torch.stack(out, 2).reshape(B, H, CHUNKS * C, D)[:, :, :N]

    return run


def in_chunks(x):
    return x.reshape(B, H, CHUNKS, C)


def arguments():
    return [*qkv(B, H, N, D), (torch.rand(B, H, N) * 0.5 + 0.4).requires_grad_()]


LOGS = {
    "reshaped before": lambda a: in_chunks(F.pad(a, (0, EMPTY), value=1.0)).log(),
    "reshaped after": lambda a: in_chunks(F.pad(a, (0, EMPTY), value=1.0).log()),
    "zeros": lambda a: in_chunks(F.pad(a.log(), (0, EMPTY))),
    "of a function": lambda a: in_chunks(F.pad(a.sigmoid(), (0, EMPTY), value=1.0)).log(),
    "to base 2": lambda a: in_chunks(F.pad(a, (0, EMPTY), value=1.0)).log2(),
}


@pytest.mark.parametrize("logs", LOGS)
def test_of_gates_and_ones(logs):
    report = assert_rewritten(chunked(LOGS[logs]), *arguments(), compiled=False)
    assert report.rewrites[0].decay_per_token
    assert report.rewrites[0].decay.endswith(("log(a)", "log(sigmoid(a))", "log_sigmoid(a)", "log2(a)"))


TWINS = {
    "tokens that are there": lambda a: in_chunks(torch.where(torch.arange(N + EMPTY) < 20, F.pad(a, (0, EMPTY)), 1)),
    "a part of the gates": lambda a: in_chunks(F.pad(a[..., : N - 5], (0, EMPTY + 5), value=1.0)),
    "another number": lambda a: in_chunks(F.pad(a, (0, EMPTY), value=0.5)),
}


@pytest.mark.parametrize("twin", TWINS)
def test_what_is_no_padding_with_ones(twin):
    assert_refused(chunked(lambda a: TWINS[twin](a).log()), *arguments())


def test_a_number_of_which_the_function_is_not_zero():
    """sigmoid(1) of the tokens that are not there is a decay like another."""
    assert_refused(chunked(lambda a: F.logsigmoid(in_chunks(F.pad(a, (0, EMPTY), value=1.0)))), *arguments())

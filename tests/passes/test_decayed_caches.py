"""Keys that a loop keeps of all tokens so far, and that decay with each step; and near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D, E = 2, 2, 8, 4, 3


def arguments():
    operands = qkv(B, H, N, D, E)
    return [*operands, torch.randn(B, H, N).requires_grad_()]


def number(g, t):
    return 0.9


def gate(g, t):
    return torch.sigmoid(g[:, :, t, None, None])


def exponential(g, t):
    return F.logsigmoid(g[:, :, t, None, None]).exp()


def joined(decay, k_decays=True):
    def run(q, k, v, g):
        keys, values, out = k[:, :, :0], v[:, :, :0], []
        for t in range(N):
            a = decay(g, t)
            keys = torch.cat([keys * a if k_decays else keys, k[:, :, t : t + 1]], 2)
            values = torch.cat([values if k_decays else values * a, v[:, :, t : t + 1]], 2)
            out.append(q[:, :, t : t + 1] @ keys.mT @ values)
        return torch.cat(out, 2)

    return run


def with_values_that_decay(decay):
    return joined(decay, k_decays=False)


def from_the_first_token_on(decay):
    def run(q, k, v, g):
        keys, values = k[:, :, :1], v[:, :, :1]
        out = [q[:, :, :1] @ keys.mT @ values]
        for t in range(1, N):
            keys = torch.cat([keys * decay(g, t), k[:, :, t : t + 1]], 2)
            values = torch.cat([values, v[:, :, t : t + 1]], 2)
            scores = (q[:, :, t : t + 1] * keys).sum(-1, keepdim=True)
            out.append((scores * values).sum(2, keepdim=True))
        return torch.cat(out, 2)

    return run


def listed(decay):
    def run(q, k, v, g):
        keys, values, out = [], [], []
        for t in range(N):
            keys = [x * decay(g, t) for x in keys] + [k[:, :, t : t + 1]]
            values.append(v[:, :, t : t + 1])
            out.append(q[:, :, t : t + 1] @ torch.cat(keys, 2).mT @ torch.cat(values, 2))
        return torch.cat(out, 2)

    return run


@pytest.mark.parametrize("decay", [number, gate, exponential])
@pytest.mark.parametrize("form", [joined, with_values_that_decay, from_the_first_token_on, listed])
def test_keys_that_decay_in_a_cache(form, decay):
    assert_rewritten(form(decay), *arguments(), grads=True, compiled=False)


def of_another_number_once(g, t):
    return 0.8 if t == 5 else 0.9


def of_another_sign(g, t):
    return -0.9


def of_a_gate_of_any_sign(g, t):
    return torch.tanh(g[:, :, t, None, None])


def of_the_token_before(g, t):
    return torch.sigmoid(g[:, :, t - (t == 4), None, None])


@pytest.mark.parametrize("form", [joined, from_the_first_token_on, listed])
@pytest.mark.parametrize("decay", [of_another_number_once, of_another_sign, of_a_gate_of_any_sign, of_the_token_before])
def test_twins(form, decay):
    assert_refused(form(decay), *arguments())


def test_heads_side_by_side_stay_data():
    def run(q, k, v, g):
        keys = torch.cat([k[:, :1] * 0.5, k[:, 1:]], 1)
        return (q @ F.normalize(keys, dim=-1).mT).tril() @ v

    assert_rewritten(run, *arguments()[:3], arguments()[3].detach(), compiled=False)

"""Heads that are normed by themselves and put together in each step of a loop; near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lacompile.testing import assert_rewritten

from .test_filled import compared

B, H, D, CHUNK = 2, 2, 6, 4
C = H * D
RATES = [0.9, 0.8]


def token(x, project, state, rate):
    q, k, v = (p(x) for p in project)
    state = rate * state + k[:, :, None] * v[:, None, :]
    return (q[:, :, None] * state).sum(1), state


def chunk(x, project, state, rate):
    q, k, v = (p(x) for p in project)
    n = x.shape[1]
    i = torch.arange(n).to(x)[:, None]
    out = (q @ k.mT * (rate ** (i - i.T)).tril()) @ v + (q * rate ** (i + 1)) @ state
    return out, rate**n * state + (k * rate ** (n - 1 - i)).mT @ v


LENGTHS = {token: 5, chunk: 12}


def norm(y, n):
    return F.layer_norm(y, (D,))


def cat(heads, n):
    return torch.cat(heads, -1)


def stack(heads, n):
    return torch.stack(heads, -2).flatten(-2)


class Layer(nn.Module):
    """``of_head(y, n)`` and ``together(heads, n)`` are of step ``n``."""

    def __init__(self, form, of_head=norm, together=cat, *, projected=True):
        super().__init__()
        torch.manual_seed(0)
        self.form, self.of_head, self.together = form, of_head, together
        self.project = nn.ModuleList(nn.ModuleList(nn.Linear(C, D, bias=False) for _ in "qkv") for _ in RATES)
        self.out = nn.Linear(C, C) if projected else nn.Identity()

    def forward(self, x):
        size = CHUNK if self.form is chunk else 1
        states, outs = [x.new_zeros(x.shape[0], D, D) for _ in RATES], []
        for n, a in enumerate(range(0, x.shape[1], size)):
            given = x[:, a : a + size] if self.form is chunk else x[:, a]
            heads = []
            for h, rate in enumerate(RATES):
                y, states[h] = self.form(given, self.project[h], states[h], rate)
                heads.append(self.of_head(y, n))
            outs.append(self.out(self.together(heads, n)))
        return torch.cat(outs, 1) if self.form is chunk else torch.stack(outs, 1)


def hstack(heads, n):
    """Along the first dimension but one: of features, where a token has no other."""
    return torch.hstack(heads) if heads[0].dim() == 2 else torch.concatenate(heads, axis=-1)


def dstack(heads, n):
    """A token's are matrices, and are given a third dimension; a chunk's have one."""
    return torch.dstack(heads).transpose(1, 2).flatten(1) if heads[0].dim() == 2 else torch.dstack(heads)


def tokens(form):
    torch.manual_seed(1)
    return torch.randn(B, LENGTHS[form], C, requires_grad=True)


@pytest.mark.parametrize(
    ("form", "together", "projected"),
    [
        (token, cat, True),
        (token, stack, False),
        (token, hstack, True),
        (token, dstack, False),
        (chunk, cat, False),
        (chunk, stack, True),
        (chunk, hstack, False),
        (chunk, dstack, True),
    ],
)
def test_is_one_attention(form, together, projected):
    """Any two of them together in one case at least."""
    f = Layer(form, together=together, projected=projected)
    report = assert_rewritten(f, tokens(form), compiled=False)
    assert f"N={LENGTHS[form]} H={H}" in str(report)


@pytest.mark.parametrize("form", [token, chunk])
def test_heads_that_are_gated(form):
    assert_rewritten(Layer(form, lambda y, n: F.silu(norm(y, n))), tokens(form), compiled=False)


def test_inductor_compiles_it():
    assert_rewritten(Layer(token), tokens(token))


TWINS = {
    "heads exchanged": {"together": lambda heads, n: cat(heads[::-1] if n == 1 else heads, n)},
    "put together along another dimension": {"together": lambda heads, n: torch.stack(heads, -1).flatten(-2)},
    "once along another dimension": {
        "together": lambda heads, n: torch.stack(heads, -1).flatten(-2) if n == 1 else stack(heads, n)
    },
    "one head twice": {"together": lambda heads, n: cat([heads[0]] * H if n == 1 else heads, n)},
    "another norm": {"of_head": lambda y, n: F.normalize(y, dim=-1) if n == 1 else norm(y, n)},
    "no norm": {"of_head": lambda y, n: y if n == 1 else norm(y, n)},
    "another epsilon": {"of_head": lambda y, n: F.layer_norm(y, (D,), eps=1.0 if n == 1 else 1e-5)},
}


@pytest.mark.parametrize("form", [token, chunk])
@pytest.mark.parametrize("name", TWINS)
def test_steps_of_two_kinds(name, form):
    """Rewritten or not, they are what they are."""
    compared(Layer(form, **TWINS[name]).double(), tokens(form))


def test_batches_put_together_are_no_heads():
    layer = Layer(token).double()

    def f(x):
        states, outs = [x.new_zeros(B, D, D) for _ in RATES], []
        for t in range(x.shape[1]):
            ys = []
            for h, rate in enumerate(RATES):
                y, states[h] = token(x[:, t], layer.project[h], states[h], rate)
                ys.append(norm(y, t))
            outs.append(torch.cat(ys, 0))
        return torch.stack(outs, 0), torch.stack(outs, 1)

    compared(f, tokens(token))

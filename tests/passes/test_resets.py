"""Gates that are masked by token: a state begins anew where a sequence does, padding neither decays nor adds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D, C = 1, 2, 12, 4, 4


def arguments():
    return [*qkv(B, H, N, D), (-torch.rand(B, H, N)).requires_grad_(), (torch.arange(N) % 5 == 3).expand(B, N)]


def over_tokens(gate):
    def run(q, k, v, g, begins):
        decay, state, out = gate(g, begins[:, None]), q.new_zeros(B, H, D, D), []
        for t in range(N):
            state = state * decay[:, :, t, None, None] + k[:, :, t, :, None] * v[:, :, t, None]
            out.append((q[:, :, t, :, None] * state).sum(-2))
        return torch.stack(out, 2)

    return run


def of_logarithms(gate):
    return over_tokens(lambda g, begins: gate(g, begins).exp())


def of_pairs(gate):
    def run(q, k, v, g, begins):
        sums = gate(g, begins[:, None]).cumsum(-1)
        later = torch.ones(N, N, dtype=torch.bool).triu(1)
        return (q @ k.mT * (sums[..., :, None] - sums[..., None, :]).masked_fill(later, float("-inf")).exp()) @ v

    return run


def of_chunks(gate):
    def run(q, k, v, g, begins):
        g, state, out = gate(g, begins[:, None]), q.new_zeros(B, H, D, D), []
        for a in range(0, N, C):
            x, y, z = (t[:, :, a : a + C] for t in (q, k, v))
            sums = g[:, :, a : a + C].cumsum(-1)
            out.append((x @ y.mT * (sums[..., :, None] - sums[..., None, :]).exp().tril()) @ z)
            out[-1] = out[-1] + (x * sums.exp()[..., None]) @ state
            state = state * sums[..., -1, None, None].exp() + (y * (sums[..., -1:] - sums).exp()[..., None]).mT @ z
        return torch.cat(out, 2)

    return run


HELD = {
    "zero": lambda g, begins: g.masked_fill(begins, 0.0),
    "zero of a function": lambda g, begins: F.logsigmoid(g).masked_fill(begins, 0.0),
    "chosen": lambda g, begins: torch.where(begins, -20.0, g),
    "times a truth": lambda g, begins: g * ~begins,
}


@pytest.mark.parametrize("form", [of_logarithms, of_pairs, of_chunks])
@pytest.mark.parametrize("name", HELD)
def test_masked_logarithms(form, name):
    assert_rewritten(form(HELD[name]), *arguments(), compiled=(form, name) == (of_logarithms, "zero"))


NOTHING = {
    "minus infinity": lambda g, begins: g.masked_fill(begins, float("-inf")).exp(),
    "a lowest number": lambda g, begins: torch.where(begins, torch.finfo(g.dtype).min, g).exp(),
    "chosen": lambda g, begins: torch.where(begins, 0.0, g.exp()),
    "the other way round": lambda g, begins: torch.where(~begins, g.exp(), 0.0),
    "filled": lambda g, begins: torch.sigmoid(g).masked_fill(begins, 0.0),
    "times a truth": lambda g, begins: g.exp() * ~begins,
    "times what is left of one": lambda g, begins: g.exp() * (1 - begins.to(g.dtype)),
    "that alone": lambda g, begins: (1 - begins.to(g.dtype)).expand(B, H, N),
    "scaled": lambda g, begins: 0.9 * torch.sigmoid(g) * (1 - begins.float()),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_state_that_begins_anew(name):
    """No gradient is lost or infinite where the decay is nothing; through Inductor, too, by a mask and by a product."""
    compiled = name in ("minus infinity", "times what is left of one")
    assert_rewritten(over_tokens(NOTHING[name]), *arguments(), compiled=compiled)


@pytest.mark.parametrize(
    "gate",
    [
        lambda g, begins: F.relu(g + 0.5),  # nothing too, but a gradient flows there
        lambda g, begins: torch.where(begins, -0.5, g.exp()),
        lambda g, begins: g.exp() * (1 - 2 * begins.to(g.dtype)),
        lambda g, begins: g.exp() - begins.to(g.dtype),
        lambda g, begins: torch.where(begins, 0.0, g.tanh()),
    ],
    ids=["a function", "a sign", "a sign of a truth", "less a truth", "chosen beside a sign"],
)
def test_other_gates(gate):
    assert_refused(over_tokens(gate), *arguments())


def test_numbers_are_no_truths():
    *tensors, begins = arguments()
    assert_refused(over_tokens(lambda g, x: g.exp() * (1 - x)), *tensors, begins.float() * 0.5)

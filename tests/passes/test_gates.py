"""Gates between 0 and 1 that are no sigmoid as they are written; and near twins that may be nothing, or negative."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D = 2, 2, 8, 4
UNSEEN = {"validate": "off"}


def arguments(scale=1.0, dtype=torch.float32):
    given = [*qkv(B, H, N, D), scale * torch.randn(B, H, N)]
    return [x.detach().to(dtype).requires_grad_() for x in given]


def over_tokens(gate):
    def run(q, k, v, x):
        decay, state, out = gate(x), q.new_zeros(B, H, D, D), []
        for t in range(N):
            state = decay[:, :, t, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
            out.append((q[:, :, t, :, None] * state).sum(-2))
        return torch.stack(out, 2)

    return run


def token_by_token(gate):
    def run(q, k, v, x):
        state, out = q.new_zeros(B, H, D, D), []
        for t in range(N):
            state = gate(x[:, :, t])[..., None, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
            out.append((q[:, :, t, :, None] * state).sum(-2))
        return torch.stack(out, 2)

    return run


GATES = {
    "a tangent and one, halved": lambda x: (torch.tanh(x) + 1) / 2,
    "half a tangent and a half": lambda x: 0.5 * torch.tanh(x) + 0.5,
    "one and a tangent": lambda x: 0.5 * (1 + torch.tanh(x / 2)),
    "one less a tangent": lambda x: (1 - torch.tanh(x)) / 2,
    "between other ends": lambda x: 0.1 + 0.4 * (1 + torch.tanh(x)),
    "the error function": lambda x: 0.5 * (1 + torch.erf(x)),
    "its other tail": lambda x: 0.5 * torch.erfc(x),
    "the normal distribution": torch.special.ndtr,
    "one over a square and one": lambda x: 1 / (1 + x * x),
    "one over a cosine": lambda x: 1 / torch.cosh(x),
    "one less a square": lambda x: 1.001 - torch.tanh(x) ** 2,
    "a tangent of what is positive": lambda x: torch.tanh(F.softplus(x)),
}


@pytest.mark.parametrize("loop", [over_tokens, token_by_token])
@pytest.mark.parametrize("name", GATES)
def test_what_is_positive_is_a_decay(name, loop):
    report = assert_rewritten(loop(GATES[name]), *arguments(), compiled=False)
    assert not report.near_misses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["a tangent and one, halved", "one less a tangent", "between other ends"])
def test_far_from_nothing_and_near_it(name, dtype):
    """Where the tangent is rounded to -1 the gate is nothing, in the program as it is."""
    assert_rewritten(over_tokens(GATES[name]), *arguments(6.0, dtype), compiled=False, options=UNSEEN)


TWINS = {
    "a tangent": torch.tanh,
    "a tangent and less than one": lambda x: (torch.tanh(x) + 0.999) / 2,
    "more than a tangent": lambda x: 0.5 * (1 - 1.001 * torch.tanh(x)),
    "a cosine and one": lambda x: (1 + torch.cos(x)) / 2,
    "a piecewise sigmoid": F.hardsigmoid,
    "one less a square that may be one": lambda x: 1 - torch.tanh(x) ** 2,
    "one over a product and one": lambda x: 1 / (1 + x * x.flip(-1)),
    "the same token of another head": lambda x: 1 / (1 + x * x.flip(1)),
    "a tangent of anything": lambda x: torch.tanh(torch.sinh(x)),
    "a tangent of what may be nothing": lambda x: torch.tanh(x.clamp(min=0)),
    "an error function of a square": lambda x: torch.erf(x * x),
    "a tangent and one, from what is bounded": lambda x: torch.tanh(x.clamp(max=0)) * -0.5,
}


@pytest.mark.parametrize("name", TWINS)
def test_what_may_be_nothing_is_none(name):
    assert_refused(over_tokens(TWINS[name]), *arguments(), options=UNSEEN)


@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("gate", [lambda x, y: x * y + 0.01, lambda x, y: 1 / (1 + x * y)])
def test_a_square_beside_a_product_of_two_places(gate, turned):
    """The same function of a tensor at two places: what is known of its square is not known of it."""

    def run(q, k, v, x):
        squares = gate(x, x)
        return over_tokens(lambda x: gate(x, x.flip(turned)))(q, k, v, x), squares

    assert_refused(run, *arguments(), options=UNSEEN)


def test_a_comparison_with_a_weight_that_may_be_nothing():
    """Nothing times a distance is at least 0 wherever it is."""
    at = torch.arange(N)

    def run(gate):
        def masked(q, k, v, x):
            apart = gate(x[:, :, :1, None]) * (at[:, None] - at)
            return (q @ k.mT * (apart >= 0)) @ v

        return masked

    assert_rewritten(run(lambda x: torch.tanh(F.softplus(x))), *arguments(), compiled=False, options=UNSEEN)
    assert_refused(run(lambda x: torch.tanh(F.relu(x))), *arguments(), options=UNSEEN)

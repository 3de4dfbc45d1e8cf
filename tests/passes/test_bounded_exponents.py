"""Exponents and weights that are kept below a bound, which decays reach at the diagonal alone; and near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lacompile
from lacompile.passes.lift.domain.kinds import Opaque
from lacompile.passes.lift.domain.term import Precision
from lacompile.passes.lift.interpret import Interpreter
from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv
from .forms import B, D, E, H, distance

N = 12


def arguments(n=N):
    return [*qkv(B, H, n, D, E), torch.randn(B, H, n, requires_grad=True), torch.randn(H, requires_grad=True)]


def pairs(g):
    run = g.cumsum(-1)
    return run[..., :, None] - run[..., None, :]


def weighted(weight):
    """``weight`` is that of all pairs of positions, from the gates and the slopes."""
    return lambda q, k, v, gate, slope: ((q @ k.mT) * weight(gate, slope)) @ v


BOUNDED = {
    "clamp": lambda d: d.clamp(max=0).exp(),
    "clamp_min of the opposite": lambda d: (-(-d).clamp_min(0)).exp(),
    "minimum": lambda d: torch.minimum(d, torch.zeros(())).exp(),
    "minimum of zero and it": lambda d: torch.minimum(torch.zeros(()), d).exp(),
    "relu": lambda d: (-F.relu(-d)).exp(),
    "abs": lambda d: (-d.abs()).exp(),
    "a weight": lambda d: d.exp().clamp(max=1),
    "a weight from 0 to 1": lambda d: d.exp().clamp(0, 1),
    "twice a weight": lambda d: (2 * d.exp()).clamp(max=2),
    "behind the mask": lambda d: d.masked_fill(distance(d.shape[-1]) < 0, float("-inf")).clamp(max=0).exp(),
}

RATES = {
    "logsigmoid": lambda gate, slope: pairs(F.logsigmoid(gate)),
    "softplus, and a slope": lambda gate, slope: pairs(-F.softplus(gate) * slope.exp()[:, None]),
    "relu": lambda gate, slope: pairs(-F.relu(gate)),
    "logsigmoid where it counts": lambda gate, slope: pairs(torch.where(gate > 0, F.logsigmoid(gate), 0.0)),
    "a slope": lambda gate, slope: -F.softplus(slope)[:, None, None] * distance(gate.shape[-1]),
    "a slope that may be 0": lambda gate, slope: -F.relu(slope)[:, None, None] * distance(gate.shape[-1]),
    "both": lambda gate, slope: pairs(F.logsigmoid(gate)) - slope.exp()[:, None, None] * distance(gate.shape[-1]),
}


@pytest.mark.parametrize("bounded", BOUNDED)
def test_a_bound(bounded):
    weight = weighted(lambda gate, slope: BOUNDED[bounded](RATES["logsigmoid"](gate, slope)).tril())
    assert_rewritten(lambda *args: weight(*args) * args[-1].sum(), *arguments(), count=1, compiled=False)


@pytest.mark.parametrize("rates", RATES)
def test_rates(rates):
    weight = weighted(lambda gate, slope: RATES[rates](gate, slope).clamp(max=0).exp().tril())
    more = lambda *args: weight(*args) * args[-1].sum() * args[-2].sum()  # noqa: E731
    assert_rewritten(more, *arguments(), count=1, compiled=False)


def test_powers_of_counts():
    """Of the tokens between two that a mask lets count."""

    def run(q, k, v, gate, slope):
        counts = (gate > 0).to(q.dtype).cumsum(-1)
        between = (counts[..., :, None] - counts[..., None, :]).clamp_min(0)
        weight = (slope.sigmoid()[:, None, None] ** between).masked_fill(distance(q.shape[2]) < 0, 0.0)
        return (q @ k.mT * weight) @ v * gate.sum()

    assert_rewritten(run, *arguments(), count=1, compiled=False)


def test_in_chunks():
    def run(q, k, v, gate, slope, size=4):
        state, out = torch.zeros(B, H, D, E), []
        for at in (slice(n, n + size) for n in range(0, N, size)):
            upto = F.logsigmoid(gate[..., at]).cumsum(-1)
            inner = (upto[..., :, None] - upto[..., None, :]).clamp(max=0).exp().tril()
            out.append(
                (q[:, :, at] @ k[:, :, at].mT * inner) @ v[:, :, at] + upto.exp()[..., None] * q[:, :, at] @ state
            )
            left = (upto[..., -1:] - upto).clamp(max=0).exp()
            state = upto[..., -1, None, None].exp() * state + (left[..., None] * k[:, :, at]).mT @ v[:, :, at]
        return torch.cat(out, 2) * slope.sum()

    assert_rewritten(run, *arguments(), count=1, compiled=False)


def test_any_length():
    weight = weighted(lambda gate, slope: RATES["both"](gate, slope).clamp(max=0).exp().tril())
    assert_rewritten(weight, *arguments(17), after=arguments(), compiled=False)


def test_a_diagonal_that_is_bounded():
    """The row's own decay is left out of the exponent, which is above 0 at the diagonal alone, and bounded there."""

    def weight(gate, slope):
        upto = F.logsigmoid(gate).cumsum(-1)
        exponent = (upto - F.logsigmoid(gate))[..., :, None] - upto[..., None, :]
        return exponent.clamp(max=0).exp().tril()

    run = weighted(weight)
    assert_rewritten(lambda *args: run(*args) * args[-1].sum(), *arguments(), count=1, compiled=False)


def test_the_sign_of_a_buffer_is_asked_again(without_inductor):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("rate", torch.tensor([0.1, 0.2, 0.3]))

        def forward(self, q, k, v, gate):
            return (q @ k.mT * pairs(-self.rate[:, None] * F.softplus(gate)).clamp(max=0).exp().tril()) @ v

    torch._dynamo.reset()
    model, args = Model(), arguments()[:4]
    compiled = torch.compile(model, backend="lightning", options={"validate": "off"})
    torch.testing.assert_close(compiled(*args), model(*args))
    (found,) = lacompile.last_report().rewrites
    assert any("rate" in str(a) for a in found.assumptions)
    model.rate.neg_()
    torch.testing.assert_close(compiled(*args), model(*args))


def test_what_data_is_bounded_to_decides_nothing():
    """Over the reals the bound is reached everywhere; the program's own sums, which it rounds, may be beside it."""

    def f(gate):
        run = F.logsigmoid(gate).cumsum(-1)
        bounded = (run[..., :1] - run).clamp(max=0)[..., 1:]
        return bounded, bounded == 0

    interpreters = []

    def backend(gm, example_inputs):
        interpreters.append(Interpreter())
        interpreters[-1].run(gm, example_inputs)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(f, backend=backend)(torch.randn(2, N))
    bounded, equal = [*interpreters[0].known.values()][-2:]
    assert bounded.value.terms == () and bounded.value.precision is Precision.ROUNDED
    assert isinstance(interpreters[0].engine.leaves[equal.value.terms[0].accs[0][0]].kind, Opaque)


# ----------------------------------------------------------------------------------------------------------- near twins

FALL = RATES["logsigmoid"]
TWINS = {
    "above 0": lambda gate, slope: FALL(gate, slope).clamp(max=0.1).exp().tril(),
    "below 0": lambda gate, slope: FALL(gate, slope).clamp(max=-0.1).exp().tril(),
    "a second bound": lambda gate, slope: FALL(gate, slope).clamp(-5, 0).exp().tril(),
    "a weight above 1": lambda gate, slope: FALL(gate, slope).exp().clamp(max=1.1).tril(),
    "a weight below 1": lambda gate, slope: FALL(gate, slope).exp().clamp(max=0.9).tril(),
    "a weight from a number on": lambda gate, slope: FALL(gate, slope).exp().clamp(1e-3, 1).tril(),
    "a gate of any sign": lambda gate, slope: pairs(gate).clamp(max=0).exp().tril(),
    "a slope of any sign": lambda gate, slope: (slope[:, None, None] * distance(N)).clamp(max=0).exp().tril(),
    "a product of any sign": lambda gate, slope: pairs(F.logsigmoid(gate) * slope[:, None]).clamp(max=0).exp().tril(),
    "one rate against the other": lambda gate, slope: (
        (FALL(gate, slope) + slope.exp()[:, None, None] * distance(N)).clamp(max=0).exp().tril()
    ),
    "more at each row": lambda gate, slope: (FALL(gate, slope) + 0.5).clamp(max=0).exp().tril(),
    "one row later": lambda gate, slope: FALL(gate, slope).clamp(max=0).exp().tril(1),
}


@pytest.mark.parametrize("name", TWINS)
def test_near_twins_are_left_alone(name):
    weight = weighted(TWINS[name])
    assert_refused(lambda *args: weight(*args) * args[-1].sum(), *arguments())


def test_both_sides():
    """Above the diagonal every weight is 1: that is a sum over later positions."""
    weight = weighted(lambda gate, slope: FALL(gate, slope).clamp(max=0).exp())
    assert_rewritten(weight, *arguments(), count=2, compiled=False)


def test_rates_above_0_are_bounded_away():
    """Below the diagonal nothing is left of them: every weight is 1."""
    run = weighted(lambda gate, slope: pairs(F.softplus(gate)).clamp(max=0).exp().tril())
    q, k, v, gate, slope = (x.detach() for x in arguments())
    assert_rewritten(run, q.requires_grad_(), k, v, gate, slope, count=1, compiled=False)


# ------------------------------------------------------------------------------------- small numbers in an exponent


def rates(size):
    return [*arguments()[:4], torch.linspace(size, 2 * size, H).requires_grad_()]


@pytest.mark.parametrize("small", [lambda s: -1e-13 * s, lambda s: -1e-7 * (1e-7 * s)], ids=["in one number", "in two"])
def test_a_rate_times_nearly_nothing_is_something(small):
    run = weighted(lambda g, s: torch.exp(small(s)[:, None, None] * distance(N)).tril())
    assert_refused(run, *rates(1e12), options={"validate": "off"})


def test_a_rate_times_a_small_number():
    run = weighted(lambda g, s: torch.exp(-1e-4 * s[:, None, None] * distance(N)).tril())
    assert_rewritten(run, *rates(1e3), compiled=False)


# ------------------------------------------------------------- exponentials that the program computes by themselves


def masked(q, k, v):
    scores = (q @ k.mT).tril()
    return scores @ v / scores.sum(-1, keepdim=True)


def running(q, k, v):
    sums = (k[..., None] * v[..., None, :]).cumsum(2)
    return torch.einsum("bhnd,bhnde->bhne", q, sums) / (q * k.cumsum(2)).sum(-1, keepdim=True)


@pytest.mark.parametrize("attention", [masked, running])
@pytest.mark.parametrize("scale", [1, 0.5], ids=str)
def test_features_of_two_exponentials(attention, scale):
    """``exp(x w) exp(-|x|^2 / 2)``: where the first is too large, it is so in the program."""

    def run(q, k, v, w):
        q, k = (torch.exp(scale * (x @ w)) * torch.exp(-x.pow(2).sum(-1, keepdim=True) / 2) for x in (q, k))
        return attention(q, k, v)

    assert_rewritten(run, *qkv(B, H, N, D, E), torch.randn(D, 6, requires_grad=True), count=2, compiled=False)


def stabilised(also):
    """Input gates under their running maximum; beside it what is ``also`` computed of them."""

    def run(q, k, v, gate):
        most = gate.cummax(-1).values
        weights = (pairs(-F.softplus(gate)) + gate[..., None, :] - most[..., :, None]).exp().tril()
        return (q @ k.mT * weights) @ v, also(gate)

    return run


ALSO = {
    "their exponential": torch.exp,
    "that of some": lambda gate: gate[..., :-1].exp(),
    "twice as large": lambda gate: (2 * gate).exp(),
}


@pytest.mark.parametrize("name", ALSO)
def test_an_exponential_beside_a_stabilised_one(name):
    """It may overflow, and nothing of it is in the rows."""
    q, k, v, gate, _ = arguments()
    assert_refused(stabilised(ALSO[name]), q, k, v, gate)


def test_half_the_digits():
    """In fp16 the program may compute the exponential in a wider format than that of its features."""

    def run(q, k, v, w):
        q, k = (torch.exp(x.float() @ w) * torch.exp(-x.float().pow(2).sum(-1, keepdim=True) / 2) for x in (q, k))
        return masked(q.half(), k.half(), v)

    args = [x.detach().half() for x in qkv(B, H, N, D, E)]
    report = lacompile.explain(run)(*args, torch.randn(D, 6))
    assert not report.rewrites

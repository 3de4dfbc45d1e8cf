"""Tokens moved along before they are queries, keys or values: zeros come in, and a recipe has to put them there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile import explain
from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv, slopes
from .forms import B, D, E, H, mask

N = 12


def arguments(n=N):
    return [*qkv(B, H, n, D, E), slopes()]


SHIFTS = {
    "pad": lambda x: F.pad(x, (0, 0, 1, -1)),
    "pad, then cut": lambda x: F.pad(x, (0, 0, 1, 0))[:, :, :-1],
    "cut, then pad": lambda x: F.pad(x[:, :, :-1], (0, 0, 1, 0)),
    "cat": lambda x: torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], 2),
    "cut, then a function": lambda x: F.pad(x[:, :, :-1].cos(), (0, 0, 1, 0)),
    "cut by three, then a function": lambda x: F.pad(x[:, :, :-3].cos(), (0, 0, 3, 0)),
    "module": torch.nn.ZeroPad2d((0, 0, 1, -1)),
    "by three": lambda x: F.pad(x, (0, 0, 3, -3)),
    "backwards": lambda x: F.pad(x, (0, 0, -1, 1)),
    "twice": lambda x: F.pad(F.pad(x, (0, 0, 1, -1)), (0, 0, 1, -1)),
}


def keys(shift):
    return lambda q, k, v, slope: (q @ shift(k).mT * mask(slope, q.shape[2])) @ v


def mixed(shift):
    def run(q, k, v, slope):
        share = torch.sigmoid(slope)[:, None, None]
        q, k, v = (x * share + shift(x) * (1 - share) for x in (q, k, v))
        return (q @ k.mT * mask(slope, q.shape[2])) @ v

    return run


def tokens(shift):
    def run(q, k, v, slope):
        k, state, out = shift(k), 0, []
        for t in range(q.shape[2]):
            state = state * torch.exp(-slope)[:, None, None] + k[:, :, t, :, None] * v[:, :, t, None, :]
            out.append((q[:, :, t, :, None] * state).sum(-2))
        return torch.stack(out, 2)

    return run


@pytest.mark.parametrize("form", [keys, mixed])
@pytest.mark.parametrize("name", SHIFTS)
def test_shift(form, name):
    assert_rewritten(form(SHIFTS[name]), *arguments(), compiled=False)


@pytest.mark.parametrize("name", ["pad", "cat", "backwards"])
def test_shift_before_a_loop(name):
    assert_rewritten(tokens(SHIFTS[name]), *arguments(6), compiled=False)


@pytest.mark.parametrize("name", ["pad", "cat"])
def test_symbolic_length(name):
    inputs = arguments()
    for x in inputs[:3]:
        torch._dynamo.mark_dynamic(x, 2)
    torch._dynamo.reset()
    report = explain(mixed(SHIFTS[name]))(*inputs)
    assert len(report.rewrites) == 1 and not report.rewrites[0].length.isdigit()


def test_lengths_that_differ():
    for name in ("pad", "cat"):
        assert_rewritten(mixed(SHIFTS[name]), *arguments(10), after=arguments(12), compiled=False)


def test_a_function_of_what_was_padded():
    """The cosine of zero is one: the function of the padded tensor is no padded function."""
    assert_rewritten(
        lambda q, k, v, s: keys(lambda x: SHIFTS["pad"](x).cos())(q, k, v, s), *arguments(), compiled=False
    )
    assert_rewritten(
        lambda q, k, v, s: keys(lambda x: SHIFTS["pad"](x.cos()))(q, k, v, s), *arguments(), compiled=False
    )


CUT = {
    "shorter than it was": lambda x: F.pad(x[:, :, :-3].cos(), (0, 0, 1, 0))[:, :, :N],
    "behind": lambda x: F.pad(x[:, :, :-1].cos(), (0, 0, 0, 1)),
    "in the middle": lambda x: F.pad(F.pad(x[:, :, :-4].cos(), (0, 0, 1, 0)), (0, 0, 0, 3)),
    "in front of a function of all": lambda x: F.pad(x[:, :, :-1].cos(), (0, 0, 1, 0)) + x.cos(),
    "that is read whole as well": lambda x: F.pad(x.cos()[:, :, :-2], (0, 0, 2, 0)) * x[:, :, :-1].cos().sum(2, True),
}


@pytest.mark.parametrize("name", CUT)
def test_functions_of_what_was_cut(name):
    def run(q, k, v, slope):
        k = CUT[name](k)
        n = k.shape[2]
        return (q[:, :, :n] @ k.mT * mask(slope, n)) @ v[:, :, :n]

    assert_rewritten(run, *arguments(), count=None, compiled=False)


def test_what_was_cut_is_not_zero():
    """Of a tensor that was cut in front, padding does not bring back what was there."""

    def cut(x):
        return F.pad(x[:, :, 1:], (0, 0, 1, 0))

    assert_rewritten(lambda q, k, v, s: keys(cut)(q, k, v, s), *arguments(), count=None, compiled=False)


def test_shifted_round_the_end():
    """What comes in is data, like what was there."""
    assert_rewritten(keys(lambda x: torch.cat([x[:, :, -1:], x[:, :, :-1]], 2)), *arguments(), compiled=False)


# ------------------------------------------------------------------------------------- a loop that moves them itself

WIDTH = 6


def halves(x, before, share):
    return x * share + before * (1 - share)


def between(x, before, share):
    return before + (x - before) * share


def lerped(x, before, share):
    return torch.lerp(before, x, share)


def added(x, before, share):
    return x + before


def gated(x, before, share):
    return x + torch.sigmoid(before) * share


MIXED = [halves, between, lerped, added, gated]


class Mixing(torch.nn.Module):
    """Each token is projected together with the one before, of which the first has one that ``began`` gives."""

    def __init__(self, mix, began=lambda x: torch.zeros_like(x[:, 0]), goes_on=lambda x, before, read: x):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.began, self.goes_on = mix, began, goes_on
        self.shares = torch.nn.Parameter(torch.rand(3, WIDTH))
        self.w = torch.nn.Parameter(torch.randn(3, WIDTH, WIDTH) / WIDTH**0.5)

    def part(self, i, x, before):
        return F.linear(self.mix(x, before, self.shares[i]), self.w[i])

    def key(self, t, x, before):
        return self.part(1, x, before)

    def forward(self, x):
        before, state, out = self.began(x), x.new_zeros(x.shape[0], WIDTH, WIDTH), []
        for t, x_t in enumerate(x.unbind(1)):
            q, k, v = self.part(0, x_t, before), self.key(t, x_t, before), self.part(2, x_t, before)
            state = 0.9 * state + k[:, :, None] * v[:, None, :]
            out.append((q[:, None] @ state)[:, 0])
            before = self.goes_on(x_t, before, out[-1])
        return torch.stack(out, 1)


def sequence(n=8):
    torch.manual_seed(0)
    return torch.randn(B, n, WIDTH, requires_grad=True)


@pytest.mark.parametrize("mix", MIXED)
def test_in_a_loop(mix):
    assert_rewritten(Mixing(mix), sequence(), compiled=False, options={"validate": "off"})


@pytest.mark.parametrize("began", [lambda x: x[:, 0], lambda x: x.mean(1)], ids=["the first", "all"])
def test_that_begins_with_a_token_of_its_own(began):
    assert_rewritten(Mixing(halves, began), sequence(), compiled=False, options={"validate": "off"})


def test_at_another_length():
    assert_rewritten(Mixing(halves), sequence(9), after=[sequence()], compiled=False, options={"validate": "off"})


def always_first(x, before, read):
    return before


def every_token(x, before, read):
    return x + before


@pytest.mark.parametrize("goes_on", [always_first, every_token])
def test_other_tokens_before(goes_on):
    """Rewritten or not, they are what they are: each call is what the program computed."""
    module = Mixing(halves, lambda x: x[:, 0], goes_on)
    assert_rewritten(module, sequence(), count=None, compiled=False, options={"validate": "off"})


class OtherWeights(Mixing):
    """Of the first token; the sequence that it begins is read by nobody else."""

    def key(self, t, x, before):
        return self.part(1 if t else 0, x, before)


class OtherShares(Mixing):
    """The first token is not mixed as the others are."""

    def key(self, t, x, before):
        return self.part(1, x, before) if t else F.linear(x.cos(), self.w[1])


class LastIsOther(Mixing):
    def key(self, t, x, before):
        return self.part(1, x, before) if t < 7 else self.part(1, before, x)


@pytest.mark.parametrize("module", [OtherWeights, OtherShares, LastIsOther])
def test_a_token_of_another_kind(module):
    """Rewritten or not, they are what they are."""
    assert_rewritten(module(halves), sequence(), count=None, compiled=False, options={"validate": "off"})


class AlsoAlone(Mixing):
    """Queries are the same function of the token alone, which for the first one is what its keys are."""

    keys_first = True

    def part(self, i, x, before):
        return F.linear(self.mix(x, before, self.shares[i]), self.w[1])

    def forward(self, x):
        before, state, out = torch.zeros_like(x[:, 0]), x.new_zeros(x.shape[0], WIDTH, WIDTH), []
        for x_t in x.unbind(1):
            k = self.part(1, x_t, before) if self.keys_first else None
            q = F.linear(x_t * self.shares[1], self.w[1])
            k = self.part(1, x_t, before) if k is None else k
            state = 0.9 * state + k[:, :, None] * x_t.cos()[:, None, :]
            out.append((q[:, None] @ state)[:, 0])
            before = x_t
        return torch.stack(out, 1)


class AloneFirst(AlsoAlone):
    keys_first = False


class OutOfOrder(Mixing):
    """What one token is alone, and the next one with it, is computed before all others."""

    def forward(self, x):
        tokens = x.unbind(1)
        alone = F.linear(tokens[4] * self.shares[1], self.w[1])
        keys = {5: self.part(1, tokens[5], tokens[4])}
        state, out = x.new_zeros(x.shape[0], WIDTH, WIDTH), []
        for t in range(8):
            before = tokens[t - 1] if t else torch.zeros_like(tokens[0])
            keys[t] = keys[t] if t in keys else self.part(1, tokens[t], before)
            state = 0.9 * state + keys[t][:, :, None] * tokens[t].cos()[:, None, :]
            out.append((tokens[t].sin()[:, None] @ state)[:, 0])
        return torch.stack(out, 1), alone


@pytest.mark.parametrize("module", [AlsoAlone, AloneFirst, OutOfOrder])
def test_a_call_that_only_looks_like_another(module):
    """Two functions of tokens may be one for the first; everywhere else they are two."""
    assert_rewritten(module(halves), sequence(), count=None, compiled=False, options={"validate": "off"})


def test_what_was_read_is_no_token():
    """A token that is mixed with what was read before is a delta rule."""
    assert_refused(Mixing(halves, goes_on=lambda x, before, read: read), sequence(), options={"validate": "off"})

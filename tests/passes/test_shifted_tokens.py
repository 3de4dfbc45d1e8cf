"""Tokens moved along before they are queries, keys or values: zeros come in, and a recipe has to put them there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile import explain
from lacompile.testing import assert_rewritten

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

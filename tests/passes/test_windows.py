"""Convolutions that a loop over tokens writes step by step, over a window of the last few; and near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lacompile.testing import assert_refused, assert_rewritten

from .test_filled import compared

B, N, D, K = 2, 8, 4, 3
C = 3 * D


def inputs():
    torch.manual_seed(0)
    return [torch.randn(B, N, C, requires_grad=True), torch.randn(B, N, requires_grad=True)]


class Layer(nn.Module):
    """Mamba's step for each token; ``conv`` makes what is read of it of the window and the new token."""

    def __init__(self, conv):
        super().__init__()
        torch.manual_seed(1)
        self.conv = conv
        self.weight, self.bias = nn.Parameter(torch.randn(C, K)), nn.Parameter(torch.randn(C))

    def forward(self, x, dt):
        held, state, outs = x.new_zeros(B, C, K), x.new_zeros(B, D, D), []
        for t in range(N):
            held, y = self.conv(held, x[:, t], self.weight, self.bias, t)
            q, k, v = y.split(D, -1)
            state = state * torch.exp(-F.softplus(dt[:, t]))[:, None, None] + k[:, :, None] * v[:, None, :]
            outs.append((q[:, None] @ state)[:, 0])
        return torch.stack(outs, 1)


def rolled(held, x_t):
    return torch.cat([held[:, :, 1:], x_t[:, :, None]], -1)


def conv(read):
    def run(held, x_t, w, b, t):
        held = rolled(held, x_t)
        return held, read(held, w, b)

    return run


def in_place(held, x_t, w, b, t):
    """As Mamba's own step has it."""
    held = torch.roll(held, shifts=-1, dims=-1)
    held[:, :, -1] = x_t
    return held, F.silu((held * w).sum(-1) + b)


def taking(write):
    """A window that is rolled, and takes its token in the place of the one that came around."""

    def run(held, x_t, w, b, t):
        held = write(held, x_t)
        return held, F.silu((held * w).sum(-1) + b)

    return run


def a_part(held, x_t):
    held = held.roll(-1, -1)
    held[..., -1:] = x_t[..., None]
    return held


CONVOLUTIONS = {
    "in place": in_place,
    "a part in place": taking(a_part),
    "scattered": taking(lambda held, x_t: held.roll(-1, 2).select_scatter(x_t, -1, K - 1)),
    "activation": conv(lambda held, w, b: F.silu((held * w).sum(-1))),
    "none": conv(lambda held, w, b: (held * w).sum(-1)),
    "bias": conv(lambda held, w, b: (held * w).sum(-1) + b),
    "bias and activation": conv(lambda held, w, b: F.silu((held * w).sum(-1) + b)),
    "sum by a function": conv(lambda held, w, b: F.silu(torch.sum(held * w, dim=-1) + b)),
    "einsum": conv(lambda held, w, b: torch.tanh(torch.einsum("bck,ck->bc", held, w))),
    "normalised": conv(lambda held, w, b: F.layer_norm((held * w).sum(-1), (C,), b)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_is_one_attention(name):
    report = assert_rewritten(Layer(CONVOLUTIONS[name]), *inputs(), compiled=False)
    assert f"N={N}" in str(report)


def test_inductor_compiles_it():
    assert_rewritten(Layer(CONVOLUTIONS["bias and activation"]), *inputs())


TAKEN = {
    "joined": lambda held, x_t: torch.cat([held[:, :, 1 - K :], x_t[:, :, None]], -1),
    "written": a_part,
    "rolled and joined": lambda held, x_t: torch.cat([held.roll(-1, -1)[..., :-1], x_t[..., None]], -1),
}


class Projected(nn.Module):
    """A step that projects its token itself; the window holds a part of the features, and gates are another."""

    def __init__(self, bias, stays=1.0, taken="joined"):
        super().__init__()
        torch.manual_seed(1)
        self.stays, self.taken = stays, taken
        self.project = nn.Linear(5, C + 4, bias=bias)
        self.weight = nn.Parameter(torch.randn(C, K))

    def forward(self, x):
        short = self.taken == "joined"
        held, state, outs = x.new_zeros(B, C, K - short), x.new_zeros(B, D, D), []
        for t in range(N):
            gate, _, rest = self.project(x[:, t]).split([1, 3, C], -1)
            held = TAKEN[self.taken](held, rest)
            q, k, v = F.silu((held * self.weight).sum(-1)).split(D, -1)
            state = state * torch.exp(-F.softplus(gate))[..., None] + k[:, :, None] * v[:, None, :]
            state = state * self.stays if t == 4 else state
            outs.append((q[:, None] @ state)[:, 0])
        return torch.stack(outs, 1)


@pytest.mark.parametrize(
    ("bias", "taken"),
    [(False, "joined"), (True, "joined"), (False, "written"), (True, "written"), (False, "rolled and joined")],
)
def test_a_window_of_a_part_of_what_each_step_projects(bias, taken):
    x = torch.randn(B, N, 5, generator=torch.Generator().manual_seed(0))
    report = assert_rewritten(Projected(bias, taken=taken), x, compiled=False)
    assert f"N={N}" in str(report)


def test_a_window_of_a_part_of_what_each_step_projects_and_a_state_that_shrinks_once():
    x = torch.randn(B, N, 5, generator=torch.Generator().manual_seed(0))
    assert_refused(Projected(True, stays=-1.0), x, options={"validate": "off"})


# -------------------------------------------------------------------------------------------------------------- twins


def another_weight(held, x_t, w, b, t):
    """Of one token. What is put side by side is what each step has computed, however it has."""
    held = rolled(held, x_t)
    return held, F.silu((held * (w.flip(1) if t == 4 else w)).sum(-1))


def skipped(held, x_t, w, b, t):
    """One token does not enter the window, which is read twice as it is."""
    held = held if t == 4 else rolled(held, x_t)
    return held, F.silu((held * w).sum(-1))


def without_gradients(held, x_t, w, b, t):
    held = rolled(held, x_t)
    with torch.set_grad_enabled(t != 4):
        y = (held * w).sum(-1)
    return held, F.silu(y)


def written_over(held, x_t, w, b, t):
    held = rolled(held, x_t)
    y = (held * w).sum(-1)
    if t == 4:
        y.mul_(2)
    return held, F.silu(y)


def cleared(held, x_t, w, b, t):
    held = rolled(held if t != 4 else held * 0, x_t)
    return held, F.silu((held * w).sum(-1))


def longer(held, x_t, w, b, t):
    """A window that grows."""
    held = rolled(held, x_t) if t else x_t[:, :, None]
    return held, F.silu((held * w[:, -1:]).sum(-1))


def kept(held, x_t):
    """What came around is kept, and another token is lost."""
    held = held.roll(-1, -1)
    held[..., -2] = x_t
    return held


def of_two(held, x_t):
    held = held.roll(-2, -1)
    held[..., -2:] = torch.stack([x_t, x_t.sin()], -1)
    return held


def forgotten(held, x_t):
    with torch.no_grad():
        held = held.roll(-1, -1)
    held[..., -1] = x_t
    return held


@pytest.mark.parametrize("write", [kept, of_two, forgotten])
def test_other_windows_are_no_lone_steps(write):
    """A step whose window is written in place is one of a loop, and no operator is put in its place alone."""
    layer = Layer(taking(write))
    assert_refused(layer, *inputs(), options={"validate": "off"})
    compared(layer.double(), *inputs())


@pytest.mark.parametrize("conv", [another_weight, skipped, without_gradients, written_over, cleared, longer])
def test_is_right_whatever_is_found(conv):
    compared(Layer(conv).double(), *inputs())


def test_a_decay_of_unknown_sign():
    w = nn.Parameter(torch.randn(C, K))

    def run(x, dt):
        held, state, outs = x.new_zeros(B, C, K), x.new_zeros(B, D, D), []
        for t in range(N):
            held = rolled(held, x[:, t])
            q, k, v = F.silu((held * w).sum(-1)).split(D, -1)
            state = state * dt[:, t, None, None] + k[:, :, None] * v[:, None, :]
            outs.append((q[:, None] @ state)[:, 0])
        return torch.stack(outs, 1)

    assert_refused(run, *inputs())


def test_a_window_of_what_the_state_gives():
    """The delta rule's like: what enters the window was read from the state."""

    w = nn.Parameter(torch.randn(C, K))

    def run(x, dt):
        held, state, outs = x.new_zeros(B, C, K), x.new_zeros(B, D, D), []
        read = x.new_zeros(B, D)
        for t in range(N):
            held = rolled(held, x[:, t] + read.repeat(1, 3))
            q, k, v = F.silu((held * w).sum(-1)).split(D, -1)
            state = 0.9 * state + k[:, :, None] * v[:, None, :]
            read = (q[:, None] @ state)[:, 0]
            outs.append(read)
        return torch.stack(outs, 1)

    assert_refused(run, *inputs())

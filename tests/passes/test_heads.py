"""One module per head, and other programs in which several attentions, or one and a write, stand side by side."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, N, DIM, HEADS = 2, 24, 16, 4


def distance(n):
    i = torch.arange(n)
    return i[:, None] - i[None, :]


class Head(nn.Module):
    def __init__(self, gamma):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(DIM, DIM // HEADS, bias=False) for _ in range(3))
        self.gamma = gamma

    def forward(self, x):
        weight = self.gamma ** distance(x.shape[1]) * (distance(x.shape[1]) >= 0).float()
        weight[weight != weight] = 0  # inf * 0, where a power has overflowed
        return (self.q(x) @ self.k(x).mT * weight) @ self.v(x)


class Heads(nn.Module):
    """``join`` makes one tensor of the outputs of all heads."""

    def __init__(self, join, chained=False, random=False):
        super().__init__()
        self.heads = nn.ModuleList(Head(1 - 2.0 ** (-3 - n)) for n in range(HEADS))
        self.mix = nn.Linear(DIM // HEADS, DIM) if chained else None
        self.join, self.chained, self.random = join, chained, random

    def forward(self, x):
        outs = []
        for head in self.heads:
            outs.append(head(x))
            if self.chained:  # the next head sees what this one has found
                x = x + self.mix(outs[-1])
            if self.random:
                x = x * torch.bernoulli(torch.full_like(x, 0.5))
        return self.join(outs)


class Written(nn.Module):
    """Into a tensor made before, head by head."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.register_buffer("gamma", torch.tensor([0.5, 0.8, 0.9, 0.95]))

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in self.qkv(x).chunk(3, -1))
        out = torch.empty_like(v)
        for h in range(HEADS):
            weight = (self.gamma[h] ** distance(x.shape[1]).clamp(min=0)).tril()
            out[:, :, h] = (q[:, :, h] @ k[:, :, h].mT * weight) @ v[:, :, h]
        return out


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Held(nn.Module):
    """A function of its arguments and a buffer."""

    def __init__(self, f, buffer):
        super().__init__()
        self.f = f
        self.register_buffer("buffer", buffer)

    def forward(self, *args):
        return self.f(*args, self.buffer)


JOINS = {"cat": lambda outs: torch.cat(outs, -1), "stack": lambda outs: torch.stack(outs, 1), "list": list}


@pytest.mark.parametrize("join", JOINS)
def test_heads_become_one_operator(join):
    report = assert_rewritten(Heads(JOINS[join]), torch.randn(B, N, DIM), compiled=False)
    assert report.rewrites[0].heads == str(HEADS)


def test_inductor_compiles_them():
    assert_rewritten(Heads(JOINS["cat"]), torch.randn(B, N, DIM))


def test_a_head_that_needs_another_stays_apart():
    assert_rewritten(Heads(JOINS["cat"], chained=True), torch.randn(B, N, DIM), count=HEADS, compiled=False)


def test_random_numbers_are_drawn_in_their_order():
    assert_rewritten(Heads(JOINS["cat"], random=True), torch.randn(B, N, DIM), count=HEADS, compiled=False)


def test_heads_written_into_one_tensor():
    report = assert_rewritten(Written(), torch.randn(B, N, DIM), compiled=False)
    assert report.rewrites[0].heads == str(HEADS)


def test_inputs_that_are_written_between_heads():
    """What the second head reads is not yet there when the first one runs."""

    def f(x, weights):
        outs = []
        x = x * 1
        for n in range(2):
            q, k, v = (x @ w for w in weights[n])
            outs.append((q @ k.mT).tril() @ v)
            x.mul_(0.5)
        return torch.cat(outs, -1)

    weights = [[torch.randn(DIM, 4) for _ in range(3)] for _ in range(2)]
    assert_rewritten(f, torch.randn(B, N, DIM), weights, count=2, grads=False, compiled=False)


def test_a_head_without_gradients_stays_apart():
    """One operator would run in the mode of the first head."""

    def f(q, k, v):
        with torch.no_grad():
            first = (q[0] @ k[0].mT).tril() @ v[0]
        return first, (q[1] @ k[1].mT).tril() @ v[1]

    assert_rewritten(f, *qkv(2, 1, N, 4), count=2, compiled=False)


# ------------------------------------------------------------------------------------------- numbers that are no number


@pytest.mark.parametrize("data", [False, True])
def test_what_is_not_a_number_is_asked_of_weights_alone(data):
    """Over the reals a weight is a number; a scores' entry is what the scores are."""

    def f(q, k, v):
        scores = q @ k.mT
        weight = 0.9 ** distance(N) * (distance(N) >= 0)
        held = scores if data else weight
        held = torch.where(torch.isnan(held), 1.0, held)
        return ((held * weight) if data else (held * scores)) @ v

    args = [torch.randn(B, N, 8, requires_grad=True) for _ in range(3)]
    if data:
        assert_refused(f, *args)
    else:
        assert_rewritten(f, *args, compiled=False)


# --------------------------------------------------------------------------------------------------- rates and features


class Scaled(nn.Module):
    """xPos: queries and keys scaled by powers of their own for each feature, which the program multiplies out."""

    def __init__(self, by_position=False):
        super().__init__()
        self.register_buffer("scale", (torch.arange(0, 8) + 3.2) / 11.2)
        self.by_position = by_position

    def forward(self, q, k, v):
        power = self.scale ** (torch.arange(N)[:, None] / 64)
        weight = (0.9 ** distance(N).clamp(min=0)).tril()
        if self.by_position:
            weight = weight * self.scale[:1] ** distance(N).square()
        return ((q * power) @ (k / power).mT * weight) @ v


def test_features_with_rates_of_their_own():
    args = [torch.randn(B, N, 8, requires_grad=True) for _ in range(3)]
    assert_rewritten(Scaled(), *args, compiled=False)
    assert_refused(Scaled(by_position=True), *args)


# --------------------------------------------------------------------------------------------------------- normalisers


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_retention_and_its_normaliser(detached, early):
    """max(|sum_j|, 1) divides the weights or the result; detached, no gradient flows through it."""

    def f(q, k, v, slope):
        masked = distance(N).float().masked_fill(distance(N) < 0, float("inf"))
        mask = torch.nan_to_num(torch.exp(masked * -slope[:, None, None]))
        weights = q @ k.mT * mask
        total = (weights.detach() if detached else weights).sum(-1, keepdim=True).abs().clamp(min=1)
        return (weights / total) @ v if early else (weights @ v) / total

    args = [torch.randn(B, 3, N, 8, requires_grad=True) for _ in range(3)]
    slope = torch.tensor([0.1, 0.2, 0.3])
    assert_rewritten(Held(f, slope), *args, count=2, compiled=False)


@pytest.mark.parametrize("by_column", [False, True])
def test_a_normaliser_is_a_row_factor(by_column):
    """A sum that is left in the divisor of the scores factors out where it belongs to the row."""

    def f(q, k, v):
        weights = (q.exp() @ k.exp().mT).tril()
        return (weights / (weights.sum(-2 if by_column else -1, keepdim=True) + 1e-6)) @ v

    args = [torch.randn(B, N, 8, requires_grad=True) for _ in range(3)]
    # sums over rows are over later positions, and a factor of the keys all the same
    assert_rewritten(f, *args, count=2, compiled=False)


def test_part_of_a_gradient():
    def f(q, k, v):
        return (q @ k.detach().mT).tril() @ v + (q.detach() @ k.mT).tril() @ v.detach()

    args = [torch.randn(B, N, 8, requires_grad=True) for _ in range(3)]
    report = assert_rewritten(f, *args, compiled=False)
    assert report.rewrites[0].heads == "2"  # both in one


# ------------------------------------------------------------------------------------------------------------- one step


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_step_with_a_number_for_its_decay(decay):
    def f(q, k, v, state):
        state = (state if decay is None else decay * state) + k[..., :, None] * v[..., None, :]
        return torch.einsum("bhd,bhde->bhe", q, state), state

    args = [torch.randn(B, 3, 8, requires_grad=True) for _ in range(3)]
    assert_rewritten(f, *args, torch.randn(B, 3, 8, 8, requires_grad=True), compiled=False)


def test_an_adapted_matrix_is_no_step():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, q, a, b):
            return q @ (self.weight + a[:, None] * b[None, :])

    args = torch.randn(B, 8), torch.randn(8), torch.randn(8)
    assert_refused(Adapted(), *args)


@pytest.mark.parametrize("read_again", [False, True])
def test_a_state_that_is_updated_in_place(read_again):
    """The operator runs before its state is overwritten, if nothing it needs comes later."""

    def f(q, k, v, gate, state):
        new = torch.sigmoid(gate)[..., None, None] * state + k[..., :, None] * v[..., None, :]
        state.copy_(new)
        if read_again:
            q = q + state.sum(-1)
        return (q[..., None, :] @ state)[..., 0, :]

    args = [torch.randn(B, 3, 8) for _ in range(3)]
    gate, state = torch.randn(B, 3), torch.randn(B, 3, 8, 8)
    if read_again:
        assert_refused(f, *args, gate, state)
    else:
        assert_rewritten(f, *args, gate, state, grads=False, compiled=False)


# ---------------------------------------------------------------------------- a loop over heads inside that over tokens


def heads_inside(join, decay, crossed=False):
    """Each head has a state of its own in a list; ``join`` puts the heads of one token together."""

    def run(q, k, v, gate):
        heads = range(q.shape[1])
        states, out = [q.new_zeros(q.shape[0], q.shape[3], v.shape[3]) for _ in heads], []
        for t in range(q.shape[2]):
            row = []
            for h in heads:
                new = torch.einsum("bd,be->bde", k[:, h, t], v[:, h, t])
                states[h] = decay(gate, h, t) * states[h] + new
                row.append(torch.einsum("bd,bde->be", q[:, h, t], states[h - 1 if crossed and t == 3 else h]))
            out.append(join(row))
        return torch.stack(out, 1)

    return run


TOGETHER = {"stacked": lambda row: torch.stack(row, 1), "features joined": lambda row: torch.cat(row, -1)}
OWN_DECAYS = {
    "numbers": lambda gate, h, t: (0.9, 0.8, 0.7)[h],
    "a gate": lambda gate, h, t: torch.sigmoid(gate[:, h, t, None, None]),
}


def one_head_each():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 8, 4, requires_grad=True) for _ in range(3))
    return q, k, v, torch.randn(2, 3, 8, requires_grad=True)


@pytest.mark.parametrize("join", TOGETHER)
@pytest.mark.parametrize("decay", OWN_DECAYS)
def test_a_loop_over_heads_inside(join, decay):
    """Three attentions, which are one operator."""
    run = heads_inside(TOGETHER[join], OWN_DECAYS[decay])
    assert_rewritten(run, *one_head_each(), count=1, compiled=False)


def test_a_loop_over_heads_that_reads_another_head_once(without_inductor):
    run, args = heads_inside(TOGETHER["stacked"], OWN_DECAYS["a gate"], crossed=True), one_head_each()
    made = torch.compile(run, backend="lightning", options={"validate": "off"})
    torch.testing.assert_close(made(*args), run(*args), rtol=1e-4, atol=1e-5)

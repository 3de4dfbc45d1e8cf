"""States that a program updates in place, in stretches with and without gradients; and near twins."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lacompile

B, H, D = 2, 3, 4


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()


def tokens(n, *requiring):
    """q, k, v and a state; those that are named require a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (B, H, n, D), "k": (B, H, n, D), "v": (B, H, n, D), "s": (B, H, D, D)}
    return [torch.randn(s, generator=generator).requires_grad_(name in requiring) for name, s in shapes.items()]


def outer(k, v, t):
    return k[:, :, t, :, None] * v[:, :, t, None]


def updated(q, k, v, s):
    out = []
    for t in range(q.shape[2]):
        s.mul_(0.9).add_(outer(k, v, t))
        out.append((q[:, :, t, None] @ s)[:, :, 0])
    return torch.stack(out, 2)


def copied(q, k, v, s):
    out = []
    for t in range(q.shape[2]):
        s.copy_(0.9 * s + outer(k, v, t))
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
    return torch.stack(out, 2)


def assigned(q, k, v, s):
    out = []
    for t in range(q.shape[2]):
        s[:] = 0.9 * s + outer(k, v, t)
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
    return torch.stack(out, 2)


def copied_at_last(q, k, v, s):
    """The loop's states are tensors of their own."""
    out, state = [], s
    for t in range(q.shape[2]):
        state = 0.9 * state + outer(k, v, t)
        out.append((q[:, :, t, None] @ state)[:, :, 0])
    s.copy_(state)
    return torch.stack(out, 2)


def decorated(f):
    return torch.no_grad()(f)


def in_a_block(f):
    def run(*args):
        with torch.no_grad():
            return f(*args)

    return run


def switched_by_hand(f):
    def run(*args):
        torch.set_grad_enabled(False)
        try:
            return f(*args)
        finally:
            torch.set_grad_enabled(True)

    return run


def behind_a_computation(f):
    """What is done before is done in another mode."""

    def run(q, k, v, s):
        q = q.sin()
        with torch.no_grad():
            return f(q, k, v, s)

    return run


def switched_twice(f):
    def run(*args):
        with torch.no_grad(), torch.enable_grad(), torch.no_grad():
            return f(*args)

    return run


def check(f, args, count, calls=1):
    """Results, what is in the state, and gradients are those of eager; returns the report of what was found."""
    theirs = [x.detach().clone().requires_grad_(x.requires_grad) for x in args]
    compiled = torch.compile(f, backend="lightning")
    for call in range(calls):
        runs = []
        for run, given in ((compiled, args), (f, theirs)):
            own = [x * 1.0 if x.requires_grad else x for x in given]  # no leaves: they may be written into
            torch.manual_seed(call)
            runs.append((run(*own), own[3]))
        for x, y in zip(*runs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        (got, state), (want, other) = runs
        assert got.requires_grad == want.requires_grad and state.requires_grad == other.requires_grad
        if want.requires_grad:
            weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
            given = [[x for x in a if x.requires_grad] for a in (args, theirs)]
            pairs = [
                torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
                for out, leaves in zip((got, want), given, strict=True)
            ]
            for x, y in zip(*pairs, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    report = lacompile.last_report()
    assert len(report.rewrites) == count
    return report


BODIES = [updated, copied, assigned, copied_at_last]
MODES = [decorated, in_a_block, switched_by_hand, behind_a_computation, switched_twice]
BY_TURNS = [(body, mode, (1, 6)[(a + b) % 2]) for a, body in enumerate(BODIES) for b, mode in enumerate(MODES)]
"""Of one token or of several: each body and each mode has both."""


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize(("body", "mode", "n"), BY_TURNS)
def test_all_of_a_body_without_gradients(body, mode, n):
    report = check(mode(body), tokens(n), 1, calls=3)
    assert report.rewrites[0].initial_state


@pytest.mark.parametrize("requiring", ["q", "kv", "qkvs"])
def test_inputs_that_require_gradients(requiring):
    """Nothing of what is computed without gradients has one."""
    check(decorated(updated), tokens(6, *requiring), 1)


class Streaming(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(8, 3 * H * D)
        self.register_buffer("state", torch.zeros(B, H, D, D))

    @torch.no_grad()
    def forward(self, x):
        q, k, v = self.project(x).view(*x.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4)
        return updated(q, k, v, self.state)


@pytest.mark.parametrize("n", [1, 5])
def test_a_buffer_of_a_module_in_a_stream(n):
    model = Streaming()
    other = copy.deepcopy(model)
    compiled = torch.compile(model, backend="lightning")
    for _ in range(4):
        x = torch.randn(B, n, 8)
        torch.testing.assert_close(compiled(x), other(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.state, other.state, rtol=1e-4, atol=1e-5)
    assert len(lacompile.last_report().rewrites) == 1


def written_apart(q, k, v, s, n=None):
    """The state is written without gradients, and read with them."""
    out = []
    for t in range(n or q.shape[2]):
        with torch.no_grad():
            s.mul_(0.9).add_(outer(k, v, t))
        out.append((q[:, :, t, None] @ s)[:, :, 0])
    return torch.stack(out, 2)


def read_apart(q, k, v, s):
    """The state is written with gradients, and read without them."""
    s.mul_(0.9).add_(outer(k, v, 0))
    with torch.no_grad():
        return q @ s


@pytest.mark.parametrize("n", [1, 4])
def test_a_state_that_is_written_without_gradients_and_has_none(n):
    check(written_apart, tokens(n), 1)


def test_queries_alone_have_gradients():
    """Where they are recorded there is no place that no switch parts from the read."""
    report = check(written_apart, tokens(1, "q"), 0)
    assert "switches the mode" in report.near_misses[0].found


@pytest.mark.parametrize("requiring", ["k", "v", "s", "qk", "qkvs"])
def test_a_state_that_loses_its_gradient_there(requiring):
    """The read has none of what was written; the operator would give it one."""
    check(written_apart, tokens(1, *requiring), 0)


def test_a_state_that_is_read_in_another_mode():
    check(read_apart, tokens(1), 1)


@pytest.mark.parametrize("requiring", ["q", "k", "qkv"])
def test_a_state_that_is_read_in_another_mode_with_gradients_to_lose(requiring):
    report = check(read_apart, tokens(1, *requiring), 0)
    assert "switches the mode" in report.near_misses[0].found


def keys_made_in_the_stretch(q, k, v, s):
    """What is read exists only where no gradients are recorded, and the result has one."""
    with torch.no_grad():
        k = k.sin()
        s.mul_(0.9).add_(outer(k, v, 0))
    return q @ s


def test_no_place_in_the_mode_of_the_result():
    report = check(keys_made_in_the_stretch, tokens(1, "q"), 0)
    assert "_set_grad_enabled" in report.near_misses[0].found
    assert "switches the mode" in report.near_misses[0].found


def test_that_place_where_there_is_no_gradient():
    check(keys_made_in_the_stretch, tokens(1), 1)


def rounded_apart(q, k, v, s):
    """The read rounds to bf16; what is in front of the writes does not."""
    s.mul_(0.9).add_(outer(k, v, 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return q @ s


def rounded_before(q, k, v, s):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s.mul_(0.9).add_(outer(k, v, 0))
    return q @ s


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("f", [rounded_apart, rounded_before])
def test_another_mode_between_write_and_read(f):
    report = check(f, tokens(1), 0)
    assert "switches the mode" in report.near_misses[0].found


def drawn_between(q, k, v, s):
    s.mul_(0.9).add_(outer(k, v, 0))
    return q @ s + torch.rand(D)


def drawn_before(q, k, v, s):
    with torch.no_grad():
        noise = torch.rand(D)
        s.mul_(0.9).add_(outer(k, v, 0))
        return q @ s + noise


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("f", [drawn_between, drawn_before])
def test_random_numbers_beside_it(f):
    check(f, tokens(1), 1)


def written_before_the_keys(q, k, v, s):
    """At no place are both the state and the keys what the read sees."""
    with torch.no_grad():
        s.mul_(0.9)
        k = k.sin()
        s.add_(outer(k, v, 0))
        k.mul_(2.0)
        return q @ s


def test_no_place_at_all():
    report = check(written_before_the_keys, tokens(1), 0)
    assert "mode" not in report.near_misses[0].found

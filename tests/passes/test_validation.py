"""Right rewrites that a comparison on made-up inputs must not take for wrong ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import lacompile
from lacompile.testing import assert_rewritten

B, H, N, D = 2, 3, 20, 4


@pytest.fixture(autouse=True)
def anew(without_inductor):
    torch._dynamo.reset()


def inputs(*more):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=generator, requires_grad=True) for s in [(B, H, N, D)] * 3 + list(more)]


def features_computed_twice(q, k, v):
    """The normaliser and the sum each compute their features: two nodes, one value."""
    kv = torch.einsum("bhnd,bhne->bhnde", F.elu(k) + 1, v).cumsum(2)
    z = 1 / (torch.einsum("bhnd,bhnd->bhn", F.elu(q) + 1, (F.elu(k) + 1).cumsum(2)) + 1e-6)
    return torch.einsum("bhnd,bhnde,bhn->bhne", F.elu(q) + 1, kv, z)


def decays_written_down(q, k, v):
    """0.9 in fp32 is not 0.9."""
    i = torch.arange(N)
    decay = torch.tensor([0.9, 0.95, 0.99]).view(H, 1, 1).pow((i[:, None] - i).float()).tril()
    return (q @ k.mT * decay) @ v


def moving_average(q, k, v, gate):
    """The weight of the new and the decay of the old are two inputs of the operator, and one is made of the other."""
    decay, state, out = torch.sigmoid(gate).view(1, H, 1, 1), k.new_zeros(B, H, D, D), []
    for t in range(8):
        new = k[:, :, t, :, None] * v[:, :, t, None, :]
        state = torch.lerp(new, state, decay.expand_as(state))
        out.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(out, 2)


def fused_update(q, k, v):
    state, out = k.new_zeros(B, H, D, D), []
    for t in range(8):
        state = torch.addcmul(0.9 * state, k[:, :, t, :, None], v[:, :, t, None, :], value=0.5)
        out.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(out, 2)


def first_head_repeated(q, k, v, x, *weights):
    """A function of repeated heads repeats: made up as a value of its own it would not."""
    q, k, v = (F.linear(x, w).reshape(B, -1, H, D).transpose(1, 2) for w in weights)
    k, v = k[:, :1].expand(-1, H, -1, -1), v[:, :1].repeat_interleave(H, 1)
    return (torch.exp(q) @ torch.sin(k).mT).tril() @ v


REPEATED = ((B, N, H * D), *[(H * D, H * D)] * 3)
PROGRAMS = [
    (first_head_repeated, REPEATED, 1),
    (features_computed_twice, (), 2),
    (decays_written_down, (), 1),
    (moving_average, ((H,),), 1),
    (fused_update, (), 1),
]


@pytest.mark.parametrize(("f", "more", "rewrites"), PROGRAMS, ids=[f.__name__ for f, _, _ in PROGRAMS])
def test_accepted(f, more, rewrites):
    assert_rewritten(f, *inputs(*more), count=rewrites)


def test_a_copy_without_gradients_is_no_copy():
    def f(q, k, v):
        with torch.no_grad():
            detached = F.elu(k) + 1
        return (q @ (F.elu(k) + 1).mT).tril() @ v + (q @ detached.mT).tril() @ v

    found = []
    for run in (f, torch.compile(f, backend="lightning")):
        args = inputs()
        run(*args).square().sum().backward()
        found.append(args[1].grad)
    torch.testing.assert_close(*found)


def test_nothing_is_shown_by_zeros():
    """Where made-up values disagree, the program computes them; of zeros it computes zeros, whatever it does."""
    report = lacompile.explain(first_head_repeated)(*(torch.zeros_like(x) for x in inputs(*REPEATED)))
    assert not report.rewrites
    assert {miss.obligation for miss in report.near_misses} == {"agreement"}


def overwritten(q, k, v):
    """Autograd saves the state for the read, and the next token overwrites it."""
    state, out = q.new_zeros(B, H, D, D), []
    for t in range(N):
        state.mul_(0.9).add_(k[:, :, t, :, None] * v[:, :, t, None])
        out.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(out, 2)


def overwritten_by_head(q, k, v):
    """Each head's part by itself: between the read of one and its next write the others are written."""
    state, out = torch.zeros(B, H, D, D), []
    for t in range(4):
        read = []
        for h in range(H):
            state[:, h] = state[:, h] * 0.9 + k[:, h, t, :, None] * v[:, h, t, None]
            read.append((q[:, h, t, None] @ state[:, h])[:, 0])
        out.append(torch.stack(read, 1))
    return torch.stack(out, 2)


def test_parts_of_a_state_that_are_overwritten():
    report = lacompile.explain(overwritten_by_head, validate="always")(*inputs())
    assert report.rewrites and not report.near_misses
    assert all(r.validation.startswith("fp64 difference") for r in report.rewrites)


def test_a_state_that_is_overwritten():
    """Autograd cannot go back through the program itself: the rewritten one can, and its gradients are right."""
    args = inputs()
    with pytest.raises(RuntimeError, match="inplace operation"):
        overwritten(*args).sum().backward()

    def kept(q, k, v):
        state, out = q.new_zeros(B, H, D, D), []
        for t in range(N):
            state = 0.9 * state + k[:, :, t, :, None] * v[:, :, t, None]
            out.append((q[:, :, t, :, None] * state).sum(-2))
        return torch.stack(out, 2)

    made = torch.compile(overwritten, backend="lightning", options={"validate": "always"})
    for got, want in zip(
        torch.autograd.grad(made(*args).sum(), args), torch.autograd.grad(kept(*args).sum(), args), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert len(lacompile.last_report().rewrites) == 1


def gated(q, k, v, gate):
    state, out = 0, []
    for t in range(N):
        state = gate[:, :, t, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(out, 2)


def gates(smallest):
    made = torch.full((B, H, N), 0.9)
    made[0, 0, 7] = smallest
    return made.requires_grad_()


@pytest.mark.parametrize("smallest", [1e-8, 1e-16, 1e-30])
def test_gates_that_are_nearly_nothing(smallest):
    """Their derivative is one of their logarithm, divided by what is nearly nothing."""
    assert_rewritten(gated, *inputs(), gates(smallest), compiled=False)


@pytest.mark.parametrize("smallest", [1e-38, 1e-39, 0.0])
def test_the_original_graph_serves_gates_whose_weight_is_nothing(smallest):
    compiled = torch.compile(gated, backend="lightning")
    found = []
    for gate in (gates(0.5), gates(smallest)):
        found.clear()
        for f in (compiled, gated):
            given = [x.detach().clone().requires_grad_() for x in (*inputs(), gate)]
            found.append(torch.autograd.grad(f(*given).square().sum(), given))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert lacompile.last_report().rewrites


@pytest.mark.parametrize("rate", [0.1, 0.03])
def test_rounding_inside_an_exponent_is_no_rounding_of_weights(rate, monkeypatch):
    """Were distances in bf16 read as exact ones, the comparison would tell, whatever it allows for a mask in bf16."""
    monkeypatch.setattr("lacompile.passes.lift.transfer.as_short_numbers", lambda op, v, precision: (v, precision))

    def run(q, k, v):
        i = torch.arange(q.shape[2], dtype=torch.bfloat16)
        return (q @ k.mT * torch.exp(rate * (i[:, None] - i).to(q)).tril()) @ v

    report = lacompile.explain(run, validate="always")(*(torch.randn(1, 1, 300, 4) for _ in range(3)))
    assert [miss.obligation for miss in report.near_misses] == ["agreement"], str(report)


def test_a_mask_in_a_short_format_is_off_by_its_rounding_alone():
    def run(q, k, v):
        i = torch.arange(q.shape[2])
        return (q @ k.mT * torch.exp(-0.1 * (i[:, None] - i)).tril().to(torch.bfloat16).to(q)) @ v

    report = lacompile.explain(run, validate="always")(*(torch.randn(1, 1, 60, 4) for _ in range(3)))
    assert len(report.rewrites) == 1, str(report)

"""Programs that switch something of PyTorch on and off: rewritten where that is right, and never broken."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lacompile
from lacompile import _compat


@pytest.fixture(autouse=True)
def anew(without_inductor):
    torch._dynamo.reset()


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 40, 8, generator=generator, requires_grad=True) for _ in range(3)]


def attention(q, k, v):
    return (q @ k.mT).tril() @ v


def without_gradients(q, k, v):
    with torch.no_grad():
        o = attention(q, k, v)
    return o * q.sum()


def in_inference_mode(q, k, v):
    with torch.inference_mode():
        o = attention(q, k, v)
    return o.clone()


def half_without_gradients(q, k, v):
    with torch.no_grad():
        scores = q @ k.mT
    return scores.tril() @ v


@torch.no_grad()
def requiring_without_gradients(q, k, v):
    """As the hook of a checkpointed model does behind its embeddings, also where the model is evaluated."""
    return attention((q * 1.0).requires_grad_(), k, v)


def checkpointed(q, k, v):
    return checkpoint(attention, q.sin(), k, v, use_reentrant=False)


def checkpointed_beside_another(q, k, v):
    return checkpoint(attention, attention(k, q, v), k, v, use_reentrant=False)


def written(q, k, v):
    state, out = q.new_zeros(2, 3, 8, 8), torch.empty_like(v[:, :, :6])
    for t in range(6):
        state = 0.9 * state + k[:, :, t, :, None] * v[:, :, t, None]
        out[:, :, t] = (q[:, :, t, None] @ state)[:, :, 0]
    return out


@torch.no_grad()
def generated(q, k, v):
    """All of it without gradients, and written into place token by token."""
    return written(q, k, v)


def generated_before_the_rest(q, k, v):
    with torch.no_grad():
        out = written(q, k, v)
    return out * q[:, :, :6]


def generated_and_written_into(q, k, v):
    """The gradient of the one row is the one that it was written with."""
    with torch.no_grad():
        out = written(q, k, v)
    out[:, :, 0] = 3.0 * q[:, :, 0]
    return out * q[:, :, :6]


def generated_in_part(q, k, v):
    """The state is data where the gradients begin."""
    with torch.no_grad():
        state, out = q.new_zeros(2, 3, 8, 8), torch.empty_like(v)
        for t in range(3):
            state = 0.9 * state + k[:, :, t, :, None] * v[:, :, t, None]
            out[:, :, t] = (q[:, :, t, None] @ state)[:, :, 0]
    for t in range(3, 6):
        state = 0.9 * state + k[:, :, t, :, None] * v[:, :, t, None]
        out[:, :, t] = (q[:, :, t, None] @ state)[:, :, 0]
    return out[:, :, :6]


def generated_over_what_has_gradients(q, k, v):
    """For autograd the result is the one that was there before."""
    state, out = q.new_zeros(2, 3, 8, 8), q * 3.0
    with torch.no_grad():
        for t in range(40):
            state = 0.9 * state + k[:, :, t, :, None] * v[:, :, t, None]
            out[:, :, t] = (q[:, :, t, None] @ state)[:, :, 0]
    return out


def overwritten(q, k, v):
    out = attention(q, k, v)
    with torch.no_grad():
        out.copy_(attention(2.0 * q, k, v))
    return out


def derivatives(grad, q, k, v):
    """Those of ``attention``, which are attentions again."""
    weights, of_weights = (q @ k.mT).tril(), (grad @ v.mT).tril()
    return of_weights @ k, of_weights.mT @ q, weights.mT @ grad


class Derived(torch.autograd.Function):
    """Its derivatives are written down, and right."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return attention(q, k, v)

    @staticmethod
    def backward(ctx, grad):
        return derivatives(grad, *ctx.saved_tensors)


class DerivedInHalf(Derived):
    """Its derivatives are not those of what it computes."""

    @staticmethod
    def backward(ctx, grad):
        q, k, _ = ctx.saved_tensors
        return None, k * grad.sum(), 0.5 * (q @ k.mT).tril().mT @ grad


class Doubling(torch.autograd.Function):
    """It writes into one of its inputs, which it returns."""

    @staticmethod
    def forward(ctx, q, k, v):
        k.mul_(2.0)
        ctx.mark_dirty(k)
        ctx.save_for_backward(q, k, v)
        return attention(q, k, v), k

    @staticmethod
    def backward(ctx, grad, of_keys):
        dq, dk, dv = derivatives(grad, *ctx.saved_tensors)
        return dq, 2.0 * (dk + of_keys), dv


class DerivedByLoops(torch.autograd.Function):
    """Its derivatives are loops too, of which the second goes backwards."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return written(q, k, v)

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        state, of_queries = q.new_zeros(2, 3, 8, 8), torch.zeros_like(q)
        for t in range(6):
            state = 0.9 * state + k[:, :, t, :, None] * v[:, :, t, None]
            of_queries[:, :, t] = (state @ grad[:, :, t, :, None])[..., 0]
        ahead, of_keys, of_values = q.new_zeros(2, 3, 8, 8), torch.zeros_like(k), torch.zeros_like(v)
        for t in reversed(range(6)):
            ahead = 0.9 * ahead + q[:, :, t, :, None] * grad[:, :, t, None]
            of_keys[:, :, t] = (ahead @ v[:, :, t, :, None])[..., 0]
            of_values[:, :, t] = (k[:, :, t, None] @ ahead)[:, :, 0]
        return of_queries, of_keys, of_values


def derived(q, k, v):
    return Derived.apply(q.sin(), k, v) * 2.0


def derived_by_loops(q, k, v):
    return DerivedByLoops.apply(*(x[:, :, :6] * 1.0 for x in (q, k, v)))


def checkpointed_loop(q, k, v):
    """What is a tensor of the program's own is read for its format alone."""

    def run(x, q, k, v):
        state, out = x.new_zeros(2, 3, 8, 8), []
        for t in range(6):
            state = 0.9 * state + k[:, :, t, :, None] * v[:, :, t, None]
            out.append(q[:, :, t, None] @ state)
        return torch.cat(out, 2)

    return checkpoint(run, q.sin(), q, k, v, use_reentrant=False)


def derived_in_half(q, k, v):
    return DerivedInHalf.apply(q, k, v) * 2.0


def doubling(q, k, v):
    out, keys = Doubling.apply(q, k * 1.0, v)
    return out * keys


def derived_inside_a_checkpoint(q, k, v):
    return checkpoint(derived, q, k, v, use_reentrant=False)


def per_head(q, k, v):
    return torch.vmap(torch.vmap(attention))(q, k, v)


def gradient(q, k, v):
    return torch.func.grad(lambda q: attention(q, k, v).sum())(q)


def tangent(q, k, v):
    return torch.func.jvp(lambda q: attention(q, k, v), (q,), (k,))[1]


@pytest.mark.parametrize(
    ("f", "count"),
    [
        (without_gradients, 1),
        (in_inference_mode, 1),
        (half_without_gradients, 0),
        (requiring_without_gradients, 1),
        (checkpointed, 1),
        (checkpointed_beside_another, 2),
        (generated, 1),
        (generated_before_the_rest, 1),
        (generated_and_written_into, 1),
        (generated_in_part, 0),
        (generated_over_what_has_gradients, 0),
        (overwritten, 2),
        (derived, 4),
        (derived_by_loops, 4),
        (checkpointed_loop, 1),
        (derived_in_half, 2),
        (doubling, 3),
        (derived_inside_a_checkpoint, 4),
        (per_head, 1),
        (gradient, 0),
        (tangent, 0),
    ],
)
def test_mode(f, count):
    """Values, gradients, and that nothing stays switched on."""
    args = inputs()
    want = f(*args)
    got = torch.compile(f, backend="lightning")(*args)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert len(lacompile.last_report().rewrites) == count
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not _compat.functorch_active()
    assert got.requires_grad == want.requires_grad
    if want.requires_grad:
        weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
        pairs = [torch.autograd.grad((out * weight).sum(), args, allow_unused=True) for out in (got, want)]
        for x, y in zip(*pairs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


class Masked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.exp(-0.5 * (torch.arange(40)[:, None] - torch.arange(40))).tril())

    def forward(self, q, k, v):
        return checkpoint(lambda q, k, v: (q @ k.mT * self.mask) @ v, q, k, v, use_reentrant=False)


def test_a_buffer_read_inside_a_checkpoint_is_checked():
    model, args = Masked(), inputs()
    compiled = torch.compile(model, backend="lightning")
    torch.testing.assert_close(compiled(*args), model(*args), rtol=1e-4, atol=1e-5)
    assert len(lacompile.last_report().rewrites) == 1
    model.mask.mul_(2.0)
    torch.testing.assert_close(compiled(*args), model(*args), rtol=1e-4, atol=1e-5)


def test_what_the_rest_of_a_checkpoint_does_is_known_in_parts():
    """A part of the body that the analysis cannot run hides neither its inputs' values nor their being only read."""
    model, args = Masked(), inputs()

    def body(q, k, v):
        busiest = torch.histc((q.argmax(-1) // 2).float(), bins=4, min=0, max=3)
        return (q @ k.mT * model.mask) @ v * busiest.argmax()

    def f(q, k, v):
        inner = checkpoint(body, q, k, v, use_reentrant=False)
        return checkpoint(body, inner, k, v, use_reentrant=False)

    got = torch.compile(f, backend="lightning")(*args)
    torch.testing.assert_close(got, f(*args), rtol=1e-4, atol=1e-5)
    assert len(lacompile.last_report().rewrites) == 2


def test_a_gate_that_is_transposed_without_inductor():
    """As of PyTorch 2.13 the fake kernel of logsigmoid has other strides than the one for the CPU."""

    def run(x, weight):
        q = x.unflatten(-1, (3, 4)).transpose(1, 2)
        upto = torch.nn.functional.logsigmoid((x @ weight).transpose(1, 2)).cumsum(-1)
        return (q @ q.mT * (upto[..., :, None] - upto[..., None, :]).exp().tril()) @ q

    args = [torch.randn(2, 6, 12, requires_grad=True), torch.randn(12, 3, requires_grad=True)]
    made = torch.compile(run, backend="lightning")
    found = torch.autograd.grad(made(*args).sum(), args)
    for got, want in zip(found, torch.autograd.grad(run(*args).sum(), args), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert len(lacompile.last_report().rewrites) == 1

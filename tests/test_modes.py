"""Programs that switch something of PyTorch on and off: rewritten where that is right, and never broken."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lacompile
from lacompile import _compat


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("lacompile._compat.cpu_compiler_error", lambda: "not needed for this")
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


def checkpointed(q, k, v):
    return checkpoint(attention, q.sin(), k, v, use_reentrant=False)


def checkpointed_beside_another(q, k, v):
    return checkpoint(attention, attention(k, q, v), k, v, use_reentrant=False)


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
        (checkpointed, 1),
        (checkpointed_beside_another, 2),
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

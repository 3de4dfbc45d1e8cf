"""Results that a loop writes into a tensor, place by place, instead of joining them; and near twins of that."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import lacompile
from lacompile.testing import assert_rewritten

B, H, N, D = 2, 2, 8, 4
WIDTH = H * D


def tokens():
    torch.manual_seed(0)
    return torch.randn(B, N, WIDTH, requires_grad=True)


def layer(rows=WIDTH, columns=WIDTH):
    """A weight and a bias."""
    weight = torch.randn(rows, columns) / columns**0.5
    return [weight.requires_grad_(), torch.randn(rows, requires_grad=True)]


def heads(x):
    return x.unflatten(-1, (H, D))


def attention(x):
    """What each token reads from the state, ``[B, H * D]``."""
    state = x.new_zeros(B, H, D, D)
    for x_t in x.unbind(1):
        state = 0.9 * state + heads(torch.tanh(x_t))[..., :, None] * heads(torch.cos(x_t))[..., None, :]
        yield (heads(torch.sin(x_t))[..., :, None] * state).sum(-2).flatten(1)


def indexed(x, results):
    out = torch.empty(B, N, WIDTH)
    for t, y in enumerate(results):
        out[:, t] = y
    return out


def behind_dots(x, results):
    out = torch.zeros_like(x)
    for t, y in enumerate(results):
        out[..., t, :] = y
    return out


def tokens_first(x, results):
    out = x.new_empty(N, B, WIDTH)
    for t, y in enumerate(results):
        out[t] = y
    return out.transpose(0, 1)


def with_a_length(x, results):
    out = torch.ones_like(x)
    for t, y in enumerate(results):
        out[:, t : t + 1, :] = y[:, None]
    return out


def from_the_end(x, results):
    out = torch.full((B, N, WIDTH), 3.0)
    for t, y in enumerate(results):
        out[:, t - N] = y
    return out


def copied(x, results):
    out = torch.empty_like(x)
    for t, y in enumerate(results):
        out[:, t].copy_(y)
    return out


def copied_by_select(x, results):
    out = torch.empty_like(x)
    for t, y in enumerate(results):
        out.select(1, t).copy_(y)
    return out


def copied_by_narrow(x, results):
    out = torch.empty_like(x)
    for t, y in enumerate(results):
        out.narrow(1, t, 1).copy_(y.unsqueeze(1))
    return out


def last_first(x, results):
    out = torch.empty_like(x)
    for t, y in reversed(list(enumerate(results))):
        out[:, t] = y
    return out


def widened(x, results):
    out = torch.zeros(B, N, WIDTH, dtype=torch.float64)
    for t, y in enumerate(results):
        out[:, t] = y
    return out


def in_a_longer_one(x, results):
    out = torch.zeros(B, N + 3, WIDTH)
    for t, y in enumerate(results):
        out[:, t + 2] = y
    return out


def transposed_memory(x, results):
    out = torch.empty_like(x.detach().transpose(1, 2).contiguous().transpose(1, 2))
    for t, y in enumerate(results):
        out[:, t] = y
    return out


def written_into_later(x, results):
    out = indexed(x, results)
    out[:, 0] = 1.0
    out.mul_(2)
    return out


def read_later(x, results):
    out = torch.empty_like(x)
    view = out[:, 3:5]
    for t, y in enumerate(results):
        out[:, t] = y
    return out, view * 2, out[:, 2]


FILLED = [
    indexed, behind_dots, tokens_first, with_a_length, from_the_end, copied, copied_by_select, copied_by_narrow,
    last_first, widened, in_a_longer_one, transposed_memory, written_into_later, read_later,
]  # fmt: skip


@pytest.mark.parametrize("fill", FILLED)
def test_projected_and_written_into_place(fill):
    def run(x, w, b):
        return fill(x, (F.linear(y, w, b) for y in attention(x)))

    report = assert_rewritten(run, tokens(), *layer(), compiled=False)
    assert f"N={N}" in str(report)
    assert report.nodes_after < report.nodes_before / 2


def test_inductor_compiles_it():
    assert_rewritten(lambda x, w, b: indexed(x, (F.linear(y, w, b) for y in attention(x))), tokens(), *layer())


@pytest.mark.parametrize("size", [4, 3])
def test_chunks_with_their_heads_behind_the_tokens(size):
    def run(x, w, b):
        state, out = x.new_zeros(B, H, D, D), torch.empty_like(x)
        for start in range(0, N, size):
            part = x[:, start : start + size]
            q, k, v = (heads(f(part)).transpose(1, 2) for f in (torch.sin, torch.tanh, torch.cos))
            place = torch.arange(part.shape[1], dtype=x.dtype)
            o = (q @ k.mT * (0.9 ** (place[:, None] - place)).tril()) @ v + 0.9 ** (place[:, None] + 1) * (q @ state)
            state = 0.9 ** part.shape[1] * state + (k * 0.9 ** (part.shape[1] - 1 - place[:, None])).mT @ v
            o = F.layer_norm(o, (D,)).transpose(1, 2).flatten(2)
            out[:, start : start + size] = F.linear(o * torch.sigmoid(part), w, b) + part
        return out

    report = assert_rewritten(run, tokens(), *layer(), compiled=False)
    assert f"N={N}" in str(report)


def test_two_tensors_at_once():
    def run(x, w, b):
        out, other = torch.empty_like(x), torch.empty_like(x)
        for t, y in enumerate(attention(x)):
            out[:, t] = F.linear(y, w, b)
            other[:, t] = F.layer_norm(x[:, t], (WIDTH,))
        return out, other

    assert_rewritten(run, tokens(), *layer(), compiled=False)


def test_of_any_batch():
    def run(x, w, b):
        state, out = x.new_zeros(x.shape[0], H, D, D), x.new_zeros(x.shape)
        for t in range(N):
            x_t = x[:, t]
            state = 0.9 * state + heads(torch.tanh(x_t))[..., :, None] * heads(torch.cos(x_t))[..., None, :]
            out[:, t] = F.linear((heads(torch.sin(x_t))[..., :, None] * state).sum(-2).flatten(1), w, b)
        return out

    x = torch.randn(5, N, WIDTH, requires_grad=True)
    report = assert_rewritten(run, tokens(), *layer(), after=[x, *layer()], compiled=False)
    assert report.nodes_after < report.nodes_before / 2


# -------------------------------------------------------------------------------------------------------------- twins


def read_in_between(x, f):
    out = torch.zeros_like(x)
    read = None
    for t, y in enumerate(attention(x)):
        out[:, t] = f(y)
        if t == 5:
            read = out.sum(1)
    return out, read


def viewed_and_read_in_between(x, f):
    out = torch.zeros_like(x)
    view, read = out.view(B, -1), None
    for t, y in enumerate(attention(x)):
        out[:, t] = f(y)
        if t == 5:
            read = view * 2
    return out, read


def read_back(x, f):
    out = torch.zeros_like(x)
    for t, y in enumerate(attention(x)):
        out[:, t] = f(y) + out[:, t - 1].detach() if t else f(y)
    return out


def twice(x, f):
    out = torch.zeros_like(x)
    for t, y in enumerate(attention(x)):
        out[:, max(t, 1)] = f(y)
    return out


def with_a_gap(x, f):
    out = torch.zeros(B, N + 1, WIDTH)
    for t, y in enumerate(attention(x)):
        out[:, t + (t > 4)] = f(y)
    return out


def overlapping(x, f):
    out = torch.zeros(B, N + 1, WIDTH)
    for t, y in enumerate(attention(x)):
        out[:, t : t + 2] = torch.stack([f(y), f(y) * 2], 1)
    return out


def spread(x, f):
    out = torch.zeros(B, B, N, WIDTH)
    for t, y in enumerate(attention(x)):
        out[:, :, t] = f(y)
    return out


def every_second(x, f):
    out = torch.zeros(B, 2 * N, WIDTH)
    for t, y in enumerate(attention(x)):
        out[:, 2 * t : 2 * t + 1 : 2] = f(y)[:, None]
    return out


def a_view_is_written(x, f):
    out = torch.zeros_like(x)
    for t, y in enumerate(attention(x)):
        out[:, t] = f(y)
        if t == 5:
            out[:, 2].mul_(2)
    return out


def cleared_in_between(x, f):
    out = torch.zeros_like(x)
    for t, y in enumerate(attention(x)):
        out[:, t] = f(y)
        if t == 5:
            out.zero_()
    return out


def added(x, f):
    out = torch.ones_like(x)
    for t, y in enumerate(attention(x)):
        out[:, t] += f(y)
    return out


def written_over_later(x, f):
    out = torch.zeros_like(x)
    for t, y in enumerate(attention(x)):
        y = f(y)
        out[:, t] = y
        if t == 3:
            y.mul_(2)
    return out, y


def without_gradients(x, f):
    out = torch.zeros_like(x)
    for t, y in enumerate(attention(x)):
        if t % 2:
            out[:, t] = f(y)
        else:
            with torch.no_grad():
                out[:, t] = f(y)
    return out


def by_two_dimensions(x, f):
    out = torch.zeros(N, N, WIDTH)
    for t, y in enumerate(attention(x)):
        if t % 2:
            out[t, :B] = f(y)
        else:
            out[:B, t] = f(y)
    return out


def by_a_tensor(x, f):
    out = torch.zeros_like(x)
    for t, y in enumerate(attention(x)):
        out[:, torch.tensor([t])] = f(y)[:, None]
    return out


TWINS = [
    read_in_between, viewed_and_read_in_between, read_back, twice, with_a_gap, overlapping, spread, every_second,
    a_view_is_written, cleared_in_between, added, written_over_later, without_gradients, by_two_dimensions, by_a_tensor,
]  # fmt: skip


def compared(run, *args):
    """What a run and its rewritten twin compute, without validation; the number of nodes that the twin has lost."""

    def computed(f):
        given = [a.detach().double().requires_grad_(a.requires_grad) for a in args]
        outs = f(*given)
        outs = [o for o in (outs if isinstance(outs, tuple) else (outs,)) if o is not None]
        loss = sum((o * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in outs)
        wanted = [a for a in given if a.requires_grad]
        return [*outs, *(torch.autograd.grad(loss, wanted) if wanted else ())]

    torch._dynamo.reset()
    reports = []

    def backend(gm, example_inputs):
        decision = lacompile.decision.decide(gm, example_inputs, lacompile.options.Options(validate="off"))
        reports.append(decision.report)
        return (decision.rewritten or gm).forward

    want, got = computed(run), computed(torch.compile(run, backend=backend))
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    return reports[0]


@pytest.mark.parametrize("twin", TWINS)
def test_what_is_no_filling(twin):
    """Nothing is moved, so the projections hide that there is one attention of all tokens."""
    report = compared(lambda x, w, b: twin(x, lambda y: F.linear(y, w, b)), tokens(), *layer())
    assert f"N={N}" not in str(report)


def test_what_was_written_without_gradients_is_data():
    """There is nothing to move; one token of the attention has no gradient."""
    compared(lambda x, w, b: without_gradients(x, lambda y: y) * w[0] + b, tokens(), *layer())


@pytest.mark.parametrize("aliased", [False, True])
def test_an_input_is_written_into(aliased):
    """Whoever holds it may look at any time."""

    def run(x, w, b, out):
        out = out.view(B, N, WIDTH) if aliased else out
        for t, y in enumerate(attention(x)):
            out[:, t] = F.linear(y, w, b)
        return out * 1

    report = compared(run, tokens().detach(), *(p.detach() for p in layer()), torch.zeros(B, N, WIDTH))
    assert f"N={N}" not in str(report)

"""Normalisers inside a loop: a function of a sum for each token or chunk, and near twins of them."""

from __future__ import annotations

import pytest
import torch

from lacompile import explain
from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

N, D = 6, 4


def heads(n=N):
    return qkv(1, 2, n, D)


def tokens(divide, decay=0.9, own=None, written=False, features=torch.exp):
    """``divide(sum, normaliser, t)`` for each token; the normaliser's decay is ``own(t)`` where that is given."""

    def run(q, k, v, *gates):
        q, k = features(q), features(k)
        state, total, outs = torch.zeros(1, 2, D, D), torch.zeros(1, 2, D), []
        out = torch.empty_like(v)
        for t in range(q.shape[2]):
            state = state * decay + k[:, :, t, :, None] * v[:, :, t, None, :]
            total = total * (decay if own is None else own(t, *gates)) + k[:, :, t]
            above = (q[:, :, t, :, None] * state).sum(-2)
            outs.append(divide(above, (q[:, :, t] * total).sum(-1, keepdim=True), t))
            if written:
                out[:, :, t] = outs[-1]
        return out if written else torch.stack(outs, 2)

    return run


NORMALISERS = {
    "division": lambda x, z: x / z,
    "eps": lambda x, z: x / (z + 1e-6),
    "clamped": lambda x, z: x / z.clamp(min=1e-6),
    "eps and clamped": lambda x, z: x / (z + 1e-3).clamp(min=1e-2),
    "absolute": lambda x, z: x / z.abs().clamp(min=1),
    "maximum": lambda x, z: x / torch.maximum(z.abs(), torch.ones_like(z)),
    "maximum of a number": lambda x, z: x / torch.max(z.abs(), torch.tensor(1.0)),
    "detached": lambda x, z: x / z.detach().abs().clamp(min=1),
    "detached behind": lambda x, z: x / z.abs().clamp(min=1).detach(),
    "reciprocal": lambda x, z: x * torch.reciprocal(z + 1e-6),
    "one over": lambda x, z: x * (1 / z),
    "rsqrt": lambda x, z: x * torch.rsqrt(z + 1e-6),
    "power": lambda x, z: x * (z + 1e-6) ** -0.5,
}


@pytest.mark.parametrize("name", NORMALISERS)
def test_a_normaliser_for_each_token(name):
    report = assert_rewritten(tokens(lambda x, z, t: NORMALISERS[name](x, z)), *heads(), count=2, compiled=False)
    assert report.nodes_after < 60


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("features", [torch.exp, torch.square])
def test_written_into_one_tensor(decay, features):
    run = tokens(lambda x, z, t: x / (z + 1e-6), decay, written=True, features=features)
    assert_rewritten(run, *heads(), count=2, compiled=False)


@pytest.mark.parametrize("n", [3, 16])
def test_lengths(n):
    """Three tokens are the fewest that are a sequence; of sixteen a running sum has more terms than are looked into."""
    assert_rewritten(tokens(lambda x, z, t: x / (z + 1e-6)), *heads(n), count=2, compiled=False)


def of_one_projection(x, w, b):
    """Two heads, whose features are parts of one tensor that each step reads a token of."""
    q, k, v = (y.unflatten(-1, (2, D)).transpose(1, 2) for y in torch.nn.functional.linear(x, w, b).chunk(3, -1))
    return tokens(lambda x, z, t: x / z, features=lambda y: torch.nn.functional.elu(y) + 1)(q, k, v)


def test_heads_of_one_projection():
    shapes = (1, N, 8), (6 * D, 8), (6 * D,)
    args = [torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_() for shape in shapes]
    assert_rewritten(of_one_projection, *args, count=2, compiled=False)


def test_inductor_compiles_them():
    assert_rewritten(tokens(lambda x, z, t: x / (z + 1e-6)), *heads(), count=2)


def gated(gate):
    """A decay per token or head, in both sums."""

    def run(q, k, v, g):
        q, k = q.exp(), k.exp()
        state, total, outs = 0, 0, []
        for t in range(q.shape[2]):
            s = gate(g, t)
            state = state * s[..., None, None] + k[:, :, t, :, None] * v[:, :, t, None, :]
            total = total * s[..., None] + k[:, :, t]
            below = torch.einsum("bhd,bhd->bh", q[:, :, t], total)
            outs.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], state) / (below[..., None] + 1e-6))
        return torch.stack(outs, 2)

    return run


GATES = {
    "sigmoid": (lambda g, t: torch.sigmoid(g[:, :, t]), (1, 2, N)),
    "exponential": (lambda g, t: torch.nn.functional.logsigmoid(g[:, :, t]).exp(), (1, 2, N)),
    "slope": (lambda g, t: torch.exp(-g.square())[None], (2,)),
}


@pytest.mark.parametrize("name", GATES)
def test_decays(name):
    gate, shape = GATES[name]
    assert_rewritten(gated(gate), *heads(), torch.randn(shape, requires_grad=True), count=2, compiled=False)


def test_a_base_must_be_positive():
    """Of the normaliser too, which stays as it is: a product with a gate of unknown sign is no decay."""
    run = tokens(lambda x, z, t: x / z.abs().clamp(min=1), own=lambda t, g: torch.tanh(g[:, :, t, None]))
    report = assert_rewritten(run, *heads(), torch.randn(1, 2, N), count=1, compiled=False)
    assert "constant 0.9" in str(report.rewrites[0]) and report.near_misses


def test_an_input_that_decays_the_normaliser_alone():
    run = tokens(lambda x, z, t: x / (z + 1e-6), own=lambda t, g: g)
    report = assert_rewritten(run, *heads(), torch.tensor(0.5), count=2, compiled=False)
    assert any("> 0" in text for r in report.rewrites for text in map(str, r.assumptions))


def chunks(below, size=4, total=None):
    """Performer's prefix sums by chunks; ``below(q, running, c)`` is the normaliser."""

    def run(q, k, v):
        last, context, outs = 0, 0, []
        for c, (qc, kc, vc) in enumerate(zip(*(x.split(size, 2) for x in (q.exp(), k.exp(), v)), strict=True)):
            running = last + kc.cumsum(2)
            products = context + torch.einsum("bhnd,bhne->bhnde", kc, vc).cumsum(2)
            outs.append(torch.einsum("bhnde,bhnd,bhn->bhne", products, qc, below(qc, running, c)))
            last, context = running[:, :, -1:], products[:, :, -1:]
        return torch.cat(outs, 2)

    return run


def dot(q, z):
    return torch.einsum("bhnd,bhnd->bhn", q, z)


@pytest.mark.parametrize("n", [16, 14])
@pytest.mark.parametrize("early", [False, True])
def test_a_normaliser_for_each_chunk(n, early):
    """An epsilon that is added to the sum of the keys adds the sum of the query's features."""
    run = chunks(lambda q, z, c: 1.0 / (dot(q, z + 1e-2) if early else dot(q, z) + 1e-6))
    report = assert_rewritten(run, *heads(n), count=2, compiled=False)
    assert report.nodes_after < 70
    assert not report.near_misses


# ---------------------------------------------------------------------------------------------------- near twins


def test_another_function_for_one_chunk():
    """The normaliser of the first chunk is an attention by itself, and all that is rewritten."""
    for below in (
        lambda q, z, c: 1.0 / (dot(q, z) + (1e-3 if c == 2 else 1e-6)),
        lambda q, z, c: dot(q, z).rsqrt() if c == 2 else dot(q, z).reciprocal(),
    ):
        report = assert_rewritten(chunks(below), *heads(16), compiled=False)
        assert report.rewrites[0].length == "4"


@pytest.mark.parametrize("at", [0, 3, N - 1])
def test_another_function_for_one_token(at):
    assert_refused(tokens(lambda x, z, t: x / z.clamp(min=0.5 if t == at else 1.0)), *heads())
    assert_refused(tokens(lambda x, z, t: x if t == at else x / z), *heads())


def test_the_normaliser_of_another_row():
    """Of the row before, and of one row for all."""

    def before(q, k, v):
        state, total, outs = 0, torch.ones(1, 2, D), []
        for t in range(N):
            below = (q[:, :, t].square() * total).sum(-1, keepdim=True)
            total = total + k[:, :, t].square()
            state = state + k[:, :, t, :, None].square() * v[:, :, t, None, :]
            outs.append((q[:, :, t, :, None].square() * state).sum(-2) / below)
        return torch.stack(outs, 2)

    assert_refused(before, *heads())


def test_a_normaliser_over_all_keys():
    def run(q, k, v):
        q, k, state, outs = q.exp(), k.exp(), 0, []
        for t in range(N):
            state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
            below = (q[:, :, t] * k.sum(2)).sum(-1, keepdim=True)
            outs.append((q[:, :, t, :, None] * state).sum(-2) / below)
        return torch.stack(outs, 2)

    assert_refused(run, *heads())


def test_a_normaliser_of_another_decay_and_query():
    """It is a decayed sum of its own, whatever the other is."""

    def run(q, k, v):
        q, k, state, total, outs = q.exp(), k.exp(), 0, 0, []
        for t in range(N):
            state = state * 0.9 + k[:, :, t, :, None] * v[:, :, t, None, :]
            total = total * 0.5 + k[:, :, t]
            below = (v[:, :, t].exp() * total).sum(-1, keepdim=True)
            outs.append((q[:, :, t, :, None] * state).sum(-2) / below)
        return torch.stack(outs, 2)

    assert_rewritten(run, *heads(), count=2, compiled=False)


def test_a_normaliser_that_is_returned_too():
    def run(q, k, v):
        q, k, state, total, outs, below = q.exp(), k.exp(), 0, 0, [], []
        for t in range(N):
            state = state * 0.9 + k[:, :, t, :, None] * v[:, :, t, None, :]
            total = total * 0.9 + k[:, :, t]
            below.append((q[:, :, t] * total).sum(-1))
            outs.append((q[:, :, t, :, None] * state).sum(-2) / below[-1][..., None])
        return torch.stack(outs, 2), below[2]

    assert_rewritten(run, *heads(), count=2, compiled=False)


def test_without_gradients():
    """For autograd what is computed there is data, and of no token is it known what it is."""

    def run(q, k, v):
        q, k, state, total, outs = q.exp(), k.exp(), 0, 0, []
        for t in range(N):
            state = state * 0.9 + k[:, :, t, :, None] * v[:, :, t, None, :]
            with torch.no_grad():
                total = total * 0.9 + k[:, :, t]
                below = (q[:, :, t] * total).sum(-1, keepdim=True)
            outs.append((q[:, :, t, :, None] * state).sum(-2) / below)
        return torch.stack(outs, 2)

    assert_refused(run, *heads())


def test_a_sum_of_slices_is_data():
    """Three slices of one tensor, added up: keys like any other, whose features are theirs alone."""

    def run(q, x, v):
        k = x[:, 0] + x[:, 1] + x[:, 2]
        return (q @ k.mT).tril() @ v

    q, _, v = heads()
    x = torch.randn(1, 3, 2, N, D, requires_grad=True)
    report = assert_rewritten(run, q, x, v, compiled=False)
    assert report.rewrites[0].dk == D


def test_weights_of_slices_may_be_negative():
    def run(q, x, v, w):
        k = w[0] * x[:, 0] + w[1] * x[:, 1] + w[2] * x[:, 2] + x[:, 3]
        return (q @ k.mT).tril() @ v

    q, _, v = heads()
    x, w = torch.randn(1, 4, 2, N, D), torch.tensor([-1.0, 2.0, 3.0])
    torch._dynamo.reset()
    report = explain(run)(q, x, v, w)
    assert len(report.rewrites) <= 1


# ---------------------------------------------------------------------------------------- a number for each token

NUMBERS = {
    "mean": lambda x, z, t: x / (t + 1),
    "root": lambda x, z, t: x * (t + 1) ** -0.5,
    "count, not of the first": lambda x, z, t: x / max(t, 1),
    "signs": lambda x, z, t: x * (-1) ** t,
}


@pytest.mark.parametrize("n", [3, 9])
@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_of_each_token(number, decay, n):
    assert_rewritten(tokens(NUMBERS[number], decay), *heads(n), compiled=False)


def test_a_number_of_each_token_beside_gates():
    def run(q, k, v, g):
        state, outs = torch.zeros(1, 2, D, D), []
        for t in range(N):
            state = state * torch.exp(-g[:, :, t, None, None]) + k[:, :, t, :, None] * v[:, :, t, None, :]
            outs.append((q[:, :, t, :, None] * state / (t + 1)).sum(-2))
        return torch.stack(outs, 2)

    assert_rewritten(run, *heads(), torch.rand(1, 2, N), compiled=False)


def test_a_number_of_the_state_before_alone():
    """The token itself is not divided: two sums with numbers of their own."""

    def run(q, k, v):
        state, outs = torch.zeros(1, 2, D, D), []
        for t in range(N):
            new = k[:, :, t, :, None] * v[:, :, t, None, :]
            outs.append((q[:, :, t, :, None] * (state / (t + 1) + new)).sum(-2))
            state = state + new
        return torch.stack(outs, 2)

    assert_refused(run, *heads())


def test_weights_beyond_fp64_are_no_fault_of_the_analysis():
    """Of the oldest token, where the newest's do not make the tokens one form: each is read by another's query."""

    def run(q, k, v):
        state, outs = torch.zeros(1, 2, D, D), []
        for t in range(N):
            state = state * 1e200 + k[:, :, t, :, None] * v[:, :, t, None, :]
            outs.append((q[:, :, 5 * t % N, :, None] * state).sum(-2) / (t + 1))
        return torch.stack(outs, 2)

    report = explain(run)(*heads())
    assert not report.rewrites and [m.obligation for m in report.near_misses] == ["single-term"], report

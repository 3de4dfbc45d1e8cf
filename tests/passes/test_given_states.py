"""Sums and their normalisers that start from a given state, as a prefill behind a cache does; and near twins."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lacompile import explain
from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D, E = 1, 2, 12, 4, 3


def arguments():
    return [*qkv(B, H, N, D, E), *(torch.rand(B, H, D, *e, requires_grad=True) for e in ((E,), ()))]


FEATURES = {"exp": torch.exp, "elu": lambda x: F.elu(x) + 1}


def running_sums(features):
    def run(q, k, v, s, z):
        q, k = features(q), features(k)
        s = s[:, :, None] + (k[..., None] * v[..., None, :]).cumsum(2)
        z = z[:, :, None] + k.cumsum(2)
        below = torch.einsum("bhnd,bhnd->bhn", q, z)[..., None] + 1e-6
        return torch.einsum("bhnd,bhnde->bhne", q, s) / below, s[:, :, -1]

    return run


def chunks(features, query=lambda q: q, size=4):
    def run(q, k, v, s, z):
        q, k, out = features(q), features(k), []
        for qc, kc, vc in zip(*(x.split(size, 2) for x in (q, k, v)), strict=True):
            scores = (qc @ kc.mT).tril()
            above = scores @ vc + query(qc) @ s
            below = scores.sum(-1, keepdim=True) + query(qc) @ z[..., None]
            out.append(above / (below + 1e-6))
            s, z = s + kc.mT @ vc, z + kc.sum(2)
        return torch.cat(out, 2), s

    return run


@pytest.mark.parametrize("form", [running_sums, chunks])
def test_features_by_exp(form):
    report = assert_rewritten(form(FEATURES["exp"]), *arguments(), count=2, compiled=False)
    assert all(r.initial_state for r in report.rewrites)
    assert any(r.final_state for r in report.rewrites)


def test_other_features():
    report = assert_rewritten(running_sums(FEATURES["elu"]), *arguments(), count=2, compiled=False)
    assert all(r.initial_state for r in report.rewrites)


@pytest.mark.parametrize("size", [5, 7])
def test_a_last_chunk_that_is_shorter(size):
    assert_rewritten(chunks(FEATURES["exp"], size=size), *arguments(), count=2, compiled=False)


def test_a_state_read_by_another_query():
    """What the state is multiplied by must be what the keys are."""
    torch._dynamo.reset()
    run = chunks(FEATURES["exp"], lambda q: q * q)
    assert not any(r.initial_state for r in explain(run)(*arguments()).rewrites)


def test_a_state_that_is_read_once_more():
    """Its features of both kinds beside every position are no small thing to add."""

    def run(q, k, v, s, z):
        q, k = q.exp(), k.exp()
        sums = s[:, :, None] + (k[..., None] * v[..., None, :]).cumsum(2)
        return torch.einsum("bhnd,bhnde->bhne", q, sums) + torch.einsum("bhnd,bhde->bhne", q * q, s) * z.sum()

    report = assert_rewritten(run, *arguments(), count=1, compiled=False)
    assert report.rewrites[0].initial_state


def test_keys_of_the_state_before():
    """A delta rule that starts from a state is no more than its steps."""

    def run(q, k, v, s, z):
        out = []
        for t in range(6):
            error = v[:, :, t] - torch.einsum("bhd,bhde->bhe", k[:, :, t], s)
            s = s + k[:, :, t, :, None] * error[..., None, :]
            out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
        return torch.stack(out, 2) * z.sum()

    torch._dynamo.reset()
    assert all(r.length == "1" for r in explain(run)(*arguments()).rewrites)


DECAYS = {
    "none": lambda x, t: torch.ones_like(x[..., t, :1]),
    "a number": lambda x, t: torch.full_like(x[..., t, :1], 0.9),
    "a gate": lambda x, t: torch.sigmoid(x[..., t, :1]),
}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("given", ["both", "the normaliser's"])
def test_states_of_a_token_loop(decay, given):
    """z = a z + k is data for one token, and for several a sum that begins with what came in."""

    def run(q, k, v, s, z):
        s, out = s if given == "both" else torch.zeros_like(s), []
        q, k = torch.exp(q), torch.exp(k)
        for t in range(N):
            a = DECAYS[decay](v, t)
            s = a[..., None] * s + k[:, :, t, :, None] * v[:, :, t, None]
            z = a * z + k[:, :, t]
            below = torch.einsum("bhd,bhd->bh", q[:, :, t], z)[..., None]
            out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s) / (below + 1e-6))
        return torch.stack(out, 2)

    report = assert_rewritten(run, *arguments(), count=2, compiled=False)
    assert sum(r.initial_state for r in report.rewrites) == (2 if given == "both" else 1)


def test_a_skip_connection_beside_a_given_state():
    """x D of a chunk's own tokens is no state that decays by D."""

    def run(q, k, v, s, z):
        out = []
        for a in range(0, N, 4):
            x, y, u = (t[:, :, a : a + 4] for t in (q, k, v))
            out.append((x @ y.mT).tril() @ u + x @ s + u * z[:, :, :1, None])
            s = s + y.mT @ u
        return torch.cat(out, 2)

    q, k, v, s, z = arguments()
    assert_rewritten(run, q, k, v, s, (z.detach() - 0.5).requires_grad_(), compiled=False)


@pytest.mark.parametrize("copied", ["before", "after"])
def test_a_final_state_that_is_copied_without_gradients(copied):
    """One call makes outputs and state: where gradients are recorded for the outputs."""

    def run(q, k, v, s, z):
        out, kept = [], None
        for t in range(N):
            s = 0.9 * s + k[:, :, t, :, None] * v[:, :, t, None]
            out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
        if copied == "before":
            with torch.no_grad():
                kept = s * 1
        o = torch.stack(out, 2)
        if copied == "after":
            with torch.no_grad():
                kept = s * 1
        return o, kept

    report = assert_rewritten(run, *arguments(), compiled=False)
    assert report.rewrites[0].final_state


def products_of_all_chunks(q, k, v, s, read=lambda c: c):
    """The states alone are walked through; what each chunk adds to them was computed for all chunks at once."""
    q, k, v = (x.unflatten(2, (-1, 4)) for x in (q, k, v))
    within, added, out = (q @ k.mT).tril() @ v, k.mT @ v, []
    for c in range(N // 4):
        out.append(within[:, :, c] + q[:, :, c] @ s)
        s = s + added[:, :, read(c)]
    return torch.stack(out, 2).flatten(2, 3)


def test_products_of_all_chunks():
    report = assert_rewritten(products_of_all_chunks, *arguments()[:4], compiled=False)
    assert report.rewrites[0].initial_state


def test_a_chunk_that_is_added_twice_is_left_alone():
    """In place of the second one the first is added once more."""
    assert_refused(lambda *args: products_of_all_chunks(*args, read=lambda c: max(c - 1, 0)), *arguments()[:4])


def square(first=1, last=N - 1, rate=0.3, query=lambda q: q):
    """A prefill behind a cache: a masked square, and the rows and the next state that the cache adds to."""

    def run(q, k, v, s, z):
        at = torch.arange(N)
        weights = torch.exp(-0.3 * (at[:, None] - at)).masked_fill(at[:, None] < at, 0)
        out = (q @ k.mT * weights) @ v + query(q) * torch.exp(-rate * (at + first))[:, None] @ s
        kept = (k * torch.exp(-0.3 * (last - at))[:, None]).mT @ v
        return out, kept + math.exp(-0.3 * N) * s + 0 * z[..., None]

    return run


def test_a_square_behind_a_cache():
    report = assert_rewritten(square(), *arguments(), count=1, compiled=False)
    assert report.rewrites[0].initial_state and report.rewrites[0].final_state


OTHERWISE = {
    "a token early": square(first=0),
    "a token late": square(first=2),
    "another rate": square(rate=0.2),
    "another query": square(query=torch.cos),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_cache_that_is_read_otherwise(name):
    """Of these the square alone is the operator's, or its state is not the cache as it stands."""
    report = assert_rewritten(OTHERWISE[name], *arguments(), count=1, compiled=False)
    assert report.rewrites[0].initial_state == name.startswith("a token")


def test_a_next_state_that_decays_otherwise():
    report = assert_rewritten(square(last=N), *arguments(), count=1, compiled=False)
    assert report.rewrites[0].initial_state and not report.rewrites[0].final_state


def less_each_token(update):
    """A loop with a gate for each token, from a state that is given; ``update`` is of that and an outer product."""

    def run(q, k, v, s, gates):
        out = []
        for t in range(N):
            s = update(s * torch.sigmoid(gates[:, :, t, None, None]), k[:, :, t, :, None] * v[:, :, t, None])
            out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
        return torch.stack(out, 2), s

    return run


LESS = {
    "taken away": lambda s, new: s - new,
    "added less": lambda s, new: s + -new,
    "a part taken away": lambda s, new: s - 0.3 * new,
}


@pytest.mark.parametrize("update", LESS.values(), ids=LESS)
def test_tokens_are_taken_away_from_a_state(update):
    gates = torch.randn(B, H, N, requires_grad=True)
    report = assert_rewritten(less_each_token(update), *arguments()[:4], gates, compiled=False)
    assert report.rewrites[0].initial_state and report.rewrites[0].final_state


def test_a_state_that_changes_its_sign_is_left_alone():
    gates = torch.randn(B, H, N, requires_grad=True)
    assert_refused(less_each_token(lambda s, new: new - s), *arguments()[:4], gates)


def one_token(queries, read=lambda q, old, new: q @ (old + new)):
    """A step of decoding; ``read`` is what the queries make of the decayed state and of the token's own part."""

    def run(q, k, v, s, g):
        old, new = torch.sigmoid(g)[..., None, None] * s, k.mT @ v
        return read(queries(q), old, new), old + new

    return run


ONE_TOKEN = [
    one_token(lambda q: q * D**-0.5),
    one_token(lambda q: q / 3),
    one_token(lambda q: q, lambda q, old, new: 0.25 * (q @ (old + new))),
    one_token(lambda q: 2 * q, lambda q, old, new: q @ old + q @ new),
    one_token(lambda q: -2 * q),
    one_token(lambda q: q, lambda q, old, new: (q @ (0.9 * old + new)) * 0.5),
]


def step():
    q, k, v = qkv(B, H, 1, D, E)
    return [q, k, v, torch.randn(B, H, D, E, requires_grad=True), torch.randn(B, H, requires_grad=True)]


@pytest.mark.parametrize("run", ONE_TOKEN)
def test_queries_of_one_token_are_scaled(run):
    report = assert_rewritten(run, *step(), compiled=False)
    assert report.rewrites[0].initial_state and report.rewrites[0].length == "1"


OTHER_TOKEN = [
    one_token(lambda q: q, lambda q, old, new: q @ old + 0.5 * (q @ new)),  # the state grows beside its token
    one_token(lambda q: q, lambda q, old, new: q @ old - q @ new),
    one_token(lambda q: q, lambda q, old, new: q @ old + (2 * q + 1) @ new),
]


@pytest.mark.parametrize("run", OTHER_TOKEN)
def test_one_token_that_is_weighed_by_itself(run, without_inductor):
    """The numbers are right whatever is found."""
    args = step()
    torch._dynamo.reset()
    made = torch.compile(run, backend="lightning", options={"validate": "off"})
    for got, want in zip(made(*args), run(*args), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def one_for_all(given, gate):
    """A learned state that all sequences begin from, which a gate of each weighs."""

    def run(q, k, v, s, g):
        s, a, out = given(s, q.shape[0]), torch.sigmoid(g), []
        for t in range(N):
            s = gate(a[:, :, t]) * s + k[:, :, t, :, None] * v[:, :, t, None]
            out.append((q[:, :, t, :, None] * s).sum(2))
        return torch.stack(out, 2)

    return run


BY_TOKEN = [lambda a: a[:, :, :1, None], lambda a: torch.exp(-a[:, :, :1, None])]
GIVEN = {
    "expand": lambda s, b: s.expand(b, -1, -1, -1),
    "repeat": lambda s, b: s.repeat(b, 1, 1, 1),
    "as it is": lambda s, b: s,
}


@pytest.mark.parametrize("gate", BY_TOKEN)
@pytest.mark.parametrize("given", GIVEN)
def test_a_state_for_all_sequences(given, gate):
    q, k, v = (torch.randn(2, H, N, n, requires_grad=True) for n in (D, D, E))
    s, g = torch.randn(H, D, E, requires_grad=True), torch.randn(2, H, N, D, requires_grad=True)
    report = assert_rewritten(one_for_all(GIVEN[given], gate), q, k, v, s, g, compiled=False)
    assert report.rewrites[0].initial_state


def test_a_gate_for_each_feature_of_a_state_for_all_sequences():
    q, k, v = (torch.randn(2, H, N, n) for n in (D, D, E))
    run = one_for_all(GIVEN["expand"], lambda a: a[..., None])
    assert_refused(run, q, k, v, torch.randn(H, D, E), torch.randn(2, H, N, D), options={"validate": "off"})

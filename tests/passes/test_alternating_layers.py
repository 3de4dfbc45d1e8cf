"""Layers that take turns in one loop over tokens, each with a state of its own; and near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lacompile.testing import assert_refused, assert_rewritten

B, N, H, D = 2, 6, 2, 4
C = H * D
UNSEEN = {"validate": "off"}


class Layer(nn.Module):
    def __init__(self, normed=True, bias=False, gated=False, mlp=False):
        super().__init__()
        self.norm = nn.LayerNorm(C) if normed else nn.Identity()
        self.q, self.k, self.v, self.o = (nn.Linear(C, C, bias=bias) for _ in range(4))
        self.gate = nn.Linear(C, H) if gated else None
        self.mlp = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 12), nn.GELU(), nn.Linear(12, C)) if mlp else None

    def forward(self, x, state, rate=0.9):
        z, batch = self.norm(x), x.shape[0]
        q, k, v = (w(z).view(batch, H, D) for w in (self.q, self.k, self.v))
        if self.gate is not None:
            rate = self.gate(z).sigmoid()[..., None, None]
        state = rate * state + k[..., None] * v[..., None, :]
        x = x + self.o(torch.einsum("bhd,bhde->bhe", q, state).reshape(batch, C))
        return (x if self.mlp is None else x + self.mlp(x)), state


class Model(nn.Module):
    def __init__(self, count=2, written=False, returns_states=False, **kind):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(**kind) for _ in range(count))
        self.written, self.returns_states = written, returns_states

    def forward(self, x):
        states, out, into = [x.new_zeros(x.shape[0], H, D, D) for _ in self.layers], [], torch.empty_like(x)
        for t in range(x.shape[1]):
            y = x[:, t]
            for n, layer in enumerate(self.layers):
                y, states[n] = layer(y, states[n])
            if self.written:
                into[:, t] = y
            out.append(y)
        y = into if self.written else torch.stack(out, 1)
        return (y, *states) if self.returns_states else y


def data(length=N, batch=B):
    torch.manual_seed(1)
    return torch.randn(batch, length, C, requires_grad=True)


KINDS = {
    "of projections alone": {"normed": False},
    "with biases": {"bias": True},
    "with a network behind": {"mlp": True, "gated": True},
    "written into place": {"written": True},
    "whose states are returned": {"returns_states": True},
    "three, with networks": {"count": 3, "mlp": True},
}


@pytest.mark.parametrize("name", KINDS)
def test_each_of_them_is_found(name):
    kind = KINDS[name]
    report = assert_rewritten(Model(**kind), data(), count=kind.get("count", 2), compiled=False)
    assert not report.near_misses


def test_compiled():
    assert_rewritten(Model(gated=True), data(), count=2)


@pytest.mark.parametrize(("length", "count"), [(1, 0), (2, 0), (3, 2), (4, 2)])
def test_few_tokens(length, count):
    assert_rewritten(Model(), data(length), count=count, compiled=False, options=UNSEEN)


def test_a_batch_of_any_size():
    after = (data(batch=3).detach(),)
    assert_rewritten(Model(), data(batch=5), count=2, compiled=False, after=after)


def step(between=lambda t, x, h, s: h, before=lambda t, x, last, s: x[:, t], rate=lambda n, t: 0.9, behind=None):
    """Two layers in a loop, with something done before the first, between them, or behind the second."""

    class Twin(Model):
        def forward(self, x):
            first, second = self.layers
            states, out, last = [x.new_zeros(B, H, D, D)] * 2, [], torch.zeros_like(x[:, 0])
            x = x * 1.0
            for t in range(N):
                h, states[0] = first(before(t, x, last, states), states[0], rate(0, t))
                h = between(t, x, h, states)
                last, states[1] = second(h, states[1], rate(1, t))
                if behind is not None:
                    behind(t, x, h, last)
                out.append(last)
            return torch.stack(out, 1)

    return Twin()


def test_more_that_is_done_to_each_token():
    model = step(between=lambda t, x, h, s: F.silu(h) + x[:, t])
    assert_rewritten(model, data(), count=2, compiled=False)


def fed_back(t, x, h, last):
    if t + 1 < N:
        x[:, t + 1] += last


TWINS = {
    "the first reads what the second left": step(before=lambda t, x, last, s: x[:, t] + last),
    "the first reads the second's state": step(before=lambda t, x, last, s: x[:, t] + s[1].sum((1, 2)).repeat(1, H)),
    "through memory": step(behind=fed_back),
    "the input is written": step(behind=lambda t, x, h, last: x.mul_(0.9)),
}


@pytest.mark.parametrize("name", TWINS)
def test_layers_that_need_each_other(name):
    assert_refused(TWINS[name], data(), options=UNSEEN)


def test_a_result_that_is_written_before_the_second_layer_reads_it():
    """Nothing can be cut there; what the first layer reads of its state, before it is projected, is an attention."""
    model = step(between=lambda t, x, h, s: h.mul_(0.5))
    assert_rewritten(model, data(), count=1, compiled=False, options=UNSEEN)


def test_a_result_that_is_written_behind_the_second_layer():
    """Eager does not differentiate it."""
    model = step(behind=lambda t, x, h, last: h.mul_(2))
    assert_rewritten(model, data(), count=1, grads=False, compiled=False, options=UNSEEN)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_token_that_decays_otherwise(layer):
    """The other layer is an attention still."""
    model = step(rate=lambda n, t: 0.5 if (n, t) == (layer, 3) else 0.9)
    assert_rewritten(model, data(), count=1, compiled=False, options=UNSEEN)


def test_what_draws_random_numbers_stays_where_it_is():
    assert_refused(step(between=lambda t, x, h, s: F.dropout(h, 0.5)), data(), options=UNSEEN)


def test_a_part_without_gradients():
    def between(t, x, h, s):
        with torch.no_grad():
            more = 2 * h
        return h + more

    assert_rewritten(step(between=between), data(), count=0, compiled=False, options=UNSEEN)


def test_results_that_are_returned_one_by_one():
    class Returned(Model):
        def forward(self, x):
            first, second = self.layers
            states, out, between = [x.new_zeros(B, H, D, D)] * 2, [], []
            for t in range(N):
                h, states[0] = first(x[:, t], states[0])
                y, states[1] = second(h, states[1])
                out.append(y)
                between.append(h)
            return torch.stack(out, 1), *between

    assert_rewritten(Returned(), data(), count=1, compiled=False, options=UNSEEN)


class Bare(nn.Module):
    """What a layer reads is its result: projections stand before the state alone, where they are not ``between``."""

    def __init__(self, between=None, residual=False, gated=False, normed=False, count=2, read="einsum", starts="zeros"):
        super().__init__()
        torch.manual_seed(0)
        self.projections = nn.ModuleList(nn.ModuleList(nn.Linear(C, C) for _ in range(3)) for _ in range(count))
        self.gates = nn.ModuleList(nn.Linear(C, 1) for _ in range(count)) if gated else None
        self.between, self.residual, self.normed, self.read, self.starts = between, residual, normed, read, starts

    def rate(self, n, x, t):
        return 0.9 if self.gates is None else self.gates[n](x).sigmoid()[..., None]

    def given(self, n, h, t, states):
        return h

    def layer(self, n, h, state, t):
        x = F.layer_norm(h, (C,)) if self.normed else h
        q, k, v = (w(x) for w in self.projections[n])
        new = k[..., None] * v[:, None]
        state = new if state is None else self.rate(n, x, t) * state + new
        if self.read == "einsum":
            y = torch.einsum("bd,bde->be", q, state)
        else:
            y = (q[:, None] @ state)[:, 0] if self.read == "matmul" else (q[..., None] * state).sum(1)
        return (h + y if self.residual else y), state

    def forward(self, x):
        zeros = None if self.starts == "nothing" else x.new_zeros(x.shape[0], C, C)
        states, out = [zeros] * len(self.projections), []
        for t in range(x.shape[1]):
            h = x[:, t]
            for n in range(len(states)):
                h, states[n] = self.layer(n, self.given(n, h, t, states), states[n], t)
                h = self.between(h) if self.between is not None and n + 1 < len(states) else h
            out.append(h)
        return torch.stack(out, 1)


BARE = {
    "as it is": {},
    "read by a product": {"read": "matmul"},
    "read by a sum": {"read": "sum"},
    "a function between them": {"between": F.gelu},
    "a norm between them": {"between": lambda h: F.layer_norm(h, (C,))},
    "residuals": {"residual": True},
    "gates, norms and residuals": {"gated": True, "normed": True, "residual": True},
    "states that are nothing at first": {"starts": "nothing"},
    "three": {"count": 3, "residual": True, "normed": True},
}


@pytest.mark.parametrize("name", BARE)
def test_a_last_layer_without_a_projection_behind_it(name):
    report = assert_rewritten(Bare(**BARE[name]), data(), count=BARE[name].get("count", 2), compiled=False)
    assert not report.near_misses


class Narrowing(Bare):
    """A projection stands behind the first layer's result, and none behind the second's."""

    def __init__(self, between):
        super().__init__(between)
        self.up = nn.Linear(C, C)

    def given(self, n, h, t, states):
        return self.up(h) if n else h


@pytest.mark.parametrize("between", [None, F.gelu])
def test_a_first_layer_with_a_projection_behind_it(between):
    """The graph in which the last layer alone is found, in fewer pieces, is not the better one."""
    assert_rewritten(Narrowing(between), data(), count=2, compiled=False)


class FedBack(Bare):
    def given(self, n, h, t, states):
        return h if n else h + states[1].sum(-1)


class ReadsTheFirstState(Bare):
    """What the second layer is given depends on the first's state: of this step, which is one more value there."""

    def given(self, n, h, t, states):
        return h + states[0].sum(-1) if n else h


class Late(Bare):
    """The second layer reads what the first left of the step before."""

    def forward(self, x):
        states, out, last = [x.new_zeros(B, C, C)] * 2, [], torch.zeros_like(x[:, 0])
        for t in range(N):
            h, states[0] = self.layer(0, x[:, t], states[0], t)
            y, states[1] = self.layer(1, last, states[1], t)
            last = h
            out.append(y)
        return torch.stack(out, 1)


class OfALaterStep(Bare):
    """The second layer walks behind the first: it reads the first's result of the next token, and that one's state."""

    def forward(self, x):
        first, states, out = x.new_zeros(B, C, C), [], []
        for t in range(N):
            h, first = self.layer(0, x[:, t], first, t)
            states.append((h, first))
        second = torch.zeros_like(first)
        for t in range(N):
            h, state = states[min(t + 1, N - 1)]
            y, second = self.layer(1, h + state.sum(-1), second, t)
            out.append(y)
        return torch.stack(out, 1)


def test_a_last_layer_that_the_first_one_needs():
    """Neither can run before the other."""
    assert_refused(FedBack(), data(), options=UNSEEN)


@pytest.mark.parametrize("kind", [ReadsTheFirstState, Late, OfALaterStep])
def test_a_last_layer_of_more_than_the_first_ones_result(kind):
    """Whatever is found of it is right."""
    assert_rewritten(kind(), data(), count=None, compiled=False, options=UNSEEN)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_token_that_a_bare_layer_lets_decay_otherwise(layer):
    class Uneven(Bare):
        def rate(self, n, x, t):
            return torch.exp(x.mean()) if (n, t) == (layer, 3) else 0.9

    assert_rewritten(Uneven(residual=True, normed=True), data(), count=None, compiled=False, options=UNSEEN)


def test_a_last_layer_that_cannot_be_told_apart_hides_no_other():
    """The second and the third need each other; the first needs neither."""

    class Bound(Bare):
        def given(self, n, h, t, states):
            return h + 0.1 * states[2].sum(-1) if n == 1 else h

    report = assert_rewritten(Bound(count=3, normed=True), data(), count=None, compiled=False, options=UNSEEN)
    assert len(report.rewrites) >= 1

"""Projections without a bias of what is a product itself, as a norm times its weight is; near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lacompile import explain
from lacompile.testing import assert_refused, assert_rewritten

B, N, H, D = 2, 12, 2, 4
C = H * D


def rms(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def shifted(x):
    return F.pad(x, (0, 0, 1, 0))[:, :-1]


PRODUCTS = {
    "norm and weight": lambda x, w: w * rms(x),
    "norm and one more than the weight": lambda x, w: F.rms_norm(x, (C,)) * (1 + w),
    "norm of another format": lambda x, w: rms(x.double()).type_as(x) * w,
    "direction": lambda x, w: F.normalize(x, dim=-1) * w,
    "affine norm": lambda x, w: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt() * w + w,
    "gate of each feature": lambda x, w: x * torch.sigmoid(x * w),
    "gate of each token": lambda x, w: x * x[..., :1].sigmoid() * w,
    "tokens that are left out": lambda x, w: x * (x[..., :1] > 0),
    "token before": lambda x, w: x * w + shifted(x) * (1 - w),
    "weight of several layers": lambda x, w: rms(x) * torch.stack([w, w])[1],
}


def heads(y):
    return y.view(B, N, H, D).transpose(1, 2)


def chunks(q, k, v, g, size=4):
    state, out = q.new_zeros(B, H, D, D), []
    for a in range(0, N, size):
        q_c, k_c, v_c, c = q[:, :, a : a + size], k[:, :, a : a + size], v[:, :, a : a + size], g[:, :, a : a + size]
        c = c.cumsum(-1)
        inside = (c[..., None] - c[..., None, :]).tril().exp().tril()
        out.append((q_c @ k_c.mT * inside) @ v_c + (q_c * c.exp()[..., None]) @ state)
        state = state * c[..., -1, None, None].exp() + (k_c * (c[..., -1:] - c).exp()[..., None]).mT @ v_c
    return torch.cat(out, 2)


def batched_chunks(q, k, v, g, size=4):
    q, k, v, c = (y.unflatten(2, (-1, size)) for y in (q, k, v, g))
    c = c.cumsum(-1)
    within = (q @ k.mT * (c[..., None] - c[..., None, :]).tril().exp().tril()) @ v
    states = (k * (c[..., -1:] - c).exp()[..., None]).mT @ v
    ends = F.pad(c[..., -1], (1, 0)).cumsum(-1)
    n = ends.shape[-1]
    above = torch.ones(n, n).triu(1).bool()
    decays = (ends[..., :, None] - ends[..., None, :]).masked_fill(above, -torch.inf).exp()
    states = torch.cat([torch.zeros_like(states[:, :, :1]), states], 2)
    before = torch.einsum("bhzc,bhcde->bhzde", decays, states)[:, :, :-1]
    return (within + (q * c.exp()[..., None]) @ before).flatten(2, 3)


def tokens(q, k, v, g):
    state, out = q.new_zeros(B, H, D, D), []
    for t in range(N):
        state = g[:, :, t, None, None].exp() * state + k[:, :, t, :, None] * v[:, :, t, None]
        out.append(q[:, :, t, None] @ state)
    return torch.cat(out, 2)


def square(q, k, v, g):
    c = g.cumsum(-1)
    return (q @ k.mT * (c[..., None] - c[..., None, :]).tril().exp().tril()) @ v


FORMS = [chunks, batched_chunks, tokens, square]


class Layer(nn.Module):
    def __init__(self, product, form):
        super().__init__()
        torch.manual_seed(0)
        self.product, self.form = product, form
        self.weight = nn.Parameter(torch.rand(C))
        self.projections = nn.ModuleList(nn.Linear(C, C, bias=False) for _ in range(3))
        self.gates = nn.Linear(C, H)

    def forward(self, x):
        y = self.product(x, self.weight)
        return self.form(*(heads(p(y)) for p in self.projections), F.logsigmoid(self.gates(y)).transpose(1, 2))


BY_TURNS = [(name, FORMS[(a + b) % 4]) for a, name in enumerate(PRODUCTS) for b in (0, 1)]
"""Each product in two of the forms, and each form with five products."""


@pytest.mark.parametrize(("name", "form"), BY_TURNS)
def test_is_one_tensor(name, form):
    assert_rewritten(Layer(PRODUCTS[name], form), torch.randn(B, N, C, requires_grad=True), compiled=False)


def of_a_layer(form, layer=0):
    """Weights of all layers in one tensor each, and given."""

    def run(x, w, projections, g):
        y = rms(x) * w[layer]
        return form(*(heads(y @ m) for m in projections[layer]), F.logsigmoid(g))

    return run


def given():
    torch.manual_seed(0)
    made = torch.randn(B, N, C), torch.rand(3, C), torch.randn(3, 3, C, C), torch.randn(B, H, N)
    return [y.requires_grad_() for y in made]


@pytest.mark.parametrize("form", FORMS)
def test_matrices_of_several_layers_in_one_argument(form):
    assert_rewritten(of_a_layer(form, layer=1), *given(), compiled=False)


@pytest.mark.parametrize("form", FORMS)
def test_matrices_of_one_argument_by_a_product_with_all(form):
    def run(x, projections, g):
        return form(*map(heads, torch.einsum("btc,ice->ibte", x, projections)), F.logsigmoid(g))

    x, _, projections, g = given()
    assert_rewritten(run, x, projections[0].detach().requires_grad_(), g, compiled=False)


@pytest.mark.parametrize("form", [chunks, tokens])
def test_as_many_matrices_as_tokens(form):
    """Each is a layer's, though it could be a token's: a miss would be right too, another result not."""

    def run(x, projections, g):
        return form(*(heads(x @ projections[n]) for n in range(3)), F.logsigmoid(g))

    x, _, projections, g = given()
    many = torch.cat([projections.flatten(0, 1)] * 2)[:N].detach().requires_grad_()
    assert_rewritten(run, x, many, g, count=1 if form is chunks else 0, compiled=False)


def test_queries_that_are_weighed_are_no_projection_of_the_keys():
    def run(x, w, projections, g):
        q, k, v = (heads(x @ m) for m in projections[0])
        return square(q * w[0, :D], k, v, F.logsigmoid(g))

    assert_rewritten(run, *given(), compiled=False)


def test_a_state_of_other_keys_is_refused():
    """What goes into the state is projected without the weight that the keys of a chunk have."""

    def run(x, w, projections, g):
        (q, k, v), others = ([heads(y @ m) for m in projections[0]] for y in (rms(x) * w[0], rms(x)))
        g, state, out = F.logsigmoid(g), q.new_zeros(B, H, D, D), []
        for a in range(0, N, 4):
            q_c, k_c, v_c, o_c, c = (y[:, :, a : a + 4] for y in (q, k, v, others[1], g))
            c = c.cumsum(-1)
            inside = (c[..., None] - c[..., None, :]).tril().exp().tril()
            out.append((q_c @ k_c.mT * inside) @ v_c + (q_c * c.exp()[..., None]) @ state)
            state = state * c[..., -1, None, None].exp() + (o_c * (c[..., -1:] - c).exp()[..., None]).mT @ v_c
        return torch.cat(out, 2)

    assert_refused(run, *given())


def test_a_matrix_that_is_another_one_in_each_step():
    """The keys of a token are projected by its own matrix: another tensor than that of any one projection."""

    def run(x, w, projections, g):
        q, k, v = (heads(x @ m) for m in projections[0])
        k = torch.stack([(x[:, t] * w[t % 3]) @ projections[t % 3, 1] for t in range(N)], 1)
        return square(q, heads(k), v, F.logsigmoid(g))

    assert_rewritten(run, *given(), compiled=False)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_told_of_matrices_that_are_computed(form):
    """A function of a given matrix holds no pairs of positions."""

    def run(x, m, g):
        return form(heads(x @ (m[0] + 1)), heads(x @ m[1].T), heads(x @ (m[2] * m[0])), F.logsigmoid(g))

    x, _, projections, g = given()
    report = assert_rewritten(run, x, projections[0].detach().requires_grad_(), g, compiled=False)
    assert not report.near_misses


def test_sums_of_other_factors_are_told_as_that():
    """No border is at fault: positions are added before the projection, and each product of parts is a sum."""

    def run(x, w, projections, g):
        y = x + torch.arange(N)[:, None] * w[0]
        return chunks(*(heads(y @ m) for m in projections[0]), F.logsigmoid(g))

    (miss,) = explain(run)(*given()).near_misses
    assert "same factors" in str(miss) and "borders" not in str(miss)

"""Sums over the features of each head inside exponents: norms in feature maps, and gates that are added up."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lacompile.testing import assert_refused, assert_rewritten

B, H, D, E, M = 2, 2, 4, 3, 5
OFF = {"validate": "off"}


def flat(n: int, *widths: int) -> list[Tensor]:
    """Tokens of all heads' features side by side."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, n, H * w, generator=generator).requires_grad_() for w in widths]


def directions() -> Tensor:
    return torch.randn(D, M, generator=torch.Generator().manual_seed(1))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


def half_norm(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True) / 2


FEATURES = {
    "positive": lambda x, w: torch.exp(x @ w - half_norm(x)),
    "above zero": lambda x, w: torch.exp(x @ w - half_norm(x)) / M**0.5 + 1e-4,
    "a product by itself": lambda x, w: torch.exp(x @ w - (x * x).sum(-1, keepdim=True) / 2),
    "sine and cosine": lambda x, w: (-half_norm(x)).exp() * torch.cat([(x @ w).sin(), (x @ w).cos()], -1),
    "norm of a part": lambda x, w: torch.exp(x @ w - half_norm(x[..., :2])),
}


def in_parallel(q, k, v):
    return (q @ k.mT).tril() @ v


def by_running_sums(q, k, v):
    return torch.einsum("bhnm,bhnme->bhne", q, torch.einsum("bhnm,bhne->bhnme", k, v).cumsum(2))


def by_chunks(q, k, v):
    state, out = 0, []
    for one, two, three in zip(q.split(4, 2), k.split(4, 2), v.split(4, 2), strict=True):
        out.append(in_parallel(one, two, three) + (one @ state if out else 0))
        state = state + two.mT @ three
    return torch.cat(out, 2)


def by_tokens(q, k, v):
    state, out = q.new_zeros(B, H, q.shape[-1], E), []
    for t in range(q.shape[2]):
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None] @ state).squeeze(-2))
    return torch.stack(out, 2)


def attention(features, form):
    def f(q, k, v, w):
        q, k, v = map(heads, (q, k, v))
        return form(features(q, w), features(k, w), v)

    return f


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("form", [in_parallel, by_running_sums])
def test_feature_maps_with_a_norm(name, form):
    assert_rewritten(attention(FEATURES[name], form), *flat(9, D, D, E), directions(), compiled=False)


@pytest.mark.parametrize("form", [by_chunks, by_tokens])
def test_feature_maps_with_a_norm_in_loops(form):
    assert_rewritten(attention(FEATURES["positive"], form), *flat(9, D, D, E), directions(), compiled=False)


def test_feature_maps_with_a_norm_at_any_length():
    before = [*flat(7, D, D, E), directions()]
    f = attention(FEATURES["positive"], in_parallel)
    assert_rewritten(f, *flat(9, D, D, E), directions(), compiled=False, after=before)


@pytest.mark.parametrize("name", FEATURES)
def test_feature_maps_with_a_norm_where_each_row_sees_the_next(name):
    f = attention(FEATURES[name], lambda q, k, v: (q @ k.mT).tril(1) @ v)
    assert_refused(f, *flat(9, D, D, E), directions(), options=OFF)


# ----------------------------------------------------------------------------------------------------------- of gates


def weighted(q, k, v, log, *, over=1.0):
    run = log.cumsum(-1)
    return (q @ k.mT * (run[..., :, None] - over * run[..., None, :]).tril().exp().tril()) @ v


GATES = {
    "sum": lambda x: heads(F.logsigmoid(x)).sum(-1),
    "mean": lambda x: heads(F.logsigmoid(x)).mean(-1),
    "sum of squares": lambda x: -heads(x).square().sum(-1),
}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("over", [1.0, 0.5])
def test_gates_that_are_summed_over_features(name, over):
    def f(q, k, v, x):
        return weighted(heads(q), heads(k), heads(v), GATES[name](x), over=over)

    if over == 1:
        assert_rewritten(f, *flat(9, D, D, E, 4), compiled=False)
    else:
        assert_refused(f, *flat(9, D, D, E, 4), options=OFF)


@pytest.mark.parametrize("name", GATES)
def test_gates_that_are_summed_over_features_in_a_loop(name):
    def f(q, k, v, x):
        state, out = q.new_zeros(B, H, D, E), []
        for t in range(q.shape[1]):
            row, key, value = (heads(y[:, t, None]).squeeze(2) for y in (q, k, v))
            decay = GATES[name](x[:, t, None]).exp()[..., None]
            state = decay * state + key[..., :, None] * value[..., None, :]
            out.append((row[..., None, :] @ state).squeeze(-2))
        return torch.stack(out, 2)

    assert_rewritten(f, *flat(6, D, D, E, 4), compiled=False)

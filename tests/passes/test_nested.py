"""An attention whose values or queries another one has made, without a projection; and near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import lacompile
from lacompile.testing import assert_refused, assert_rewritten

B, H, N, D = 2, 3, 12, 4


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, H, N, D)] * 3 + [(B, H, N)]
    return [torch.randn(*s, generator=generator, requires_grad=True) for s in shapes]


def decay(g):
    total = F.logsigmoid(g).cumsum(-1)
    return (total[..., None] - total[..., None, :]).exp().tril()


def attention(q, k, v, weights):
    return (q @ k.mT * weights) @ v


def twice(q, k, v, g):
    return attention(k, q, attention(q, k, v, decay(g)), decay(g))


def with_a_residual(q, k, v, g):
    y = attention(q, k, v, decay(g))
    return attention(k, q, y, decay(g)) + y


def of_a_residual(q, k, v, g):
    return attention(k, q, attention(q, k, v, decay(g)) + v, decay(g))


def of_a_gated_one(q, k, v, g):
    return attention(k, q, attention(q, k, v, decay(g)) * torch.sigmoid(v), decay(g))


def of_another_decay(q, k, v, g):
    i = torch.arange(N)
    return attention(k, q, attention(q, k, v, decay(g)), (0.9 ** (i[:, None] - i)).tril())


def as_keys(q, k, v, g):
    return attention(q, attention(q, k, v, decay(g)), v, decay(g))


def as_queries_and_values(q, k, v, g):
    y = attention(q, k, v, decay(g))
    return attention(y, k, y, decay(g))


def of_a_loop(q, k, v, g):
    y, state, out = attention(q, k, v, decay(g)), torch.zeros(B, H, D, D).to(q), []
    for t in range(N):
        state = 0.9 * state + q[:, :, t, :, None] * y[:, :, t, None]
        out.append((k[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(out, 2)


def the_first_without_gradients(q, k, v, g):
    with torch.no_grad():
        y = attention(q, k, v, decay(g))
    return attention(k, q, y, decay(g))


@pytest.mark.parametrize(
    "f",
    [
        twice, with_a_residual, of_a_residual, of_a_gated_one, of_another_decay, as_queries_and_values,
        the_first_without_gradients,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_two(f):
    assert_rewritten(f, *inputs(), count=2, compiled=False)


def test_of_any_length():
    assert_rewritten(twice, *inputs(), count=2, compiled=False, dynamic=True)


def test_three():
    def f(q, k, v, g):
        return attention(k, k, twice(q, k, v, g), decay(g))

    assert_rewritten(f, *inputs(), count=3, compiled=False)


def written_between(q, k, v, g):
    y = attention(q, k, v, decay(g))
    y[:, :, 3] = 0.0
    return attention(k, q, y, decay(g))


def a_shifted_one(q, k, v, g):
    y = attention(q, k, v, decay(g))
    return attention(k, q, torch.cat([torch.zeros_like(y[:, :, :1]), y[:, :, :-1]], 2), decay(g))


def of_both_sides(q, k, v, g):
    return attention(q, k, v, decay(g)).mT @ attention(k, q, v, decay(g))


@pytest.mark.parametrize("f", [written_between, a_shifted_one, of_both_sides], ids=lambda f: f.__name__)
def test_comes_out_right(f):
    assert_rewritten(f, *inputs(), count=None, compiled=False)


def all_of_the_second(q, k, v, g):
    """Rows of the second see later positions too."""
    i = torch.arange(N)
    weights = 0.9 ** (i[:, None] - i).clamp(min=-2)
    return attention(k, q, attention(q, k, v, decay(g)), weights.tril(2))


def squared_distances(q, k, v, g):
    i = torch.arange(N)
    return attention(k, q, attention(q, k, v, decay(g)), torch.exp(-0.1 * (i[:, None] - i) ** 2).tril())


@pytest.mark.parametrize("f", [all_of_the_second, squared_distances], ids=lambda f: f.__name__)
def test_one_alone(f):
    assert_rewritten(f, *inputs(), count=1, compiled=False, options={"validate": "off"})


@pytest.mark.parametrize("f", [squared_distances, as_keys, of_a_loop], ids=lambda f: f.__name__)
def test_a_miss_is_told(f):
    torch._dynamo.reset()
    report = lacompile.explain(f)(*inputs())
    assert report.near_misses, str(report)


def test_a_second_softmax_is_none():
    def f(q, k, v, g):
        return torch.softmax((k @ q.mT).masked_fill(decay(g) == 0, float("-inf")), -1) @ v

    assert_refused(f, *inputs())

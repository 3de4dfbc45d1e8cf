"""Chunks of which the last one has a single token: its dimension is one of one entry, beside those of single heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile import explain
from lacompile.testing import assert_refused, assert_rewritten

B, N, D, SIZE = 2, 13, 4, 4
WIDTH = 8


def weight(rows):
    return (torch.randn(rows, WIDTH) / WIDTH**0.5).requires_grad_()


def inputs(heads=2, keys=2):
    torch.manual_seed(0)
    return torch.randn(B, N, WIDTH, requires_grad=True), weight(heads * D), weight(keys * D), weight(keys * D)


def turned(x, start):
    angles = torch.arange(start, start + x.shape[2])[:, None] / 100 ** (torch.arange(0, D, 2) / D)
    cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1) * sin


MAPS = {
    "as they are": lambda x, start: x,
    "softmax": lambda x, start: x.softmax(-1),
    "exponentials": lambda x, start: x.exp(),
    "less the largest": lambda x, start: (x - x.amax(-1, keepdim=True)).exp(),
    "turned": turned,
    "an exponential that is turned": lambda x, start: turned(x.exp(), start),
}
RATES = {
    "a number": lambda h: torch.full((h,), -0.1),
    "of heads": lambda h: torch.log(1 - 2.0 ** (-3 - torch.arange(h))),
}


def loop(of_features=MAPS["as they are"], rate=RATES["a number"], late=0.0):
    """``late``: what the state before the last chunk decays more."""

    def run(x, *weights):
        state, out = 0.0, []
        for a in range(0, N, SIZE):
            x_c = x[:, a : a + SIZE]
            n = x_c.shape[1]
            q, k, v = (F.linear(x_c, w).view(B, n, -1, D).transpose(1, 2) for w in weights)
            q, k = of_features(q, a), of_features(k, a)
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
            upto = rate(q.shape[1])[:, None].expand(-1, n).cumsum(-1)
            above = torch.ones(n, n, dtype=torch.bool).triu(1)
            mask = (upto[..., :, None] - upto[..., None, :]).masked_fill(above, -torch.inf).exp()
            before = upto if n > 1 else upto - late
            out.append((q @ k.mT * mask) @ v + ((q * before.exp()[..., None]) @ state if a else 0.0))
            added = (k * (upto[..., -1:] - upto).exp()[..., None]).mT @ v
            state = upto[..., -1].exp()[..., None, None] * state + added if a else added
        return torch.cat(out, 2)

    return run


@pytest.mark.parametrize(
    ("name", "rate", "keys"),
    [
        ("as they are", "a number", 2),
        ("as they are", "of heads", 1),
        ("softmax", "of heads", 2),
        ("exponentials", "a number", 1),
        ("less the largest", "of heads", 1),
        ("turned", "a number", 1),
        ("turned", "of heads", 2),
        ("an exponential that is turned", "a number", 2),
        ("an exponential that is turned", "of heads", 1),
    ],
)
def test_is_a_part_of_all_tokens(name, rate, keys):
    report = assert_rewritten(loop(MAPS[name], RATES[rate]), *inputs(keys=keys), compiled=False)
    assert report.rewrites[0].length == str(N)


@pytest.mark.parametrize("name", MAPS)
def test_of_a_single_head(name):
    report = assert_rewritten(loop(MAPS[name]), *inputs(1, 1), compiled=False)
    assert report.rewrites[0].length == str(N)


def test_tokens_behind_channels():
    """As a convolution leaves them: in memory the place of a token follows its features."""

    def run(x, kernel, *weights):
        x = F.silu(F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), kernel, groups=WIDTH).transpose(1, 2))
        return loop(turned)(x, *weights)

    x, *weights = inputs()
    report = assert_rewritten(run, x, torch.randn(WIDTH, 1, 3, requires_grad=True), *weights, compiled=False)
    assert report.rewrites[0].length == str(N)


# -------------------------------------------------------------------------------------------------------------- twins


@pytest.mark.parametrize("name", MAPS)
def test_whose_state_decays_otherwise(name):
    assert_refused(loop(MAPS[name], late=0.01), *inputs())


@pytest.mark.parametrize("name", ["turned", "an exponential that is turned"])
def test_whose_token_is_turned_otherwise(name):
    """All the same it is one attention: of keys as they are."""

    def another(x, start):
        return MAPS[name](x, start + (x.shape[2] == 1))

    assert_rewritten(loop(another), *inputs(), compiled=False)


def test_whose_token_is_another_function():
    def another(x, start):
        return x.softmax(-1) if x.shape[2] > 1 else x.softmax(1)

    assert_refused(loop(another), *inputs())


# ---------------------------------------------------------------------------------- exponentials of what is given


def of_arguments(features, of_the_last=lambda x: x):
    """``of_the_last``: what else is done to the queries of the last chunk's token."""

    def run(q, k, v):
        state, total, out = torch.zeros(B, 2, D, D), torch.zeros(B, 2, D), []
        for a in range(0, N, SIZE):
            q_c, k_c, v_c = features(q[:, :, a : a + SIZE]), features(k[:, :, a : a + SIZE]), v[:, :, a : a + SIZE]
            q_c = of_the_last(q_c) if q_c.shape[2] == 1 else q_c
            o = (q_c @ k_c.mT).tril() @ v_c + q_c @ state
            out.append(o / (q_c * (total[:, :, None] + k_c.cumsum(2))).sum(-1, keepdim=True))
            state, total = state + k_c.mT @ v_c, total + k_c.sum(2)
        return torch.cat(out, 2)

    return run


def arguments():
    torch.manual_seed(0)
    return [torch.randn(B, 2, N, D, requires_grad=True) for _ in range(3)]


EXPONENTIALS = {"exp": torch.exp, "less the largest": lambda x: (x - x.amax(-1, keepdim=True)).exp()}


@pytest.mark.parametrize("name", EXPONENTIALS)
def test_exponentials_with_their_normaliser(name):
    report = assert_rewritten(of_arguments(EXPONENTIALS[name]), *arguments(), count=2, compiled=False)
    assert {r.length for r in report.rewrites} == {str(N)} and not report.near_misses


@pytest.mark.parametrize("name", EXPONENTIALS)
def test_exponentials_of_which_the_last_are_others(name):
    torch._dynamo.reset()
    report = explain(of_arguments(EXPONENTIALS[name], torch.square))(*arguments())
    assert report.near_misses and all(r.length != str(N) for r in report.rewrites)  # a chunk may be one

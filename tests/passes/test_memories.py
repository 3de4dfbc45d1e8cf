"""States of the same keys and values that decay each in its own way, read together in a loop over tokens."""

from __future__ import annotations

import pytest
import torch

from lacompile.testing import assert_refused, assert_rewritten

B, N, H, D = 2, 7, 3, 4
UNSEEN = {"validate": "off"}


def data(length=N, dtype=torch.float32, grads=True):
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, length, D, dtype=dtype) for _ in range(3))
    gates = [torch.rand(B, H, length, dtype=dtype) * 0.5 + 0.4 for _ in range(2)]
    shares = [torch.rand(H, 1, 1, dtype=dtype) + 0.1 for _ in range(2)]
    return [x.requires_grad_(grads) for x in (q, k, v, *gates, *shares)]


def loop(read, fast=lambda t, g: g, slow=lambda t, g: g, written=False):
    def forward(q, k, v, g, h, a, b, first=None, second=None):
        s, f = first, second
        if s is None:
            s = f = q.new_zeros(B, H, D, D)
        out, into = [], torch.empty_like(v)
        for t in range(q.shape[2]):
            new = k[:, :, t, :, None] * v[:, :, t, None]
            s = fast(t, g[:, :, t, None, None]) * s + new
            f = slow(t, h[:, :, t, None, None]) * f + new
            row = read(t, q[:, :, t, None], s, f, a, b)[..., 0, :]
            if written:
                into[:, :, t] = row
            out.append(row)
        return into if written else torch.stack(out, 2)

    return forward


READ = {
    "their sum": lambda t, q, s, f, a, b: q @ (s + f),
    "one after the other": lambda t, q, s, f, a, b: q @ s + q @ f,
    "a mean": lambda t, q, s, f, a, b: q @ (0.7 * s + 0.3 * f),
    "their difference": lambda t, q, s, f, a, b: q @ (s - f),
    "a mixture": lambda t, q, s, f, a, b: q @ torch.lerp(s, f, 0.3),
    "weights of heads": lambda t, q, s, f, a, b: q @ (a * s + b * f),
    "shares of heads": lambda t, q, s, f, a, b: q @ (a.sigmoid() * s + (1 - a.sigmoid()) * f),
    "products by elements": lambda t, q, s, f, a, b: (q.mT * (a * s + f)).sum(-2, keepdim=True),
}
RATES = {
    "two numbers": (lambda t, g: 0.9, lambda t, g: 0.5),
    "two gates": (lambda t, g: g, lambda t, g: g),
    "a gate and a number": (lambda t, g: g, lambda t, g: 0.9),
    "one that keeps all": (lambda t, g: 1.0, lambda t, g: 0.5),
}


CASES = [(read, "two gates") for read in READ]
CASES += [(read, rates) for read in ("their sum", "weights of heads") for rates in RATES if rates != "two gates"]


@pytest.mark.parametrize(("read", "rates"), CASES)
def test_they_are_an_attention_each(read, rates):
    report = assert_rewritten(loop(READ[read], *RATES[rates]), *data(), count=2, compiled=False)
    assert not report.near_misses


@pytest.mark.parametrize("read", ["their sum", "weights of heads"])
@pytest.mark.parametrize("length", [3, 4, 5])
def test_few_tokens(read, length):
    torch._dynamo.reset()
    count = 0 if (read, length) == ("weights of heads", 3) else 2
    assert_rewritten(loop(READ[read]), *data(length), count=count, compiled=False, options=UNSEEN)


@pytest.mark.parametrize("length", [1, 2])
def test_of_two_tokens_there_is_no_sum_yet(length):
    assert_refused(loop(READ["their sum"]), *data(length))


@pytest.mark.parametrize("read", ["their sum", "weights of heads"])
def test_each_starts_from_a_state_of_its_own(read):
    states = torch.randn(2, B, H, D, D)
    assert_rewritten(loop(READ[read]), *data(), *states, count=2, compiled=False, options=UNSEEN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    given = data(dtype=dtype, grads=False)
    assert_rewritten(loop(READ["weights of heads"]), *given, count=2, compiled=False, grads=False)


def test_rows_written_into_place():
    assert_rewritten(loop(READ["shares of heads"], written=True), *data(), count=2, compiled=False, options=UNSEEN)


def test_three_of_them():
    def forward(q, k, v, g, h):
        states, out = [q.new_zeros(B, H, D, D)] * 3, []
        for t in range(N):
            new = k[:, :, t, :, None] * v[:, :, t, None]
            rates = (g[:, :, t, None, None], h[:, :, t, None, None], 0.5)
            states = [r * s + new for r, s in zip(rates, states, strict=True)]
            out.append(q[:, :, t, None] @ (2 * states[0] - 0.5 * states[1] + states[2]))
        return torch.cat(out, 2)

    assert_rewritten(forward, *data()[:5], count=3, compiled=False, options=UNSEEN)


def test_what_the_first_row_reads_in_another_way_that_is_the_same():
    """Both states are one at the first token."""
    read = lambda t, q, s, f, a, b: q @ (2 * s if t == 0 else s + f)  # noqa: E731
    assert_rewritten(loop(read), *data(), count=2, compiled=False, options=UNSEEN)


TWINS = {
    "one of them at the first token": lambda t, q, s, f, a, b: q @ (s if t == 0 else s + f),
    "another weight at the first token": lambda t, q, s, f, a, b: q @ ((1 if t else 2) * s + f),
    "another weight at the second token": lambda t, q, s, f, a, b: q @ ((2 if t == 1 else 1) * s + f),
    "another weight of heads at first": lambda t, q, s, f, a, b: q @ (a * s + (b if t else a) * f),
    "weights of heads exchanged once": lambda t, q, s, f, a, b: q @ (b * s + a * f if t == 1 else a * s + b * f),
    "almost the weight at the first token": lambda t, q, s, f, a, b: q @ ((1 if t else 1.0001) * s + f),
}


@pytest.mark.parametrize("name", TWINS)
def test_first_rows_of_another_kind(name):
    assert_refused(loop(TWINS[name]), *data(grads=False), options=UNSEEN)


@pytest.mark.parametrize("token", [1, 2, 4])
def test_a_token_that_decays_otherwise(token):
    other = lambda t, g: 0.3 if t == token else g  # noqa: E731
    assert_refused(loop(READ["their sum"], other), *data(grads=False), options=UNSEEN)


def test_a_gate_that_is_not_positive():
    q, k, v, g, *rest = data(grads=False)
    g[0, 0, 2] = -0.5
    assert_refused(loop(READ["weights of heads"]), q, k, v, g, *rest, obligation="decay", options=UNSEEN)

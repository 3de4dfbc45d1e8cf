"""Masks and decay factors that a function is handed: read by value, and looked at again in each call."""

from __future__ import annotations

import pytest
import torch

import lacompile
from lacompile import explain, guards
from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D, C = 1, 3, 12, 4, 4
SLOPE = torch.tensor([0.05, 0.2, 0.4])


def operands(n=N):
    return qkv(B, H, n, D)


def causal(n=N):
    return torch.ones(n, n, dtype=torch.bool).tril()


def logarithms(n=N, slope=SLOPE):
    i = torch.arange(n)
    return (-slope[:, None, None] * (i[:, None] - i)).masked_fill(~causal(n), float("-inf"))


def decay(n=N, slope=SLOPE):
    return logarithms(n, slope).exp()


def weighted(q, k, v, mask):
    return (q @ k.mT * mask) @ v


def in_logarithms(q, k, v, mask):
    return (q @ k.mT * mask.exp()) @ v


FORMS = {
    "numbers": (weighted, lambda: causal().float()),
    "of each batch": (weighted, lambda: causal().float().expand(B, H, N, N)),
    "bool": (lambda q, k, v, m: (q @ k.mT).masked_fill(~m, 0) @ v, causal),
    "what is hidden": (lambda q, k, v, m: (q @ k.mT).masked_fill(m, 0) @ v, lambda: ~causal()),
    "whole numbers": (lambda q, k, v, m: (q @ k.mT).masked_fill(m == 0, 0) @ v, lambda: causal().long()[None, None]),
    "chosen by": (lambda q, k, v, m: torch.where(m > 0, q @ k.mT, 0) @ v, lambda: causal().int()),
    "added": (in_logarithms, lambda: torch.zeros(N, N).masked_fill(~causal(), float("-inf"))),
    "one and minus infinity": (
        lambda q, k, v, m: (q @ k.mT).masked_fill(m == float("-inf"), 0) @ v,
        lambda: torch.ones(N, N).masked_fill(~causal(), float("-inf")),
    ),
    "one and its opposite": (
        lambda q, k, v, m: torch.where(m > 0, q @ k.mT, 0) @ v,
        lambda: torch.where(causal(), 1.0, -1.0).bfloat16(),
    ),
    "what comes later": (
        lambda q, k, v, m: (q @ k.mT).masked_fill(m == 1.0, 0) @ v,
        lambda: torch.ones(N, N).masked_fill(~causal(), float("-inf")),
    ),
    "a half": (weighted, lambda: 0.5 * causal().float()),
    "hidden by a number": (
        lambda q, k, v, m: torch.where(m == 10000.0, 0.0, q @ k.mT) @ v,
        lambda: torch.where(causal(), -0.5, 10000.0).expand(B, H, N, N),
    ),
    "decay": (weighted, decay),
    "logarithms of a decay": (in_logarithms, logarithms),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name, without_inductor):
    form, mask = FORMS[name]
    report = assert_rewritten(form, *operands(), mask())
    assert [a.endswith(", which is passed in") for a in report.rewrites[0].assumptions] == [True]


def chunks(q, k, v, mask, from_start, to_end, block):
    state, out = q.new_zeros(B, H, D, D), []
    for a in range(0, N, C):
        x, y, z = (t[:, :, a : a + C] for t in (q, k, v))
        out.append((x @ y.mT * mask) @ z + (x * from_start) @ state)
        state = state * block + (y * to_end).mT @ z
    return torch.cat(out, 2)


def factors(slope=SLOPE, block=C):
    s, c = slope[:, None, None], torch.arange(C)[:, None]
    return [decay(C, slope), (-s * (c + 1)).exp(), (-s * (C - 1 - c)).exp(), (-s * block).exp()]


class Chunks(torch.nn.Module):
    def __init__(self, *made):
        super().__init__()
        for n, x in enumerate(made):
            self.register_buffer(f"b{n}", x)

    def forward(self, q, k, v):
        return chunks(q, k, v, self.b0, self.b1, self.b2, self.b3)


def test_factors_of_chunks():
    assert_rewritten(chunks, *operands(), *factors())
    assert_rewritten(Chunks(*factors()), *operands())


def test_a_slope_beside_its_masks(without_inductor):
    def run(q, k, v, slope, mask, from_start, to_end):
        return chunks(q, k, v, mask, from_start, to_end, torch.exp(-slope * C))

    report = assert_rewritten(run, *operands(), SLOPE[:, None, None], *factors()[:3])
    assert report.rewrites[0].decay == "-slope"


@pytest.mark.parametrize("block", [C - 1, C + 1, C + 0.01])
def test_a_state_that_decays_by_another_length(block):
    assert_refused(chunks, *operands(), *factors(block=block))
    assert_refused(Chunks(*factors(block=block)), *operands())


@pytest.mark.parametrize(
    "mask",
    [causal() | (torch.arange(N) == 3), torch.rand(N, N).tril(), decay() + decay(slope=2 * SLOPE)],
    ids=["a column too many", "no decay", "the sum of two"],
)
def test_other_masks(mask):
    assert_refused(weighted, *operands(), mask)


def test_a_mask_of_what_comes_later():
    assert_rewritten(weighted, *operands(), causal().mT, compiled=False)


@pytest.mark.parametrize("n", [2, N])
def test_heads_that_attend_to_themselves_alone(n, without_inductor):
    """A mask is one for all heads; a head without a past is a decay of nothing."""
    mask = torch.stack([causal(n), torch.eye(n) > 0, causal(n)]).float()
    assert_rewritten(weighted, *operands(n), mask)


OTHER_NUMBERS = {
    "neither": (lambda: two(1.0, float("-inf")), lambda s, m: s.masked_fill(m == 0.0, 0)),
    "three": (lambda: two(1.0, float("-inf"), 2.0), lambda s, m: s.masked_fill(m == float("-inf"), 0)),
    "no number": (lambda: two(1.0, float("nan")), lambda s, m: s.masked_fill(m != 1.0, 0)),
    "a product with infinity": (lambda: two(1.0, float("-inf")), lambda s, m: s * m),
    "a column too many": (
        lambda: torch.where(causal() | (torch.arange(N) == 3), 1.0, float("-inf")),
        lambda s, m: s.masked_fill(m == float("-inf"), 0),
    ),
    "which rounding decides": (lambda: two(0.1, -0.1), lambda s, m: s.masked_fill(m == 0.1, 0)),
}


def two(inside, outside, first=None):
    made = torch.where(causal(), inside, outside)
    return made if first is None else made.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(first))


@pytest.mark.parametrize("name", OTHER_NUMBERS)
def test_masks_of_other_numbers(name):
    mask, hide = OTHER_NUMBERS[name]

    def run(q, k, v, m):
        return hide(q @ k.mT, m) @ v

    assert_refused(run, *operands(), mask())


def test_heads_with_windows_of_their_own():
    assert_refused(weighted, *operands(), torch.stack([causal(), causal().triu(-2), causal().triu(-3)]).float())


def test_a_slope_of_a_coarser_format_than_the_mask_that_shows_it(without_inductor):
    """What the program computes with it elsewhere it computes with its own digits."""

    def run(q, k, v, mask, slope):
        distance = torch.arange(N)[:, None] - torch.arange(N)
        again = (-slope.to(q)[:, None, None] * distance).exp().tril()
        return weighted(q, k, v, mask) + weighted(k, q, v, again)

    assert_rewritten(run, *operands(), decay(), SLOPE.bfloat16(), count=2, dtype=torch.float32)


class TestOtherValues:
    """A mask may be another one in every call."""

    @pytest.fixture(autouse=True)
    def no_graph_of_another_test(self, without_inductor):
        torch._dynamo.reset()

    def test_the_original_graph_serves_what_is_no_mask(self):
        run = torch.compile(weighted, backend="lightning", dynamic=False)
        for mask in (causal(), causal(), torch.rand(N, N), causal().clone(), torch.rand(N, N).tril(), decay()):
            args = [*operands(), mask]
            torch.testing.assert_close(run(*args), weighted(*args))

    def test_it_is_analysed_a_few_times_only(self, monkeypatch):
        analyses = []
        monkeypatch.setattr("lacompile.backend.decide", count(lacompile.backend.decide, analyses))
        run = torch.compile(weighted, backend="lightning", dynamic=False)
        for n in range(8):
            args = [*operands(), decay(slope=(1 + n) * SLOPE)]
            torch.testing.assert_close(run(*args), weighted(*args))
        assert len(analyses) == guards.MAX_PASSED

    def test_of_any_length(self, monkeypatch):
        analyses = []
        monkeypatch.setattr("lacompile.backend.decide", count(lacompile.backend.decide, analyses))
        run = torch.compile(weighted, backend="lightning", dynamic=True)
        for n in (N, N + 5):
            for mask in (causal(n).float(), causal(n).float().triu(-2)):
                args = [*operands(n), mask]
                torch.testing.assert_close(run(*args), weighted(*args))
        assert len(analyses) <= guards.MAX_PASSED

    def test_of_other_numbers(self):
        """The same band by one other number, and another band by the same."""

        def hidden(q, k, v, mask):
            return (q @ k.mT).masked_fill(mask == float("-inf"), 0) @ v

        low = float("-inf")
        others = (1.0, low, 1), (1.0, -1e9, 1), (low, 1.0, 1), (2.0, low, 1), (1.0, low, 2)
        for dynamic in (False, True):
            torch._dynamo.reset()
            run = torch.compile(hidden, backend="lightning", dynamic=dynamic)
            for n in (N, N + 4):
                for inside, outside, above in others:
                    mask = torch.where(torch.ones(n, n).triu(above) > 0, outside, inside)
                    args = [*operands(n), mask]
                    torch.testing.assert_close(run(*args), hidden(*args))

    def test_written_into(self):
        run, mask = torch.compile(weighted, backend="lightning", dynamic=False), causal().float()
        for _ in range(2):
            args = [*operands(), mask]
            torch.testing.assert_close(run(*args), weighted(*args))
            mask[3, 1] = 2.0

    def test_factors_that_the_final_state_alone_reads(self):
        def run(q, k, v, mask, to_end):
            return weighted(q, k, v, mask), (k * to_end).mT @ v

        def to_end(slope):
            return (-slope[:, None, None] * (N - 1 - torch.arange(N))[:, None]).exp()

        compiled = torch.compile(run, backend="lightning", dynamic=False)
        for slope in (SLOPE, 2 * SLOPE, SLOPE):
            args = [*operands(), decay(), to_end(slope)]
            torch.testing.assert_close(compiled(*args), run(*args))

    def test_trust_is_for_buffers(self):
        run = torch.compile(weighted, backend="lightning", dynamic=False, options={"buffers": "trust"})
        for mask in (causal().float(), torch.rand(N, N)):
            args = [*operands(), mask]
            torch.testing.assert_close(run(*args), weighted(*args))


def count(function, calls):
    def counted(*args, **options):
        calls.append(args)
        return function(*args, **options)

    return counted


def test_values_that_may_not_be_used():
    report = explain(weighted, buffers="never")(*operands(), causal())
    assert not report.rewrites

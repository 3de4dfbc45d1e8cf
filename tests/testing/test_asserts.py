"""The assertions for users hold where they should, and fail where they should."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lacompile.testing import (
    assert_refused,
    assert_rewritten,
    check_error,
    head_log_decay,
    qkv,
    relative_error,
    state,
    token_log_decay,
)
from lacompile.testing.fp64 import in_fp64


def undecayed(q, k, v):
    return (q @ k.transpose(-1, -2)).tril() @ v


def bidirectional(q, k, v):
    return (q @ k.transpose(-1, -2)) @ v


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(8, 3 * 8)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return undecayed(q, k, v).transpose(1, 2).flatten(2)


class TestRewritten:
    def test_a_function_with_gradients_of_all_arguments(self):
        report = assert_rewritten(undecayed, *qkv(length=24, dk=8, requires_grad=True))
        assert report.rewrites[0].formulation == "parallel"

    def test_a_module_with_gradients_of_its_parameters_is_not_changed(self):
        layer = Layer()
        before = [p.clone() for p in layer.parameters()]
        assert_rewritten(layer, torch.randn(2, 24, 8))
        assert all(torch.equal(p, b) and p.grad is None for p, b in zip(layer.parameters(), before, strict=True))

    def test_without_gradients(self):
        assert_rewritten(undecayed, *qkv(length=24, dk=8), grads=False)

    def test_fails_where_nothing_is_rewritten(self):
        with pytest.raises(AssertionError, match="expected 1 rewrites, found 0"):
            assert_rewritten(bidirectional, *qkv(length=24, dk=8), grads=False)

    def test_fails_where_the_count_is_another(self):
        with pytest.raises(AssertionError, match="expected 2 rewrites, found 1"):
            assert_rewritten(undecayed, *qkv(length=24, dk=8), grads=False, count=2)

    @pytest.mark.parametrize(("f", "found"), [(undecayed, 1), (bidirectional, 0)])
    def test_any_number_of_rewrites(self, f, found):
        report = assert_rewritten(f, *qkv(length=24, dk=8), grads=False, count=None, compiled=False)
        assert len(report.rewrites) == found

    def test_wants_something_that_requires_a_gradient(self):
        with pytest.raises(ValueError, match="grads=False"):
            assert_rewritten(undecayed, *qkv(length=24, dk=8))

    @pytest.mark.parametrize("count", [1, None])
    @pytest.mark.parametrize("at", ["forward", "backward"])
    def test_fails_where_the_operator_is_wrong(self, monkeypatch, at, count):
        from lacompile.kernels import cpu

        right = getattr(cpu, at)

        def wrong(*args):
            first, *others = right(*args)
            return first * 1.001, *others

        monkeypatch.setattr(cpu, at, wrong)
        what = "output" if at == "forward" else "gradient of argument"
        with pytest.raises(AssertionError, match=f"{what}.*relative error 1.00e-03"):
            args, options = qkv(length=24, dk=8, requires_grad=True), {"validate": "off"}
            assert_rewritten(undecayed, *args, count=count, options=options, compiled=count is not None)


class TestRefused:
    def test_holds_and_returns_the_report(self):
        assert assert_refused(bidirectional, *qkv(length=24, dk=8)).graphs == 1

    def test_fails_where_something_is_rewritten(self):
        with pytest.raises(AssertionError, match="expected no rewrite, found 1"):
            assert_refused(undecayed, *qkv(length=24, dk=8))

    def test_fails_where_the_obligation_is_another(self):
        with pytest.raises(AssertionError, match="near miss for 'no-such-obligation'"):
            assert_refused(bidirectional, *qkv(length=24, dk=8), obligation="no-such-obligation")


class TestBudgets:
    def test_the_error_is_relative(self):
        want = torch.tensor([3.0, 4.0])
        assert relative_error(want * 1.5, want) == pytest.approx(0.5)
        assert relative_error(torch.tensor([0.0, 2.0]), torch.zeros(2)) == 2.0
        assert relative_error(torch.zeros(3), want) == float("inf")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_one_rounding_is_allowed_and_one_per_cent_of_more_is_not(self, dtype):
        want = qkv(dtype=torch.float64)[0]
        check_error("o", want.to(dtype), want)
        with pytest.raises(AssertionError, match="the budget is"):
            check_error("o", (want * 1.01).to(dtype), want)

    def test_worse_than_eager_is_refused_within_the_budget(self):
        want = qkv(dtype=torch.float64)[0]
        eager = want.float()
        got = (want * (1 + 1.5e-6)).float()
        check_error("o", got, want)
        with pytest.raises(AssertionError, match="eager's is"):
            check_error("o", got, want, eager=eager)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_not_a_number_is_never_within_a_budget(self, bad):
        want = torch.ones(4, dtype=torch.float64)
        got = torch.tensor([1.0, 1.0, bad, 1.0])
        with pytest.raises(AssertionError, match="relative error inf"):
            check_error("o", got, want)
        with pytest.raises(AssertionError, match="relative error inf"):
            check_error("o", want, got)

    def test_an_eager_run_that_overflows_is_no_measure(self):
        want = torch.ones(4, dtype=torch.float64)
        check_error("o", want.float(), want, eager=torch.full((4,), float("nan")))
        with pytest.raises(AssertionError, match="the budget is"):
            check_error("o", 1.1 * want.float(), want, eager=torch.full((4,), float("nan")))


class TestInputs:
    def test_shapes_layouts_and_seeds(self):
        q, k, v = qkv(2, 4, 10, 8, 6, k_heads=2, v_heads=1, tokens_first=True)
        assert (q.shape, k.shape, v.shape) == ((2, 4, 10, 8), (2, 2, 10, 8), (2, 1, 10, 6))
        assert q.stride(1) < q.stride(2) and q.stride(-1) == 1
        assert torch.equal(q, qkv(2, 4, 10, 8, 6, k_heads=2, v_heads=1)[0])
        assert not torch.equal(q, qkv(2, 4, 10, 8, 6, seed=7)[0])
        assert state(2, 4, 8, 6).shape == (2, 4, 8, 6)

    def test_log_decays_are_at_most_zero(self):
        g = head_log_decay(4)
        assert g.shape == (4,) and bool((g < 0).all()) and bool((g.diff() > 0).all())
        assert g.tolist() == pytest.approx([-0.5, -0.10772, -0.023208, -0.005], rel=1e-4)
        per_token = token_log_decay(2, 4, 10)
        assert per_token.shape == (2, 4, 10) and bool((per_token <= 0).all())


def test_a_program_that_names_a_precision_runs_in_fp64():
    def program(x):
        y = x.float() * torch.arange(4).half() + torch.ones(4, dtype=torch.bfloat16) + torch.tensor(0.1)
        return y.to(torch.float16)

    with in_fp64():
        out = program(torch.full((4,), 1 / 3, dtype=torch.float64))
    assert out.dtype == torch.float64
    assert out[3].item() == pytest.approx(2.1, abs=1e-15)
    assert torch.get_default_dtype() == torch.float32

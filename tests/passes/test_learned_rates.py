"""Gates of two learned rates, and gates from a learned lower bound on, whoever owns these tensors; and near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D = 2, 2, 8, 4
ROWS = 4


def arguments():
    operands = qkv(B, H, N, D)
    gates = [torch.randn(B, H, N).requires_grad_() for _ in range(2)]
    return [*operands, *gates, torch.randn(ROWS, H, 1).requires_grad_()]


def of_pairs(log_decay):
    def run(q, k, v, x, y, rates):
        sums = log_decay(x, y, rates).cumsum(-1)
        later = torch.ones(N, N, dtype=torch.bool).triu(1)
        weights = (sums[..., :, None] - sums[..., None, :]).masked_fill(later, float("-inf")).exp()
        return (q @ k.mT * weights) @ v

    return run


def over_tokens(log_decay):
    def run(q, k, v, x, y, rates):
        decay, state, out = log_decay(x, y, rates).exp(), q.new_zeros(B, H, D, D), []
        for t in range(N):
            state = decay[:, :, t, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
            out.append((q[:, :, t, :, None] * state).sum(-2))
        return torch.stack(out, 2)

    return run


def from_bound(bound):
    def log_decay(x, y, rates):
        m = bound(rates)
        return (m + (1 - m) * torch.sigmoid(x)).log()

    return log_decay


def rows_up_to(rates):
    return rates.softmax(0).cumsum(0)[2]


def rows_behind_the_first(rates):
    sums = rates.softmax(0).cumsum(0)
    return sums[2] - sums[0]


LOG_DECAYS = {
    "two gates": lambda x, y, r: -(r[0].exp() * F.softplus(x) + r[1].exp() * F.softplus(y)),
    "a gate and a number of the head": lambda x, y, r: -r[1].exp() * F.softplus(x) - r[2].exp(),
    "their sum": lambda x, y, r: -(r[1].exp() * F.softplus(x) + r[2].exp()),
    "a gate that is an exponential": lambda x, y, r: -r[1].exp() * x.exp() - r[2].exp(),
    "a bound of rows": from_bound(rows_up_to),
    "a bound of rows behind the first": from_bound(rows_behind_the_first),
}


@pytest.mark.parametrize("form", [of_pairs, over_tokens])
@pytest.mark.parametrize("name", LOG_DECAYS)
def test_gates_of_rows(form, name):
    report = assert_rewritten(form(LOG_DECAYS[name]), *arguments(), compiled=False)
    assert not report.near_misses and f"N={N}" in str(report)


def rows_of_any_sign(rates):
    return rates.cumsum(0)[2]


def one_row_of_any_sign(rates):
    return rates[1]


@pytest.mark.parametrize("form", [of_pairs, over_tokens])
@pytest.mark.parametrize("bound", [rows_of_any_sign, one_row_of_any_sign])
def test_bounds_of_any_sign(form, bound):
    assert_refused(form(from_bound(bound)), *arguments(), obligation="decay")


def with_a_corner_of_its_own(log_decay):
    """In one row the weights of the first keys are others."""

    def run(q, k, v, x, y, rates):
        sums = log_decay(x, y, rates).cumsum(-1)
        later = torch.ones(N, N, dtype=torch.bool).triu(1)
        weights = (sums[..., :, None] - sums[..., None, :]).masked_fill(later, float("-inf")).exp()
        corner = (torch.arange(N)[:, None] == 5) & (torch.arange(N) < 3)
        return (q @ k.mT * weights * (1 + corner * rates[3, :, :, None].exp())) @ v

    return run


@pytest.mark.parametrize("name", LOG_DECAYS)
def test_other_weights_in_one_row(name):
    assert_refused(with_a_corner_of_its_own(LOG_DECAYS[name]), *arguments())


def test_sums_of_keys_beside_a_number_are_no_bound():
    def run(q, k, v, x, y, rates):
        q, k = F.softplus(q), F.softplus(k)
        return torch.stack([(q[:, :, t] * (1 + k[:, :, : t + 1].sum(2))).sum(-1) for t in range(N)], 2)

    assert_rewritten(run, *arguments(), compiled=False)

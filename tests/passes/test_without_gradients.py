"""Masks and constants of a loop that are computed under ``no_grad``: of numbers and buffers that is no other value."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lacompile.testing import assert_refused, assert_rewritten

H, N, C = 3, 24, 8


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, H, N, d, generator=generator, requires_grad=True) for d in (4, 4, 5)]


def apart(n):
    i = torch.arange(n)
    return i[:, None] - i


class Decayed(nn.Module):
    """``mask`` is a function of the module and the length."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask
        self.register_buffer("slopes", torch.tensor([0.1, 0.2, 0.3]))
        self.learned = nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))

    def forward(self, q, k, v):
        return (q @ k.mT * self.mask(self, q.shape[2])) @ v


@torch.no_grad()
def of_numbers(m, n):
    return (0.9 ** apart(n)).tril()


@torch.no_grad()
def of_a_list(m, n):
    bias = torch.tensor([0.5, 0.25, 0.125])[:, None, None] * -apart(n).abs()
    return (bias + torch.full((n, n), float("-inf")).triu(1)).exp()


@torch.no_grad()
def of_a_buffer(m, n):
    d = apart(n).to(m.slopes)
    return torch.where(d >= 0, torch.exp(-m.slopes[:, None, None] * d.clamp(min=0)), 0.0)


@torch.no_grad()
def written_in_place(m, n):
    mask = torch.exp(-m.slopes[:, None, None] * apart(n))
    mask.masked_fill_(apart(n) < 0, 0.0)
    return mask


def logarithm(m, n):
    with torch.no_grad():
        rates = -m.slopes[:, None, None]
    with torch.inference_mode():
        d = apart(n)
    return torch.exp(rates * d).tril()


def in_inference_mode(m, n):
    with torch.inference_mode():
        mask = torch.exp(-0.1 * apart(n)).tril()
    return mask.clone()


def a_learned_one_elsewhere(m, n):
    """What is computed from a parameter there is not what the attention reads."""
    with torch.no_grad():
        m.slopes * m.learned.sum()
        return torch.exp(-m.slopes[:, None, None] * apart(n)).tril()


MASKS = [
    of_numbers, of_a_list, of_a_buffer, written_in_place, logarithm, in_inference_mode, a_learned_one_elsewhere,
]  # fmt: skip


@pytest.mark.parametrize("mask", MASKS, ids=lambda f: f.__name__)
def test_a_mask(mask):
    assert_rewritten(Decayed(mask), *inputs(), compiled=False)


class Chunked(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("slopes", torch.tensor([0.1, 0.2, 0.3]))

    @torch.no_grad()
    def constants(self):
        i, rate = torch.arange(C) + 1.0, self.slopes[:, None]
        inside = torch.exp(-rate[..., None] * apart(C)).tril()
        return inside, *(torch.exp(-rate * d)[..., None] for d in (i, C - i, torch.tensor([C])))

    def forward(self, q, k, v):
        inside, begins, ends, block = self.constants()
        state, out = torch.zeros(2, H, 4, 5).to(q), []
        for x, y, z in zip(q.split(C, 2), k.split(C, 2), v.split(C, 2), strict=True):
            out.append((x @ y.mT * inside) @ z + (x * begins) @ state)
            state = block * state + (y * ends).mT @ z
        return torch.cat(out, 2)


def test_constants_of_a_loop():
    assert_rewritten(Chunked(), *inputs(), compiled=False)


@torch.no_grad()
def of_a_parameter(m, n):
    return torch.exp(-m.learned.exp()[:, None, None] * apart(n)).tril()


@torch.no_grad()
def of_a_parameter_written_over_a_buffer(m, n):
    mask = torch.exp(-m.slopes[:, None, None] * apart(n)).tril()
    mask[0] = torch.exp(-m.learned[0] * apart(n)).tril()
    return mask


@torch.no_grad()
def written_through_a_view(m, n):
    rates = m.slopes.clone()
    rates[1:].copy_(m.learned[1:])
    return torch.exp(-rates[:, None, None] * apart(n)).tril()


def a_rate_of_a_parameter(m, n):
    """The rate has no gradient; the operator would give it one."""
    with torch.no_grad():
        rate = m.learned.exp()
        mask = torch.exp(-rate[:, None, None] * apart(n)).tril()
    return mask


LEARNED = [of_a_parameter, of_a_parameter_written_over_a_buffer, a_rate_of_a_parameter]


@pytest.mark.parametrize("mask", LEARNED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("validate", ["off", "always"])
def test_what_has_a_gradient_to_lose_is_left_alone(mask, validate):
    assert_refused(Decayed(mask), *inputs(), obligation="separable", options={"validate": validate})


def test_rates_that_are_written_from_a_parameter_stay_data():
    """Whatever is found, the parameter has no gradient."""
    module, args = Decayed(written_through_a_view), inputs()
    report = assert_refused(module, *args, options={"validate": "off"})
    assert report is None or not report.rewrites


def rates_alone(m, n):
    with torch.no_grad():
        rate = m.learned.exp()
    return torch.exp(-rate[:, None, None] * apart(n)).tril()


def detached(m, n):
    return torch.exp(-m.learned.detach().exp()[:, None, None] * apart(n)).tril()


@pytest.mark.parametrize("mask", [rates_alone, detached], ids=lambda f: f.__name__)
def test_a_rate_that_is_data_is_read_as_that(mask):
    """Beside it the gradients are those of eager: none for the parameter."""
    assert_rewritten(Decayed(mask), *inputs(), compiled=False)


def test_queries_under_no_grad_are_no_constants():
    def run(q, k, v):
        with torch.no_grad():
            scores = q @ k.mT
        return (scores * of_numbers(None, N)) @ v

    assert_refused(run, *inputs(), options={"validate": "off"})

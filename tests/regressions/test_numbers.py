"""Known numbers beside data, in the formats and dimensions that the program has them in.

The data is a part of a longer tensor: no value of the graph holds the function as a whole, so it is computed again.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_rewritten

B, H, N, D, E = 2, 3, 16, 4, 3
OFF = {"validate": "off"}


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, N, n, generator=generator).to(dtype).requires_grad_() for n in (D, D, E))
    return q, k, v, torch.rand(B, H, N + 1, generator=generator).to(dtype)


def rewritten(f, *args):
    assert_rewritten(f, *args, compiled=False, options=OFF)


def at_least_a_number(x):
    return x >= torch.full_like(x, 0.5)


def a_number_and_more(x):
    return torch.tensor(0.5) <= x


def equal_to_a_number_of_integers(x):
    return (x * 4).long() == torch.tensor(2)


def beyond_a_number_of_another_format(x):
    return x.half() > torch.tensor(0.2998)


def beyond_a_number_of_a_wider_format(x):
    return x.half() > torch.tensor([0.2998])


def a_number_cut_to_an_integer(x):
    return (x * 3).long().masked_fill(x > 0.5, 1.7)


def a_number_that_becomes_a_truth(x):
    return (x > 0.3).masked_fill(x > 0.5, 3)


@pytest.mark.parametrize(
    "weight",
    [
        at_least_a_number,
        a_number_and_more,
        equal_to_a_number_of_integers,
        beyond_a_number_of_another_format,
        beyond_a_number_of_a_wider_format,
        a_number_cut_to_an_integer,
        a_number_that_becomes_a_truth,
    ],
    ids=lambda f: f.__name__,
)
def test_a_number_where_an_operation_takes_a_tensor(weight):
    def f(q, k, v, x):
        return (q @ (k * weight(x[..., 1:])[..., None]).mT).tril() @ v

    rewritten(f, *inputs())


def test_known_numbers_in_a_double_program():
    def f(q, k, v, x):
        x = torch.where(x[..., 1:] > 0.5, x[..., 1:], torch.linspace(0.1, 1, N, dtype=x.dtype))
        i = torch.arange(N)
        distance = i[:, None] - i[None, :]
        rate = torch.tensor([0.1, 0.3, 0.7], dtype=x.dtype)[:, None, None]
        return (q @ (k * x[..., None]).mT * torch.exp(-rate * distance).tril()) @ v

    rewritten(f, *inputs(torch.float64))


@pytest.mark.parametrize("kept", [1, 2])
def test_padding_that_cuts(kept):
    """What is left of one dimension may be one entry, which is every entry of what it is multiplied with."""

    def f(q, k, v, x):
        cut = F.pad(x, (-2, 2 + kept - x.shape[-1]))
        cut = cut if kept == 1 else cut[..., :1]
        return (q @ k.mT).tril() @ (v * cut[:, :, None])

    rewritten(f, *inputs())

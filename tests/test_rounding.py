"""Positions in floating formats: what the program's own rounding may have changed decides nothing.

Each mask is a function of N positions. Validation is off, and would not help: it computes in fp64.
"""

from __future__ import annotations

import pytest
import torch

import lacompile
from lacompile.backend import decide
from lacompile.options import Options

OPTIONS = Options.split({"validate": "off"})[0]
B, H, N, D, E = 2, 3, 24, 8, 6


def pairs(rows, columns):
    return rows[:, None], columns[None, :]


def causal(i):
    rows, columns = pairs(i, i)
    return (rows >= columns).float()


def floor_of_there_and_back(i):
    j = (i * 0.7 * (1 / 0.7)).long()  # some come out one lower
    return torch.exp(-0.1 * (j[:, None] - j[None, :])).tril()


def ceil_of_there_and_back(i):
    return causal((i * 0.1 * 10).ceil()) * causal(i)


def floor_division(i):
    return causal(torch.div(i * 0.7, 0.7, rounding_mode="floor"))


def remainder(i):
    return causal(i) * ((i * 0.1) % 0.1 < 0.05)[None, :]


def the_same_factor_in_two_ways(i):
    rows, columns = pairs(i * 0.3, i * 0.1 * 3)
    return (rows >= columns).float()


def a_difference_of_the_same_factor_in_two_ways(i):
    rows, columns = pairs(i * 0.3, i * 0.1 * 3)
    return (rows - columns >= 0).float()


def clamped_difference(i):
    rows, columns = pairs(i * 0.3, i * 0.1 * 3)
    return causal(i) * ((rows - columns).clamp(min=0) * 1e9 + 1).clamp(max=2)


def equal_there_and_back(i):
    return causal(i) * (i * 0.7 * (1 / 0.7) == i)[None, :]


def truth_of_what_rounding_leaves(i):
    return causal(i) * (i * 0.7 * (1 / 0.7) - i).bool().logical_not()[None, :]


def truth_of_a_constant(i):
    return causal(i) * (torch.ones(len(i)) * 0.7 * (1 / 0.7)).long()[None, :]


def sixteen_bits(i):
    return causal((i * 100).bfloat16())  # 300 and 301 would be one position


def half_the_bits_beyond_2048(i):
    rows, columns = pairs(i + 4000, (i + 4000).half())
    return (rows >= columns).float()


def beyond_the_integers_of_float32(i):
    return causal((i + 2**24).float())


def a_threshold_rounded_to_its_format(i):
    return causal(i) * ((i + 190).bfloat16() >= 200.3)[None, :]  # 200.3 is 200 there


def a_running_sum_of_fractions(i):
    j = torch.full((len(i),), 0.1).cumsum(0) * 10
    rows, columns = pairs(i + 1, j)
    return (rows >= columns).float()


def a_running_sum_that_is_too_large(i):
    return causal(torch.full((len(i),), 2.0**20 + 1).cumsum(0) - (i + 1) * 2.0**20)


def linspace(i):
    j = (torch.linspace(0, 1, len(i)) * (len(i) - 1)).long()
    return causal(j) * causal(i)


def a_range_in_fractions(i):
    j = (torch.arange(0, len(i) * 0.1 - 0.05, 0.1) * 10).long()
    return causal(j) * causal(i)


def a_slope_there_and_back(i):
    slope = torch.tensor(0.37) * i
    rows, columns = pairs(slope * 0.7 * (1 / 0.7), slope)
    return (rows >= columns).float()


def by_thirds(i):
    return causal((i / 3 * 3).floor()) * causal(i)


def equal_in_two_ways(i):
    return causal(i) * (i * 0.1 * 3 == i * 3 * 0.1)[None, :]


def floor_of_an_exponential(i):
    return causal(i) * (torch.exp(i * 0.6931472).floor() == 2.0**i)[None, :]


def weights_in_two_ways(i):
    return causal(i) * (torch.exp(i * 0.1) >= torch.exp(i * 0.05) ** 2)[None, :]


def a_weight_that_underflows(i):
    return causal(i) * (torch.exp(-5 * i) > 0)[None, :]


def a_weight_that_overflows(i):
    rows, columns = pairs(i, i)
    return causal(i) * torch.isinf(1e30 * torch.exp(20.0 * (rows - columns)).tril()).logical_not()


def a_difference_that_is_amplified(i):
    return causal(i) * torch.sigmoid((i * 0.3 - i * 0.1 * 3) * 1e9)[None, :]


def a_zero_that_is_amplified(i):
    return causal(i) * torch.sigmoid((i * 0.3 - 0.9) * 1e9)[None, :]


def what_a_cast_rounded(i):
    numbers = i * 0.1
    return causal(i) * torch.exp((numbers - numbers.bfloat16().float()) * 10)[None, :]


def nearly_one(i):
    return torch.exp(i * 0.3) * torch.exp(i * -0.3)


def the_same_numbers_at_other_places(i):
    rows, columns = pairs(nearly_one(i), nearly_one(i))
    return causal(i) * torch.sigmoid((rows - columns) * 1e8)


def the_same_numbers_in_another_order(i):
    numbers = nearly_one(i)
    across, along = numbers.expand(len(i), -1), numbers[:, None].expand(-1, len(i))
    return causal(i) * torch.sigmoid((across - along) * 1e8)


def the_same_numbers_but_one_place(i):
    numbers = nearly_one(i)
    return causal(i) * torch.sigmoid((numbers[1:] - numbers[:-1]) * 1e8).sum()


def what_a_large_number_swallowed(i):
    rows, columns = pairs(i, i)
    return causal(i) * torch.exp(-((rows - columns) * 0.1 + 1e9 - 1e9))


def what_a_mask_swallowed(i):
    rows, columns = pairs(i, i)
    return torch.exp((rows - columns) * -0.1 - 1e9 + causal(i) * 1e9)


def nothing_in_half_the_bits(i):
    return (torch.ones(len(i), len(i)).triu(1).half() < 1e-8).float()


def one_in_half_the_bits(i):
    return (causal(i).half() > 0.9999).float()


def one_in_bfloat16(i):
    return (causal(i).bfloat16() > 0.999).float()


def one_in_float32(i):
    return (torch.where(causal(i) > 0, 1.0, 2.0) < 1.00000001).float()


def beyond_one_in_float32(i):
    rows, columns = pairs(i, i)
    return ((rows - columns).float() > 0.99999999).float()


def not_below_nothing(i):
    rows, columns = pairs(i, i)
    return ((rows - columns).half() > -1e-9).float()


def a_threshold_that_is_one(i):
    return (torch.nn.functional.threshold(causal(i), 0.99999999, 0.0) != 0).float()


def a_divisor_that_is_one(i):
    return (torch.fmod(causal(i), 1.00000001) == 0).float()


def a_number_that_is_nothing(i):
    return (torch.where(causal(i) > 0, 1e-50, 0.0) > 0).float()


def a_product_that_is_nothing(i):
    return (causal(i) * 1e-30 * 1e-30 > 0).float()


def less_than_nothing(i):
    return (torch.where(causal(i) > 0, 0.0, 1.0) < 1e-50).float()


ATTACKS = [
    what_a_cast_rounded,
    the_same_numbers_at_other_places,
    the_same_numbers_in_another_order,
    the_same_numbers_but_one_place,
    what_a_large_number_swallowed,
    what_a_mask_swallowed,
    floor_of_there_and_back,
    ceil_of_there_and_back,
    floor_division,
    remainder,
    the_same_factor_in_two_ways,
    a_difference_of_the_same_factor_in_two_ways,
    clamped_difference,
    equal_there_and_back,
    truth_of_what_rounding_leaves,
    truth_of_a_constant,
    sixteen_bits,
    half_the_bits_beyond_2048,
    beyond_the_integers_of_float32,
    a_threshold_rounded_to_its_format,
    a_running_sum_of_fractions,
    a_running_sum_that_is_too_large,
    linspace,
    a_range_in_fractions,
    a_slope_there_and_back,
    by_thirds,
    equal_in_two_ways,
    floor_of_an_exponential,
    weights_in_two_ways,
    a_weight_that_underflows,
    a_weight_that_overflows,
    a_difference_that_is_amplified,
    a_zero_that_is_amplified,
    nothing_in_half_the_bits,
    one_in_half_the_bits,
    one_in_bfloat16,
    one_in_float32,
    beyond_one_in_float32,
    not_below_nothing,
    a_threshold_that_is_one,
    a_divisor_that_is_one,
    a_number_that_is_nothing,
    a_product_that_is_nothing,
    less_than_nothing,
]


def rewritten(gm, example_inputs):
    """What is put in the graph's place, run as it is: what is attacked is the rewrite, not Inductor."""
    return (decide(gm, example_inputs, OPTIONS).rewritten or gm).forward


def attention(mask):
    def f(q, k, v):
        return (q @ k.mT * mask(torch.arange(q.shape[2]))) @ v

    return f


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, N, n, generator=generator) for n in (D, D, E)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("mask", ATTACKS, ids=lambda f: f.__name__)
def test_what_rounding_may_have_changed_decides_nothing(mask, dynamic):
    f, args = attention(mask), inputs()
    if dynamic:
        for x in args:
            torch._dynamo.maybe_mark_dynamic(x, 2)
    torch._dynamo.reset()
    got = torch.compile(f, backend=rewritten)(*args)
    torch.testing.assert_close(got, f(*args), rtol=1e-4, atol=1e-4)


def in_halves(i):
    return causal(i * 0.5 - 3.25)


def in_float32(i):
    return causal(i.float() * 2 + 1)


def in_sixteen_bits(i):
    return causal(i.bfloat16())


def rounded_to_integers(i):
    return causal((i.float() * 3 / 1.5).floor().long())


def counted(i):
    return causal(torch.ones(len(i)).cumsum(0))


def a_fraction_of_the_difference(i):
    rows, columns = pairs(i, i)
    return ((rows - columns) * 0.1 >= 0).float()


def beyond_a_fraction(i):
    rows, columns = pairs(i, i)
    return (rows - columns > -0.3).float()


def above_a_half(i):
    return (causal(i).half() > 0.5).float()


def minus_infinity_is_below_zero(i):
    return (torch.where(causal(i) > 0, 0.0, float("-inf")) >= 0).float()


def nothing_of_one_tensor(i):
    numbers = torch.full((1, 1), -0.1)
    return causal(i) * torch.exp(numbers[0, :, None] - numbers[0])


EXACT = [
    nothing_of_one_tensor,
    in_halves,
    in_float32,
    in_sixteen_bits,
    rounded_to_integers,
    counted,
    a_fraction_of_the_difference,
    beyond_a_fraction,
    above_a_half,
    minus_infinity_is_below_zero,
]


@pytest.mark.parametrize("mask", EXACT, ids=lambda f: f.__name__)
def test_what_is_exact_in_its_format_is_read(mask):
    torch._dynamo.reset()
    report = lacompile.explain(attention(mask), validate="off")(*inputs())
    assert len(report.rewrites) == 1, str(report)


RATES_IN_A_SHORT_FORMAT = {
    "filled like": lambda dtype: torch.full_like(torch.ones(2, dtype=dtype), 0.9985),
    "filled anew": lambda dtype: torch.ones(1, dtype=dtype).new_full((2,), 0.9985),
    "filled in place": lambda dtype: torch.empty(2, dtype=dtype).fill_(0.9985),
    "scaled": lambda dtype: torch.ones(2, dtype=dtype) * 0.9985,
    "taken away": lambda dtype: 1 - torch.tensor([0.0015, 0.03], dtype=dtype),
    "cast": lambda dtype: torch.tensor([0.9985, 0.97]).to(dtype),
    "multiplied": lambda dtype: torch.tensor([0.99, 0.97], dtype=dtype) * torch.tensor([0.99, 0.97], dtype=dtype),
    "a root": lambda dtype: torch.tensor([0.99, 0.97], dtype=dtype) ** 0.5,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RATES_IN_A_SHORT_FORMAT)
def test_a_rate_decays_as_its_format_leaves_it(name, dtype):
    """In bf16 0.9985 is 1: over 200 tokens a third of the result."""

    def run(q, k, v):
        rate = RATES_IN_A_SHORT_FORMAT[name](dtype).to(q.dtype)[:, None, None]
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        return (q @ k.mT * torch.where(distance >= 0, rate ** distance.clamp(min=0), 0.0)) @ v

    q, k, v = (torch.randn(1, 2, 200, 4).abs() for _ in range(3))
    eager = run(q, k, v)
    torch._dynamo.reset()
    reports = []

    def backend(gm, example_inputs):
        decision = decide(gm, example_inputs, Options())
        reports.append(decision.report)
        return (decision.rewritten or gm).forward

    torch.testing.assert_close(torch.compile(run, backend=backend)(q, k, v), eager, rtol=1e-4, atol=1e-4)
    assert len(reports[0].rewrites) == 1, str(reports[0])

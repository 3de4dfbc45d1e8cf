"""Numbers that the sizes of a call decide, as factors: the root of the head's features, one over a length.

Each program is compiled with symbolic sizes, and rewritten; called at another length nothing is compiled anew.
"""

import math

import pytest
import torch

from lacompile.testing import assert_refused, assert_rewritten

B, H, D, E = 2, 3, 8, 6
SHORT, LONG = 12, 29


def arguments(n, e=E):
    generator = torch.Generator().manual_seed(n)
    made = [torch.randn(B, H, n, d, generator=generator) for d in (D, D, e)]
    return [x.requires_grad_() for x in made]


FACTORS = {}


def scores(f):
    """``f(scores, q)`` before a causal mask."""
    FACTORS[f.__name__] = lambda q, k, v: f(q @ k.mT, q).tril() @ v
    return f


def whole(f):
    FACTORS[f.__name__] = f
    return f


@scores
def over_the_root_of_the_features(s, q):
    return s / math.sqrt(q.shape[-1])


@scores
def power_of_the_features(s, q):
    return s * q.shape[-1] ** -0.5


@scores
def over_the_features(s, q):
    return s / q.shape[-1]


@scores
def over_the_length(s, q):
    return s / q.shape[2]


@scores
def times_one_over_the_length(s, q):
    return s * (1 / q.shape[2])


@whole
def queries_times_the_length(q, k, v):
    return (q * q.shape[2] @ k.mT).tril() @ v


@whole
def values_times_the_length(q, k, v):
    return (q @ k.mT).tril() @ (v * q.shape[2])


@whole
def a_mask_times_the_length(q, k, v):
    n = q.shape[2]
    return (q @ k.mT * (torch.ones(n, n).tril() * n)) @ v


@whole
def a_decay_of_as_many_steps_as_there_are(q, k, v):
    slopes, i = torch.tensor([0.1, 0.2, 0.3])[:, None, None], torch.arange(q.shape[2])
    weights = torch.exp(-slopes * (i[:, None] - i)).tril()
    return (q @ k.mT * weights) @ v * torch.exp(-slopes * q.shape[2])


@scores
def times_the_length(s, q):
    return s * q.shape[2]


@scores
def over_the_root_of_the_length(s, q):
    return s / math.sqrt(q.shape[2])


@scores
def several_numbers(s, q):
    return s / q.shape[2] * math.sqrt(q.shape[-1]) / 3


@whole
def behind_the_mask(q, k, v):
    return ((q @ k.mT).tril() / math.sqrt(q.shape[-1])) @ v


@whole
def a_mask_over_the_length(q, k, v):
    n = q.shape[2]
    return (q @ k.mT * (torch.ones(n, n).tril() / n)) @ v


@whole
def of_a_function_of_queries(q, k, v):
    return (torch.relu(q * q.shape[-1] ** -0.5) @ torch.relu(k / q.shape[2]).mT).tril() @ v


@whole
def of_keys_and_values(q, k, v):
    return (q @ (k / q.shape[2]).mT).tril() @ (v * math.sqrt(q.shape[2]))


@whole
def a_square(q, k, v):
    return ((q @ k.mT / math.sqrt(q.shape[-1])) ** 2).tril() @ v


@whole
def a_decay_over_the_length(q, k, v):
    n = q.shape[2]
    i = torch.arange(n)
    return (q @ k.mT * torch.exp(-(i[:, None] - i) / n).tril()) @ v


@whole
def a_decay_over_the_root_of_the_length(q, k, v):
    n = q.shape[2]
    i = torch.arange(n)
    return (q @ k.mT * torch.exp(-(i[:, None] - i) / math.sqrt(n)).tril()) @ v


@whole
def states(q, k, v):
    n = q.shape[2]
    return torch.einsum("bhnd,bhnde->bhne", q, (k[..., None] * v[..., None, :] / n).cumsum(2))


OF_THE_LENGTH = [name for name in FACTORS if "length" in name]
OF_THE_LENGTH += ["a_decay_of_as_many_steps_as_there_are", "of_keys_and_values", "states"]
OF_THE_FEATURES = [
    "power_of_the_features", "over_the_features", "several_numbers", "behind_the_mask", "of_a_function_of_queries",
    "a_square",
]  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_LENGTH)
def test_at_a_second_length(name):
    assert_rewritten(FACTORS[name], *arguments(LONG), after=arguments(SHORT), compiled=False)


@pytest.mark.parametrize("name", [*OF_THE_FEATURES, "times_the_length", "a_mask_over_the_length", "states"])
def test_with_all_sizes_symbolic(name):
    assert_rewritten(FACTORS[name], *arguments(LONG), dynamic=True, compiled=False)


@pytest.mark.parametrize("name", ["over_the_root_of_the_features", "over_the_length", "a_decay_over_the_length"])
def test_through_inductor(name):
    assert_rewritten(FACTORS[name], *arguments(LONG), dynamic=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_other_formats(dtype):
    def program(q, k, v):
        return (q @ k.mT / math.sqrt(q.shape[-1]) / q.shape[2]).tril() @ v

    args = [x.detach().to(dtype).requires_grad_() for x in arguments(LONG)]
    assert_rewritten(program, *args, dynamic=True, compiled=False)


def test_the_number_is_that_of_each_call():
    """One compilation serves all lengths: neither is the number of the first baked in, nor is there a guard on it."""

    def program(q, k, v):
        return (q @ k.mT / q.shape[2] * math.sqrt(q.shape[2])).tril() @ v

    graphs = []

    def backend(gm, example_inputs):
        from lacompile.backend import decide
        from lacompile.options import Options

        decision = decide(gm, example_inputs, Options.split({})[0])
        assert len(decision.report.rewrites) == 1, decision.report
        graphs.append(gm)
        return decision.rewritten.forward

    torch._dynamo.reset()
    made = torch.compile(program, backend=backend, dynamic=True)
    for n in (LONG, SHORT, 64, 3):
        args = [x.detach() for x in arguments(n)]
        torch.testing.assert_close(made(*args), program(*args))
    assert len(graphs) == 1


def test_a_number_of_each_part_of_a_sum_is_its_own():
    """The diagonal is divided by the length, and what is below it is not: two weights, and no decay of one."""

    def program(q, k, v):
        s = q @ k.mT
        return (s.tril(-1) + s.tril() * torch.eye(q.shape[2]) / q.shape[2]) @ v

    assert_rewritten(program, *arguments(LONG), after=arguments(SHORT), compiled=False, count=1)


def test_a_scale_of_one_part_alone():
    """What a chunk reads of its own tokens is divided by a number; what it reads of the state is not."""

    def program(q, k, v, c):
        n, half = c.shape[0], q.shape[2] // 2
        (a, b), (ka, _), (va, _) = (x.split(half, 2) for x in (q, k, v))
        kb, vb = k[:, :, half:], v[:, :, half:]
        first = (a @ ka.mT / math.sqrt(n)).tril() @ va
        second = (b @ kb.mT / math.sqrt(n)).tril() @ vb + b @ (ka.mT @ va)
        return torch.cat([first, second], 2)

    assert_rewritten(
        program, *arguments(16), torch.zeros(9), after=(*arguments(16), torch.zeros(4)), compiled=False, count=0
    )


def refused_at_a_second_length(program):
    """Nothing is rewritten where the length is a symbol."""
    assert_rewritten(program, *arguments(LONG), after=arguments(SHORT), compiled=False, count=0)


def test_softmax_of_scaled_scores():
    def program(q, k, v):
        n = q.shape[2]
        s = (q @ k.mT / math.sqrt(n)).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        return s.softmax(-1) @ v

    assert_refused(program, *arguments(LONG))
    refused_at_a_second_length(program)


def test_a_bound_that_is_a_number_of_the_call():
    def program(q, k, v):
        return (q @ k.mT / math.sqrt(q.shape[2])).clamp(max=q.shape[2] / 100).tril() @ v

    refused_at_a_second_length(program)


def test_a_power_that_is_a_number_of_the_call():
    def program(q, k, v):
        return ((q @ k.mT).abs() ** (q.shape[2] / 20)).tril() @ v

    refused_at_a_second_length(program)


def test_a_window_as_wide_as_a_root_of_the_length():
    def program(q, k, v):
        n = q.shape[2]
        i = torch.arange(n)
        distance = i[:, None] - i
        near = (distance >= 0) & (distance / math.sqrt(n) < 1.5)
        return (q @ k.mT / n * near) @ v

    refused_at_a_second_length(program)


def test_no_mask_at_all():
    def program(q, k, v):
        return (q @ k.mT / q.shape[2]) @ v

    refused_at_a_second_length(program)

"""Programs that were once rewritten into something else, each beside one that may be rewritten."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_refused, assert_rewritten

B, H, N, D, E = 2, 3, 8, 4, 3
OFF = {"validate": "off"}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def arguments():
    return randn(B, H, N, D), randn(B, H, N, D, seed=1), randn(B, H, N, E, seed=2)


def attention(q, k, v):
    return (q @ k.mT).tril() @ v


# --------------------------------------------------------------------------------------- a state that is read by halves


def chunks(feature, read):
    def run(q, other, k, v, state, second):
        before, out = 0, []
        for c in range(0, N, 4):
            mine = feature(q[:, :, c : c + 4], other[:, :, c : c + 4])
            kc, vc = k[:, :, c : c + 4], v[:, :, c : c + 4]
            inner = attention(mine, kc, vc) + read(q[:, :, c : c + 4], other[:, :, c : c + 4], state, second)
            out.append(inner + mine @ before if c else inner)
            before = before + kc.mT @ vc
        return torch.cat(out, 2)

    return run


def state_arguments():
    q, k, v = arguments()
    return q, randn(B, H, N, D, seed=3), k, v, randn(B, H, D, E, seed=4), randn(B, H, D, seed=5)


def halves(a, b, state, second):
    return (a.exp() @ state) * (b.exp() @ second[..., None])


def whole(a, b, state, second):
    return (a.exp() * b.exp()) @ (state * second[..., None])


def test_a_state_read_by_the_product_of_queries():
    assert_rewritten(chunks(lambda a, b: a.exp() * b.exp(), whole), *state_arguments(), compiled=False, options=OFF)


def test_a_product_of_two_reads():
    """Summed over two features apart: the queries of either are a factor of the keys' queries."""
    assert_refused(chunks(lambda a, b: a.exp() * b.exp(), halves), *state_arguments(), options=OFF)


# ------------------------------------------------------------------------------------ functions of what has been padded


def test_a_function_of_padding_that_is_padded_again():
    """The cosine of zero is one: a function that is read beyond the ends of its argument is not zero there."""

    distance = torch.arange(N)[:, None] - torch.arange(N)

    def run(q, v, x):
        turned = F.pad(x, (0, 0, 1, 1)).cos()
        held = turned[:, :, 1:-1]
        k = F.pad(turned[:, :, 1:], (0, 0, 0, 1))
        return (q @ k.mT * torch.where(distance >= 0, 0.9**distance, 0.0)) @ v, held

    q, _, v = arguments()
    assert_refused(run, q, v, randn(B, H, N - 2, D, seed=6), options=OFF)


# --------------------------------------------------------------------------------------- values that were written since


def written(*writes):
    def run(q, k, v):
        k = k @ torch.eye(D)
        for write in writes:
            write(k)
        return attention(q, k.exp(), v)

    return run


WRITES = {
    "a number": [lambda k: k.add_(1.0)],
    "scaled": [lambda k: k.mul_(0.5), lambda k: k.add_(1.0)],
    "twice": [lambda k: k.add_(1.0), lambda k: k.mul_(0.5), lambda k: k.add_(2.0)],
    "through a view": [lambda k: k.view(B, H, -1).add_(1.0)],
}


@pytest.mark.parametrize("name", WRITES)
def test_a_value_that_was_written_to(name):
    """What a node holds after a write is no longer what it computed: the writer is read."""
    assert_rewritten(written(*WRITES[name]), *arguments(), compiled=False, options=OFF)


def test_before_and_after_a_write():
    def run(q, k, v):
        k = k.detach() @ torch.eye(D)
        before = k.exp()
        k.add_(1.0)
        return attention(q, before, v), attention(q, k.exp(), v)

    assert_rewritten(run, *arguments(), count=2, compiled=False, options=OFF)


# --------------------------------------------------------------------------------------------- numbers in fp64


def listed(entry):
    weight = [[0.9 ** (i - j) if i >= j else 0.0 for j in range(N)] for i in range(N)]
    weight[5][2] *= entry

    def run(q, k, v):
        return (q @ k.mT * torch.tensor(weight, dtype=torch.float64)) @ v

    return run


def test_listed_numbers_in_fp64():
    inputs = [x.detach().double().requires_grad_() for x in arguments()]
    assert_rewritten(listed(1.0), *inputs, compiled=False, options=OFF)
    assert_refused(listed(1 + 1e-8), *inputs, options=OFF)


# --------------------------------------------------------------------------------------------- gates that forget all


@pytest.mark.parametrize("reset", [float("-inf"), -1e38, -1e9])
def test_a_recurrence_that_is_reset(reset):
    """The decays behind a reset are what they are: a sum that holds the reset keeps nothing of them."""

    def run(q, k, v, g):
        state, out = 0, []
        for t in range(N):
            state = state * g[:, :, t, None, None].exp() + k[:, :, t, :, None] * v[:, :, t, None, :]
            out.append((q[:, :, t, None] @ state).squeeze(2))
        return torch.stack(out, 2)

    gates = -randn(B, H, N, seed=7).detach().abs()
    gates[..., 3] = reset
    assert_rewritten(run, *arguments(), gates.requires_grad_(), compiled=False, options=OFF)


# ----------------------------------------------------------------------------------------------- zero times infinity


@pytest.mark.parametrize("made", [lambda m: (1 - m) * float("-inf"), lambda m: m * m.log()])
def test_a_mask_that_is_no_number_where_it_selects(made):
    """What the program computes is no number in some place of each row: no mask may come of it."""

    def run(q, k, v):
        return (q @ k.mT * made(torch.ones(N, N).tril()).exp()) @ v

    assert_refused(run, *arguments(), options=OFF)

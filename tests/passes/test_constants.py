"""Masks that no rule reads are known by their numbers, and near twins of them."""

from __future__ import annotations

import pytest
import torch

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D, E, C = 2, 2, 24, 8, 6, 8
RATES = [0.9, 0.8]
SHAPE = (B, H, N, D, E)


def rates():
    return torch.tensor(RATES)


def at_indices(g, n=N, offset=0):
    i, j = torch.tril_indices(n, n, offset)
    mask = torch.zeros(len(g), n, n)
    mask[:, i, j] = g[:, None] ** (i - j).float()
    return mask


def by_diagonals(g, n=N):
    return sum(torch.diag_embed((g**t)[:, None].expand(-1, n - t), -t) for t in range(n))


def rolled(g, n=N):
    powers, i = g[:, None] ** torch.arange(n), torch.arange(n)
    return torch.stack([torch.roll(powers.flip(-1), t + 1, -1) * (i <= t) for t in range(n)], 1)


def strides_over_a_vector(g, n=N):
    powers = torch.cat([g[:, None] ** torch.arange(n - 1, -1, -1), torch.zeros(len(g), n - 1)], 1)
    return torch.as_strided(powers, (len(g), n, n), (2 * n - 1, 1, 1)).flip(1)


def rows_that_grow(g, n=N):
    row, rows = torch.ones(len(g), 1), []
    for t in range(n):
        rows.append(torch.nn.functional.pad(row, (0, n - t - 1)))
        row = torch.cat([row * g[:, None], torch.ones(len(g), 1)], 1)
    return torch.stack(rows, 1)


def inverse(g, n=N):
    return torch.linalg.inv(torch.eye(n) - g[:, None, None] * torch.diag(torch.ones(n - 1), -1))


def solved(g, n=N):
    step = g[:, None, None] * torch.diag(torch.ones(n - 1), -1)
    return torch.linalg.solve_triangular(torch.eye(n) - step, torch.eye(n).expand(len(g), n, n), upper=False)


def of_later_positions(g, n=N):
    return at_indices(g, n).mT


MASKS = (at_indices, of_later_positions, by_diagonals, rolled, strides_over_a_vector, rows_that_grow, inverse, solved)


@pytest.mark.parametrize("mask", MASKS)
def test_of_all_pairs(mask):
    assert_rewritten(lambda q, k, v: (q @ k.mT * mask(rates())) @ v, *qkv(*SHAPE), compiled=False)


def chunks(q, k, v, mask, *, steps=C, others=RATES):
    g = torch.tensor(others)[:, None]
    inside, i, state, out = mask(rates(), C), torch.arange(C), torch.zeros(B, H, D, E), []
    for a in range(0, N, C):
        qq, kk, vv = (x[:, :, a : a + C] for x in (q, k, v))
        out.append((qq @ kk.mT * inside) @ vv + (qq * (g ** (i + 1))[..., None]) @ state)
        state = state * (g**steps)[..., None] + (kk * (g ** (C - 1 - i))[..., None]).mT @ vv
    return torch.cat(out, 2)


@pytest.mark.parametrize("mask", [at_indices, by_diagonals])
def test_of_a_chunk_beside_the_rates_as_they_are_written(mask):
    assert_rewritten(lambda q, k, v: chunks(q, k, v, mask), *qkv(*SHAPE), compiled=False)


@pytest.mark.parametrize("other", [{"steps": C + 1}, {"others": [0.9, 0.8001]}])
def test_of_a_chunk_beside_other_rates(other):
    assert_refused(lambda q, k, v: chunks(q, k, v, at_indices, **other), *qkv(*SHAPE))


def test_rows_of_a_mask_are_read_one_by_one():
    def rows(q, k, v):
        mask = at_indices(rates())
        return torch.stack([((q[:, :, t : t + 1] @ k.mT * mask[:, t : t + 1]) @ v)[:, :, 0] for t in range(N)], 2)

    assert_rewritten(rows, *qkv(*SHAPE), compiled=False)


def test_a_mask_of_booleans():
    def hidden(q, k, v):
        i, j = torch.triu_indices(N, N, offset=1)
        seen = torch.ones(N, N, dtype=torch.bool)
        seen[i, j] = False
        return (q @ k.mT).masked_fill(~seen, 0) @ v

    assert_rewritten(hidden, *qkv(*SHAPE), compiled=False)


def written_at_indices(mask, x):
    i, j = torch.tril_indices(N, N)
    mask[i, j] = 0.9 ** (i - j).to(x)
    return mask


def like_the_scores(q):
    return torch.zeros_like(q[0, 0] @ q[0, 0].mT)


@pytest.mark.parametrize(
    "empty", [lambda q: torch.zeros(N, N).to(q), lambda q: q.new_zeros(N, N), lambda q: torch.zeros(N, N).type_as(q)]
)
def test_of_the_format_that_data_has(empty):
    """Of the data no number is read; in the twin one is."""

    def run(q, k, v):
        return (q @ k.mT * written_at_indices(empty(q), q)) @ v

    def of_data(q, k, v):
        return (q @ k.mT * written_at_indices(empty(q) + q[0, 0, :, :1], q)) @ v

    assert_rewritten(run, *qkv(*SHAPE), compiled=False)
    assert_refused(of_data, *qkv(*SHAPE))


def test_of_the_shape_that_data_has():
    """The type is that of the second argument, the numbers are those of the first."""

    def run(q, k, v):
        return (q @ k.mT * written_at_indices(like_the_scores(q), q)) @ v

    def of_data(q, k, v):
        weights = q[0, 0, :, 0].expand(N, N).type_as(torch.ones(N)).clone()
        return (q @ k.mT * written_at_indices(weights, q)) @ v

    assert_rewritten(run, *qkv(*SHAPE), compiled=False)
    assert_refused(of_data, *qkv(*SHAPE))


def one_entry_off(g):
    mask = at_indices(g)
    mask[:, 5, 2] = 0.5
    return mask


def windowed(g):
    i, j = torch.tril_indices(N, N)
    mask = torch.zeros(len(g), N, N)
    mask[:, i, j] = g[:, None] ** (i - j).float() * (i - j < 7)
    return mask


def drawn(g):
    return at_indices(g).mul_(torch.bernoulli(torch.full((N, N), 0.5)))


@pytest.mark.parametrize(
    "mask",
    [one_entry_off, windowed, lambda g: at_indices(g, offset=1), lambda g: at_indices(1 / g)],
)
def test_other_masks(mask):
    assert_refused(lambda q, k, v: (q @ k.mT * mask(rates())) @ v, *qkv(*SHAPE))


def test_a_mask_with_something_drawn_is_no_constant():
    assert_refused(lambda q, k, v: (q @ k.mT * drawn(rates())) @ v, *qkv(*SHAPE), obligation="separable")


def test_a_mask_that_data_is_written_into_is_no_constant():
    def written(q, k, v):
        mask = at_indices(rates())
        mask[:, 3, 1] += q.detach()[0, 0, 0, 0] * 0
        return (q @ k.mT * mask) @ v

    assert_refused(written, *qkv(*SHAPE))


def test_a_mask_that_is_written_over_between_two_products():
    def twice(q, k, v):
        mask = at_indices(rates())
        first = (q @ k.mT * mask) @ v
        mask.mul_(0.5)
        return first, (q @ k.mT * mask) @ v

    assert_rewritten(twice, *(x.detach() for x in qkv(*SHAPE)), count=2, grads=False, compiled=False)


def test_of_the_order_in_memory_that_data_has():
    """``zeros_like`` keeps it: in the twins a view by strides reads other entries, and what is flattened is a copy."""

    def by_strides(like):
        mask = torch.zeros_like(like)
        mask.as_strided((N, N), (N, 1)).copy_(torch.ones(N, N).tril())
        return mask

    def flattened(like):
        mask = written_at_indices(torch.zeros_like(like), like)
        mask[3, 1] = 0.5
        mask.reshape(-1)[3 * N + 1 : 3 * N + 2].fill_(0.9**2)
        return mask

    for mask in (by_strides, flattened):
        x = torch.randn(N, N)
        assert_rewritten(lambda q, k, v, m, mask=mask: (q @ k.mT * mask(m)) @ v, *qkv(*SHAPE), x, compiled=False)
        assert_refused(
            lambda q, k, v, m, mask=mask: (q @ k.mT * mask(m.mT)) @ v, *qkv(*SHAPE), x, options={"validate": "off"}
        )


def test_a_tensor_that_is_read_twice_lends_nothing_alone():
    def run(q, k, v, x):
        return (q @ k.mT * written_at_indices(x.new_tensor(data=x), x)) @ v

    assert "internal-error" not in str(assert_refused(run, *qkv(*SHAPE), torch.randn(N, N)))

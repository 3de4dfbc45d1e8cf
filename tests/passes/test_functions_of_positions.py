"""Running means, and what else is a smooth function of positions, where their number is a symbol; near twins."""

import pytest
import torch

from lacompile.testing import assert_refused, assert_rewritten

B, H, D, E = 2, 3, 8, 6
SHORT, LONG = 12, 29
PROGRAMS = {}


def arguments(n):
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(B, H, n, d, generator=generator).requires_grad_() for d in (D, D, E)]


def weighs(f):
    """``f(n)`` weighs the pairs below the diagonal."""
    PROGRAMS[f.__name__] = lambda q, k, v: (q @ k.mT * f(q.shape[2])) @ v
    return f


@weighs
def mean(n):
    w = torch.ones(n, n).tril()
    return w / w.sum(-1, keepdim=True)


@weighs
def mean_by_number(n):
    return torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]


@weighs
def mean_of_those_before(n):
    w = torch.ones(n, n).tril(-1)
    return w / w.sum(-1, keepdim=True).clamp(min=1)


@weighs
def root_of_the_key(n):
    return torch.ones(n, n).tril() / torch.arange(1, n + 1).sqrt()


@weighs
def logarithm_of_the_row(n):
    return torch.ones(n, n).tril() * torch.log(torch.arange(2, n + 2))[:, None]


@weighs
def from_the_end(n):
    return torch.ones(n, n).tril() / (n - torch.arange(n))[:, None]


@weighs
def root_of_the_length(n):
    return torch.ones(n, n).tril() * torch.rsqrt(torch.tensor(n))


def states(q, k, v):
    n = q.shape[2]
    summed = (k[..., None] * v[..., None, :]).cumsum(2)
    return torch.einsum("bhnd,bhnde->bhne", q, summed / torch.arange(1, n + 1)[:, None, None])


def a_feature_map_of_scaled_queries(q, k, v):
    return (torch.relu(q * torch.rsqrt(torch.tensor(q.shape[2]))) @ torch.relu(k).mT).tril() @ v


PROGRAMS |= {f.__name__: f for f in (states, a_feature_map_of_scaled_queries)}


@pytest.mark.parametrize("name", PROGRAMS)
def test_at_a_second_length(name):
    assert_rewritten(PROGRAMS[name], *arguments(LONG), after=arguments(SHORT), compiled=False)


@pytest.mark.parametrize("name", ["mean", "states"])
def test_through_inductor(name):
    assert_rewritten(PROGRAMS[name], *arguments(LONG), after=arguments(SHORT))


def test_more_positions_than_a_table_holds():
    def program(q, k, v):
        summed = (k[..., None] * v[..., None, :]).cumsum(1)
        return torch.einsum("bnd,bnde->bne", q, summed / torch.arange(1, q.shape[1] + 1)[:, None, None])

    args = [torch.randn(1, 5000, 4, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    assert_rewritten(program, *args, grads=False, compiled=False)


TWINS = {}


def twin(f):
    TWINS[f.__name__] = lambda q, k, v: (q @ k.mT * f(q.shape[2])) @ v
    return f


@twin
def a_function_of_the_distance(n):
    i = torch.arange(n)
    return torch.ones(n, n).tril() / (1 + (i[:, None] - i).abs())


@twin
def a_root_of_the_distance(n):
    i = torch.arange(n)
    return (i[:, None] - i).clamp(min=0).float().sqrt()


@twin
def a_comparison_of_roots(n):
    r = torch.arange(1, n + 1).sqrt()
    return (r[:, None] >= r * 1.5).float()


@twin
def a_logarithm_of_nothing(n):
    i = torch.arange(n)
    return torch.log(-1 - (i[:, None] - i).abs()).nan_to_num() + 1


@twin
def a_mean_of_all(n):
    w = torch.ones(n, n)
    return w / w.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", TWINS)
def test_twin(name):
    assert_refused(TWINS[name], *arguments(LONG))
    assert_rewritten(TWINS[name], *arguments(LONG), after=arguments(SHORT), count=0, compiled=False)

"""Distances of positions, infinite where there is none, that a layer keeps or is handed; and near twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D = 1, 3, 10, 4
INF = float("inf")


def operands(n: int = N) -> list[Tensor]:
    return qkv(B, H, n, D)


def distances(n: int = N, later: float = INF, dtype: torch.dtype = torch.float32) -> Tensor:
    at = torch.arange(n)
    apart = (at[:, None] - at).to(dtype)
    return apart.masked_fill(apart < 0, later)


class Layer(nn.Module):
    """Weighs by the powers of a rate for each head; ``kept`` are distances that it does not need to be handed."""

    rates: Tensor
    kept: Tensor

    def __init__(self, kept: Tensor | None = None, numbers: bool = False):
        super().__init__()
        self.numbers = numbers
        self.register_buffer("rates", (1 - 2.0 ** (-3 - torch.arange(H))).log())
        self.register_buffer("kept", kept)

    def forward(self, q, k, v, apart=None):
        apart = self.kept if apart is None else apart
        weights = (self.rates[:, None, None] * apart).exp()
        weights = weights.nan_to_num() if self.numbers else weights
        return (q @ k.mT * weights) @ v


@pytest.mark.parametrize("numbers", [False, True])
def test_a_layer_that_keeps_or_is_handed_distances(numbers):
    assert_rewritten(Layer(distances(), numbers), *operands())
    assert_rewritten(Layer(None, numbers), *operands(), distances(), compiled=False)


@pytest.mark.parametrize("make", [lambda: distances()[None, None], lambda: distances(dtype=torch.bfloat16)])
def test_distances_in_other_shapes_and_formats(make):
    assert_rewritten(Layer(), *operands(), make(), compiled=False, dtype=torch.bfloat16)


def test_distances_to_later_positions():
    assert_rewritten(Layer(), *operands(), distances().mT.contiguous(), compiled=False)


def test_at_any_length():
    report = assert_rewritten(Layer(), *operands(), distances(), compiled=False, dynamic=True)
    assert not report.rewrites[0].length.isdigit()


# -------------------------------------------------------------------------------------------------------------- twins


def changed(row: int, column: int, number: float) -> Tensor:
    made = distances()
    made[row, column] = number
    return made


TWINS = {
    "a later one is seen": lambda: changed(3, 5, 2.0),
    "an earlier one is not": lambda: changed(5, 3, INF),
    "one is further away": lambda: changed(5, 3, 3.0),
    "squares": lambda: distances() ** 2,
    "some is no number": lambda: changed(5, 3, float("nan")),
}


@pytest.mark.parametrize("name", TWINS)
def test_other_numbers(name):
    assert_refused(Layer(), *operands(), TWINS[name](), options={"validate": "off"})
    assert_refused(Layer(TWINS[name]()), *operands(), options={"validate": "off"})


def test_what_a_short_format_has_rounded():
    n = 300
    assert_refused(Layer(), *operands(n), distances(n, dtype=torch.bfloat16), options={"validate": "off"})


def test_the_original_graph_serves_other_numbers(without_inductor):
    torch._dynamo.reset()
    layer = Layer()
    run = torch.compile(layer, backend="lightning", dynamic=False)
    for apart in (distances(), changed(5, 3, 3.0), distances().clone(), changed(3, 5, 2.0), 2 * distances()):
        args = [*operands(), apart]
        torch.testing.assert_close(run(*args), layer(*args))


def test_one_graph_serves_all_lengths(without_inductor):
    torch._dynamo.reset()
    layer = Layer()
    run = torch.compile(layer, backend="lightning", dynamic=True)
    for n in (N, N + 3, N - 4):
        for apart in (distances(n), distances(n, later=0.0)):
            torch.testing.assert_close(run(*operands(n), apart), layer(*operands(n), apart))

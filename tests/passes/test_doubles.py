"""A value that a recipe reads in place of another one: what makes the two the same, and how it was rounded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lacompile.testing import assert_refused, assert_rewritten

B, N, D = 2, 6, 4
X, V = (torch.randn(B, N, D, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in range(2))


class Tokens(nn.Module):
    """Keys by a layer in a loop, and the same layer of a changed token on the side."""

    def __init__(self, changed):
        super().__init__()
        self.changed = changed
        self.register_buffer("mask", torch.ones(N, N).tril())
        self.key = nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor, v: Tensor):
        state, out, side = x.new_zeros(B, D, D), [], []
        for t in range(N):
            side.append(self.key(self.changed(self, x[:, t], t)).softmax(-1))
            k = self.key(x[:, t]).softmax(-1)
            state = 0.9 * state + k[:, :, None] * v[:, t, None]
            out.append((x[:, t].cos()[:, None] @ state)[:, 0])
        return torch.stack(out, 1), side[0].sum()


class Square(nn.Module):
    """Keys by a function, and the same function of positions that a buffer lists, beforehand."""

    def __init__(self):
        super().__init__()
        self.register_buffer("positions", torch.arange(N))

    def forward(self, x: Tensor, v: Tensor):
        side, k = x[:, self.positions].sin(), x.sin()
        i = torch.arange(N)
        mask = torch.where(i[:, None] >= i, 0.9 ** (i[:, None] - i).clamp(min=0).float(), 0.0)
        return (x.cos() @ k.mT * mask) @ v, side


def test_the_numbers_that_make_a_side_result_the_same_are_assumed():
    """What a loop held first is read, and it is the keys because the last row of the mask is ones."""
    module = Tokens(lambda self, x, t: x * self.mask[-1, t])
    report = assert_rewritten(module, X, V, count=1, compiled=False)
    assert any("mask" in text for text in report.rewrites[0].assumptions)


def test_positions_that_make_a_function_the_same_are_assumed():
    report = assert_rewritten(Square(), X, V, count=1, compiled=False, options={"validate": "off"})
    assert any("positions" in text for text in report.rewrites[0].assumptions)


def test_numbers_that_no_factor_rests_on_are_not():
    module = Tokens(lambda self, x, t: x * (3 * self.mask[-1, t]))
    report = assert_rewritten(module, X, V, count=1, compiled=False)
    assert not report.rewrites[0].assumptions


def test_a_side_result_in_eight_bits_is_another():
    module = Tokens(lambda self, x, t: x.to(torch.float8_e4m3fn).to(x.dtype))
    assert_rewritten(module, X, V, count=1, compiled=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_side_result_that_was_rounded_is_not_read(dtype):
    module = Tokens(lambda self, x, t: x.to(dtype).to(x.dtype))
    assert_refused(module, X, V, obligation="emission")

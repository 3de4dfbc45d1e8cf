"""Layers that take turns in a loop over tokens, behind norms of every kind and gated networks; and near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lacompile.testing import assert_refused, assert_rewritten

from .test_alternating_layers import UNSEEN, C, Model, data


class Rms(nn.Module):
    """Written out: what the residual reads is what the norm does."""

    def __init__(self, inner=lambda x: x):
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.ones(C)), inner

    def forward(self, x):
        y = self.inner(x)
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Centred(nn.Module):
    def forward(self, x):
        y = x - x.mean(-1, keepdim=True)
        return y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


class Unit(nn.Module):
    def forward(self, x):
        return F.normalize(x, dim=-1)


class Gated(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.up, self.down = norm, nn.Linear(C, 24), nn.Linear(12, C)

    def forward(self, x):
        a, b = self.up(self.norm(x)).chunk(2, -1)
        return self.down(F.silu(a) * b)


NORMS = {
    "nn.RMSNorm": lambda: nn.RMSNorm(C),
    "without a weight": lambda: nn.RMSNorm(C, elementwise_affine=False),
    "written out": Rms,
    "in fp32": lambda: Rms(lambda x: x.float()),
    "centred by hand": Centred,
    "of length one": Unit,
    "layer norm": lambda: nn.LayerNorm(C),
}


class Normed(Model):
    def __init__(self, norm, count=2, network=True):
        super().__init__(count)
        for layer in self.layers:
            layer.norm = norm()
            layer.mlp = Gated(norm()) if network else None


@pytest.mark.parametrize("name", NORMS)
def test_each_layer_is_found(name):
    report = assert_rewritten(Normed(NORMS[name]), data(), count=2, compiled=False)
    assert not report.near_misses


@pytest.mark.parametrize("name", ["nn.RMSNorm", "written out"])
def test_without_networks(name):
    report = assert_rewritten(Normed(NORMS[name], network=False), data(), count=2, compiled=False, options=UNSEEN)
    assert not report.near_misses


def test_three_layers():
    assert_rewritten(Normed(Rms, 3), data(), count=3, compiled=False, options=UNSEEN)


def test_a_batch_of_any_size():
    after = (data(batch=3).detach(),)
    assert_rewritten(Normed(Rms), data(batch=5), count=2, compiled=False, after=after)


# -------------------------------------------------------------------------------------------------------------- twins


class FedBack(Normed):
    """The first layer's token has a part of what the second one left of the token before."""

    def forward(self, x):
        first, second = self.layers
        states, out, last = [x.new_zeros(x.shape[0], 2, 4, 4)] * 2, [], torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h, states[0] = first(x[:, t] + last, states[0])
            last, states[1] = second(h, states[1])
            out.append(last)
        return torch.stack(out, 1)


class NormedByTheLast(Normed):
    """The second layer's norm is one of the first layer's last token too."""

    def forward(self, x):
        first, second = self.layers
        states, out, before = [x.new_zeros(x.shape[0], 2, 4, 4)] * 2, [], torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h, states[0] = first(x[:, t], states[0])
            y, states[1] = second(h + 0.5 * before, states[1])
            before = h
            out.append(y)
        return torch.stack(out, 1)


@pytest.mark.parametrize("name", ["nn.RMSNorm", "written out"])
def test_the_first_reads_what_the_second_left(name):
    assert_refused(FedBack(NORMS[name]), data(), options=UNSEEN)


@pytest.mark.parametrize("name", ["nn.RMSNorm", "written out"])
def test_the_second_reads_two_tokens_of_the_first(name):
    """However much is found of it, it is right."""
    assert_rewritten(NormedByTheLast(NORMS[name]), data(), count=None, compiled=False, options=UNSEEN)

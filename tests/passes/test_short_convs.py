"""Short convolutions beside attentions are sums of shifted products, which Inductor fuses; all others stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lacompile.passes.rewrite import short_convs
from lacompile.testing import assert_rewritten, head_log_decay

B, N, H, D = 2, 24, 2, 4
C = 3 * H * D


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(short_convs, "DEVICES", ("cpu", "cuda"))


class Mixer(nn.Module):
    """Retention behind a convolution over tokens ``x``: ``[B,N,C]``."""

    def __init__(self, convolution: nn.Module, n: int | None = N, features_first: bool = False):
        super().__init__()
        self.convolution, self.n, self.features_first = convolution, n, features_first
        self.register_buffer("log_decay", head_log_decay(H))

    def forward(self, x):
        mixed = self.convolution(x if self.features_first else x.mT)[..., : self.n]
        q, k, v = F.silu(mixed).view(x.shape[0], 3, H, D, -1).mT.unbind(1)
        i = torch.arange(q.shape[2], device=x.device)
        distance = i[:, None] - i
        decay = (self.log_decay[:, None, None] * distance).exp().tril().to(q.dtype)
        return (q @ k.mT * decay) @ v


def tokens(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*(shape or (B, N, C)), generator=generator).to(dtype).requires_grad_()


def depthwise(taps=4, **more):
    torch.manual_seed(0)
    return nn.Conv1d(C, C, taps, groups=C, **{"padding": taps - 1, **more})


def written(report):
    return sum("short convolution" in note for note in report.notes)


class Called(nn.Module):
    """The function, called in a way of its own."""

    def __init__(self, call):
        super().__init__()
        self.own, self.call = depthwise(), call

    def forward(self, x):
        return self.call(x, self.own.weight, self.own.bias)


SPELLINGS = {
    "module": depthwise(),
    "no-bias": depthwise(bias=False),
    "one-tap": depthwise(1),
    "eight-taps": depthwise(8),
    "padded-before": nn.Sequential(nn.ConstantPad1d((3, 0), 0.0), depthwise(padding=0)),
    "keywords": Called(lambda x, w, b: F.conv1d(input=x, groups=C, weight=w, bias=b, padding=(3,))),
    "written-into": nn.Sequential(depthwise(), nn.ReLU(inplace=True)),
    "positions": Called(lambda x, w, b: torch.conv1d(x, w, b, 1, 3, 1, C)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name):
    report = assert_rewritten(Mixer(SPELLINGS[name]), tokens(), compiled=False)
    assert written(report) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_rounded_once(dtype):
    report = assert_rewritten(Mixer(depthwise()).to(dtype), tokens(dtype=dtype), compiled=False)
    assert written(report) == 1


def test_the_other_layout():
    """Features first in memory, of one batch too."""
    assert written(assert_rewritten(Mixer(depthwise(), features_first=True), tokens(B, C, N), compiled=False)) == 1


def test_compiled():
    assert written(assert_rewritten(Mixer(depthwise()), tokens())) == 1


def test_symbolic_lengths():
    mixer = Mixer(depthwise(padding=0), n=None)
    mixer.convolution = nn.Sequential(nn.ConstantPad1d((3, 0), 0.0), mixer.convolution)
    report = assert_rewritten(mixer, tokens(), after=(tokens(B, N - 5, C),), compiled=False)
    assert written(report) == 1


OTHERS = {
    "nine-taps": depthwise(9),
    "dilated": depthwise(padding=6, dilation=2),
    "strided": nn.Sequential(depthwise(padding=2, stride=2), nn.Upsample(scale_factor=2)),
    "pairs-of-channels": nn.Conv1d(C, C, 4, groups=C // 2, padding=3),
    "several-of-one": nn.Sequential(nn.Conv1d(C, 2 * C, 4, groups=C, padding=3), nn.Conv1d(2 * C, C, 1)),
    "padded-by-name": depthwise(3, padding="same"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_stay(name):
    report = assert_rewritten(Mixer(OTHERS[name]), tokens(), compiled=False)
    assert not written(report)


def test_under_autocast():
    """What the library casts is not cast anew."""

    class Cast(Mixer):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    report = assert_rewritten(Cast(depthwise()), tokens(), dtype=torch.bfloat16, compiled=False)
    assert not written(report)


def test_nothing_without_an_attention():
    assert not written(assert_rewritten(depthwise(), tokens(B, C, N), count=0))


def test_on_a_cpu_they_stay(monkeypatch):
    monkeypatch.undo()
    assert not written(assert_rewritten(Mixer(depthwise()), tokens(), compiled=False))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu(dtype, monkeypatch):
    monkeypatch.undo()
    mixer = Mixer(depthwise()).to("cuda", dtype)
    x = tokens(dtype=dtype).detach().cuda().requires_grad_()
    assert written(assert_rewritten(mixer, x)) == 1

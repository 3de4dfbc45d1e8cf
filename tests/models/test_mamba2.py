"""The Mamba-2 mixer of transformers, untouched, on its plain path; models that share its scan are in ``rows``."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

import lacompile
from lacompile.testing import assert_rewritten


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("length", [20, 32, 64, 100, 128])
def test_mixer(length):
    """One chunk and several, with and without padding; two groups of four heads."""
    sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 32}
    mixer = Mamba2Mixer(transformers.Mamba2Config(expand=2, **sizes), 0)
    assert_rewritten(mixer, torch.randn(2, length, 32), compiled=False)


def test_mixer_under_autocast(without_inductor):
    """Projections and einsums in bf16: the step of a token is rounded beside its input, and not where it decays."""
    torch._dynamo.reset()
    sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 16, "chunk_size": 32}
    mixer = Mamba2Mixer(transformers.Mamba2Config(expand=2, n_groups=2, **sizes), 0)
    x = torch.randn(2, 100, 32)
    with torch.autocast("cpu", torch.bfloat16):
        got, eager = torch.compile(mixer, backend="lightning")(x), mixer(x)
    report = lacompile.last_report()
    assert report is not None and len(report.rewrites) == 1
    want = mixer.double()(x.double())
    assert (got - want).norm() < 1.1 * (eager - want).norm()

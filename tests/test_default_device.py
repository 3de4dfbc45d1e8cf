"""``torch.set_default_device``: what lacompile makes for itself is made where it says, not there."""

from __future__ import annotations

import pytest
import torch

import lacompile
from lacompile.kernels.lightning2 import selfcheck
from lacompile.testing import assert_rewritten, head_log_decay, qkv, state, token_log_decay

SLOPES = torch.tensor([0.1, 0.02])
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def masked(q, k, v):
    i = torch.arange(q.shape[2], device=q.device)
    return (q @ k.mT * torch.exp(-SLOPES.to(q.device)[:, None, None] * (i[:, None] - i)).tril()) @ v


def test_a_program_of_another_device_is_rewritten():
    inputs = qkv(1, 2, 12, 8, requires_grad=True)
    with torch.device("meta"):
        assert_rewritten(masked, *inputs, compiled=False)


def test_the_operator_and_the_inputs_of_tests():
    with torch.device("meta"):
        q, k, v = qkv(1, 2, 12, 8, requires_grad=True)
        decay = token_log_decay(1, 2, 12, requires_grad=True)
        for log_decay, start in ((head_log_decay(2), None), ([-0.1, -0.2], None), (decay, state(1, 2, 8))):
            out = lacompile.decayed_attention(q, k, v, log_decay, initial_state=start)
            assert out.device.type == "cpu"
            out.sum().backward()
    assert decay.grad is not None and q.grad is not None and q.grad.device.type == "cpu"


def test_what_kernels_are_asked():
    with torch.device("meta"):
        known = selfcheck.Integers(32, 48, torch.zeros(1, dtype=torch.float16, device="cpu"), True, False)
        assert {x.device.type for x in (known.q, known.v, known.log_decay, known.state)} == {"cpu"}


@pytest.mark.gpu
@gpu
class TestOnAGPU:
    @pytest.fixture(autouse=True)
    def default(self):
        with torch.device("cuda"):
            yield

    def test_the_first_call_of_a_kernel(self, monkeypatch):
        monkeypatch.setattr(selfcheck, "VERDICTS", {})
        q, k, v = qkv(1, 2, 200, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        lacompile.decayed_attention(q, k, v, [-0.1, -0.2]).sum().backward()
        assert selfcheck.VERDICTS and all(selfcheck.VERDICTS.values())

    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_program(self, compiled):
        assert_rewritten(masked, *qkv(1, 2, 24, 16, device="cuda", requires_grad=True), compiled=compiled)

    def test_numbers_where_sizes_are_symbolic(self):
        """Dynamo's fakes stand for the tensors there."""

        def run(q, k, v):
            i = torch.arange(q.shape[2], device=q.device)
            rates = torch.tensor([0.9, 0.98], device="cuda")[:, None, None]
            return (q @ k.mT * torch.where(i[:, None] >= i, rates ** (i[:, None] - i).clamp(min=0), 0.0)) @ v

        inputs, before = (qkv(1, 2, n, 16, device="cuda", requires_grad=True) for n in (40, 24))
        assert_rewritten(run, *inputs, after=before)

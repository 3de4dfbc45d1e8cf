"""A thread may begin its work on a GPU with the operator: ``pytest -m gpu``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lacompile import decayed_attention, decode_step
from lacompile.testing import head_log_decay, qkv

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OPERATORS = pytest.mark.parametrize("pass_", ["forward", "backward", "packed", "decode"])


def call(pass_):
    """A function that launches kernels which read tiles by descriptor, and nothing before them."""
    from lacompile.kernels import lightning2

    q, k, v = qkv(1, 4, 512, 64, dtype=torch.bfloat16, device="cuda")
    log_decay = head_log_decay(4, device="cuda")
    if pass_ == "forward":
        return lambda: decayed_attention(q, k, v, log_decay)
    if pass_ == "backward":
        return lambda: lightning2.backward(v, None, q, k, v, log_decay, 1.0, None, False)[0]
    if pass_ == "decode":
        carried = torch.zeros(1, 4, 64, 64, device="cuda")
        one = [x[:, :, :1] for x in (q, k, v)]
        return lambda: decode_step(*one, log_decay, carried.zero_())
    packed = torch.tensor([0, 100, 512], device="cuda")
    return lambda: decayed_attention(q, k, v, log_decay, cu_seqlens=packed)


@OPERATORS
@torch.no_grad()
def test_in_a_thread_that_launched_nothing_before(pass_):
    run = call(pass_)
    want = run()
    with ThreadPoolExecutor(1) as thread:
        got = thread.submit(torch.no_grad()(run)).result()
    assert torch.equal(got, want)


def test_derivatives_that_are_all_a_thread_has_to_do():
    q, k, v = (x.requires_grad_() for x in qkv(1, 4, 512, 64, dtype=torch.bfloat16, device="cuda"))
    call("backward")()
    o = decayed_attention(q, k, v, head_log_decay(4, device="cuda"))
    grads = torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    assert all(g.isfinite().all() for g in grads)

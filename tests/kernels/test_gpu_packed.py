"""Packed sequences, by their own kernels and one by one, against separate calls in fp64: ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch

from lacompile import decayed_attention
from lacompile.kernels import packed as one_by_one
from lacompile.kernels import select
from lacompile.testing import budget, check_error, head_log_decay, qkv, relative_error, state, token_log_decay

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

H = 4
DECAYS = pytest.mark.parametrize("per_token", [False, True], ids=["per-head", "per-token"])
LENGTHS = [(5000,), (1, 0, 63, 64, 65, 700), (3000, 10, 2049, 0, 1024)]


@pytest.fixture(params=["kernels", "one by one"])
def way(request, monkeypatch):
    if request.param == "one by one":
        monkeypatch.setattr(select, "packed_implementation", lambda q, v: one_by_one)


def results(lengths, leaves, cu, weights):
    """Output, final states and gradients of the leaves: packed in their own dtype, or one by one in fp64."""
    q, k, v, g, initial = leaves
    if cu is not None:
        o, last = decayed_attention(
            q, k, v, g, scale=0.5, initial_state=initial, return_final_state=True, cu_seqlens=cu
        )
    else:
        outs, at = [], 0
        for n, size in enumerate(lengths):
            own = slice(at, at + size)
            decay = g if g.dim() == 1 else g[:, :, own]
            parts = (x[:, :, own] for x in (q, k, v))
            outs.append(
                decayed_attention(*parts, decay, scale=0.5, initial_state=initial[n : n + 1], return_final_state=True)
            )
            at += size
        o, last = torch.cat([x for x, _ in outs], 2), torch.cat([x for _, x in outs])
    grads = torch.autograd.grad([o, last], leaves, [w.to(x.dtype) for w, x in zip(weights, (o, last), strict=True)])
    return o, last, *grads


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dk, dv", [(64, 64), (128, 128), (256, 256), (96, 40)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@DECAYS
def test_against_separate_calls(lengths, dk, dv, dtype, per_token, way):
    length = sum(lengths)
    q, k, v = qkv(1, H, length, dk, dv, dtype=dtype, device="cuda", tokens_first=True, k_heads=2)
    g = token_log_decay(1, H, length, device="cuda") if per_token else head_log_decay(H, device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v, g, state(len(lengths), H, dk, dv, device="cuda"))]
    weights = (
        qkv(1, H, length, dk, dv, device="cuda", seed=7)[2].to(dtype),
        state(len(lengths), H, dk, dv, device="cuda", seed=8),
    )
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    torch.use_deterministic_algorithms(True)  # memory that is not written to holds NaN
    try:
        got = results(lengths, leaves, cu, weights)
    finally:
        torch.use_deterministic_algorithms(False)
    want = results(lengths, [x.detach().double().requires_grad_() for x in leaves], None, weights)
    for n, name in enumerate(("o", "state", "dq", "dk", "dv", "dg", "d_initial")):
        if name == "dg" and not per_token:
            # A sum over all tokens of terms of either sign, each within the budget.
            assert relative_error(got[n], want[n]) <= 4 * budget(dtype).gradient
        else:
            check_error(name, got[n], want[n], kind="output" if n < 2 else "gradient", dtype=dtype)


def test_the_host_does_not_wait():
    q, k, v = qkv(1, H, 3000, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    cu = torch.tensor([0, 100, 3000], device="cuda")
    g = head_log_decay(H, device="cuda")
    decayed_attention(q, k, v, g, cu_seqlens=cu).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decayed_attention(q, k, v, g, cu_seqlens=cu).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

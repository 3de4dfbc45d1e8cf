"""The compiled kernel for a few tokens against the fp64 recurrence, on a GPU: ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch

from lacompile import decayed_attention, decode_step
from lacompile.kernels import reference
from lacompile.testing import check_error, head_log_decay, qkv, state, token_log_decay

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

B, H = 3, 4
DECAYS = pytest.mark.parametrize("per_token", [False, True], ids=["per-head", "per-token"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def arguments(length, dk=64, dv=64, per_token=False, dtype=torch.bfloat16, **more):
    """q, k, v, log_decay, a state, and what the fp64 recurrence makes of them."""
    q, k, v = qkv(B, H, length, dk, dv, dtype=dtype, device="cuda", **more)
    g = token_log_decay(B, H, length, device="cuda") if per_token else head_log_decay(H, device="cuda")
    carried = state(B, H, dk, dv, device="cuda")
    want = reference.recurrence(*(x.double() for x in (q, k, v, g)), 0.5, carried.double())
    return (q, k, v, g), carried, want


@pytest.mark.parametrize("dk, dv", [(16, 16), (64, 64), (80, 80), (96, 112), (128, 128), (24, 20), (256, 256)])
@DTYPES
@DECAYS
def test_in_place_and_out_of_place(dk, dv, dtype, per_token):
    for length in (1, 2, 16):
        args, carried, (want, want_last) = arguments(length, dk, dv, per_token, dtype, tokens_first=True)
        out, last = decayed_attention(*args, scale=0.5, initial_state=carried, return_final_state=True)
        given = carried.clone()
        found = [(out, last), (decode_step(*args, given, scale=0.5), given)]
        for o, s in found:
            check_error("o", o, want)
            check_error("state", s, want_last)
        assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("layout", ["transposed", "slice"])
def test_states_of_any_strides(layout):
    args, carried, (want, want_last) = arguments(1, 128, 128, q_heads=1, k_heads=2)
    around = torch.full((B, 5, H, 136, 130), 7.0, device="cuda")
    given = torch.empty_like(carried).mT if layout == "transposed" else around[:, 2, :, 8:, 1:129]
    given.copy_(carried)
    check_error("o", decode_step(*args, given, scale=0.5), want)
    check_error("state", given, want_last)
    around[:, 2, :, 8:, 1:129] = 7.0
    assert (around == 7.0).all()


def test_replayed_from_a_graph():
    args, carried, _ = arguments(1, 128, 128)
    given, want = carried.clone(), carried.clone()
    decode_step(*args, given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_step(*args, given)
    given.copy_(carried)
    for _ in range(3):
        graph.replay()
        decode_step(*args, want)
    assert torch.equal(given, want)


def test_no_compilation_per_length_or_batch():
    from lacompile.kernels.lightning2.decode import decode_kernel

    def compiled():
        return sum(len(cache[0]) for cache in decode_kernel.device_caches.values())

    def run(batch, heads, length):
        q, k, v = qkv(batch, heads, length, 64, device="cuda", dtype=torch.bfloat16)
        decode_step(q, k, v, head_log_decay(heads, device="cuda"), state(batch, heads, 64, device="cuda"))

    run(2, 3, 1)
    before = compiled()
    for batch, heads, length in ((1, 1, 1), (16, 16, 16), (5, 3, 7), (1, 64, 2)):
        run(batch, heads, length)
    assert compiled() == before

"""The mLSTM of two packages: the same operator where its input gate is bounded, else left alone."""

from __future__ import annotations

import torch

from ..loading import load
from ..matrix import Row


def given(n: int, *gate: int) -> list[torch.Tensor]:
    qkv = [torch.randn(2, 2, n, 16) for _ in range(3)]
    return [x.requires_grad_() for x in (*qkv, *(torch.randn(2, 2, n, *gate) for _ in range(2)))]


def siging(**how):
    def make(n):
        forward = load("mlstm_kernels", "torch/parallel/native_siging/fw.py").mlstm_siging_parallel_fw
        return lambda *x: forward(*x, **how)[0], given(n)

    return make


def parallel(n):
    forward = load("mlstm_kernels", "torch/parallel/native/fw.py").mlstm_parallel_fw
    return lambda *x: forward(*x)[0], given(n)


def chunks(n):
    forward = load("mlstm_kernels", "torch/chunkwise/native/fw.py").mlstm_chunkwise_fw
    return lambda *x: forward(*x, chunk_size=8)[0], given(n)


def tokens(n):
    step = load("mlstm_kernels", "torch/recurrent/native_step.py").mlstm_recurrent_step__native

    def run(q, k, v, i, f):
        state = (q.new_zeros(2, 2, 16, 16), q.new_zeros(2, 2, 16), q.new_zeros(2, 2, 1))
        out = []
        for t in range(q.shape[2]):
            h, state = step(q[:, :, t], k[:, :, t], v[:, :, t], i[:, :, t, None], f[:, :, t, None], *state)
            out.append(h)
        return torch.stack(out, 2)

    return run, given(n)


def xlstm(n):
    return load("xlstm", "blocks/mlstm/backends.py").parallel_stabilized_simple, given(n, 1)


KERNELS = "mlstm_kernels"
ROWS = [
    Row(KERNELS, "`mlstm_siging_parallel_fw`, its normaliser too", "parallel", siging(), 40, 2, before=48),
    Row(KERNELS, "`mlstm_siging_parallel_fw`, `stable_fgate=False`", "parallel", siging(stable_fgate=False), 40, 2),
    Row(KERNELS, "`mlstm_siging_parallel_fw`, `normalize=False`", "parallel", siging(normalize=False), 40),
    Row(KERNELS, "`mlstm_parallel_fw`", "parallel", parallel, 40, 0, "bounded-weights", before=48),
    Row(KERNELS, "`mlstm_chunkwise_fw`", "chunkwise", chunks, 16, 0, "bounded-weights"),
    Row(KERNELS, "`mlstm_recurrent_step__native` over tokens", "recurrent", tokens, 6, 0, "bounded-weights"),
    Row("xlstm", "`parallel_stabilized_simple`", "parallel", xlstm, 40, 0, "bounded-weights", before=48),
]

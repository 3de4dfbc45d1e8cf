"""Which implementation serves a call; a refusal is a reason, never a change of meaning."""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType

import torch

MAX_HEAD_DIM = 256
CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def refusal(*, device_type: str, dtype: torch.dtype, dk: int, dv: int) -> str | None:
    """Why no implementation serves this combination; None if one does."""
    if device_type == "cpu":
        return None if dtype in CPU_DTYPES else f"no CPU implementation for {dtype}"
    if device_type != "cuda":
        return f"no implementation for device type {device_type!r}"
    if not has_triton():
        return "Triton is not installed"
    if dtype not in GPU_DTYPES:
        return f"no GPU kernel for {dtype}"
    if max(dk, dv) > MAX_HEAD_DIM:
        return f"head dimensions up to {MAX_HEAD_DIM} are supported, these are Dk = {dk}, Dv = {dv}"
    return None


def has_kernels(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether Triton's kernels serve tensors like these."""
    device = q.device.type
    return device == "cuda" and refusal(device_type=device, dtype=q.dtype, dk=q.shape[3], dv=v.shape[3]) is None


def implementation(q: torch.Tensor, v: torch.Tensor) -> ModuleType:
    """The module whose ``forward`` and ``backward`` run on these tensors.

    Triton's kernels where they serve, else the chunked form in ATen, which any device, dtype and head size can run.
    """
    if has_kernels(q, v):
        from . import lightning2

        return lightning2
    from . import cpu

    return cpu


def packed_implementation(q: torch.Tensor, v: torch.Tensor) -> ModuleType:
    """The same for packed sequences. Kernels of their own read no length on the host; the rest goes one by one."""
    if has_kernels(q, v) and q.numel() and v.numel():
        from .lightning2 import packed
    else:
        from . import packed
    return packed

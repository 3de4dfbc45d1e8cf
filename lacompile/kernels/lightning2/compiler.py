"""Which compiler makes the kernels, for which GPU."""

from __future__ import annotations

from functools import cache

import torch
import triton

from ..tuning.identity import Identity, source_digest


@cache
def identity(device: torch.device) -> Identity:
    """Of a CUDA device under the installed compiler."""
    return Identity(torch.cuda.get_device_name(device), triton.__version__, _ptxas_version(), source_digest())


def _ptxas_version() -> str:
    """Of the assembler that Triton calls; not every release says it in the same place."""
    try:
        return str(triton.knobs.nvidia.ptxas.version)
    except (AttributeError, RuntimeError):
        return "unknown"

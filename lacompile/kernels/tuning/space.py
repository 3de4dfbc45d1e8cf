"""The tiles that a kernel can be compiled for: every one that may be chosen, each of which must be right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Use = Literal["forward", "backward"]
CHUNK = 64


@dataclass(frozen=True)
class Config:
    """Tiles and scheduling of one kernel.

    Which body (``hopper`` or ``portable``), contraction block BK, column block BV, tokens to a chunk, warps, pipeline
    stages, how many programs a multiprocessor holds at a time, and how many use up its share of the memory bandwidth.
    """

    body: Literal["hopper", "portable"]
    bk: int
    bv: int
    chunk: int
    warps: int
    stages: int
    resident: int = 1
    saturating: float = 0.7


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def portable(dk: int, dv: int, dtype: torch.dtype) -> Config:
    """The portable body's tile for contracting over ``dk`` into ``dv`` columns.

    The state ``[BK, BV]`` in fp32 is what fills the registers, so BV shrinks as BK grows.
    """
    bk = max(64, next_power_of_2(dk))
    bv = max(16, min(64, next_power_of_2(dv)))
    if dtype == torch.float32:
        # Three products for one leave few registers: short chunks, and more warps for large heads.
        warps, stages = (4, 2) if bk == 64 else (8, 1)
        return Config("portable", bk, min(bv, 32), 16, warps, stages)
    if bk == 256:
        return Config("portable", bk, min(bv, 32), CHUNK, 4, 2)
    # Two programs share a multiprocessor: at most 255 registers to a thread and 113 KiB of shared memory each.
    return Config("portable", bk, bv, CHUNK, 4, 3 if bk == 64 else 2, 2, 1.4)


def hopper(dk: int, dv: int) -> list[Config]:
    """Hopper's body for heads of up to 128: sixteen columns to a warp, the safe choice first."""
    if max(dk, dv) > 128:
        return []
    if max(dk, dv) <= 64:
        return [Config("hopper", 64, 64, CHUNK, 4, stages, 2, 0.5) for stages in (2, 3, 4)]
    wide = [Config("hopper", 128, 128, CHUNK, 8, stages, 1, 0.55) for stages in (2, 3)]
    return [*wide, Config("hopper", 128, 64, CHUNK, 4, 2, 2, 1.1)]


def candidates(dk: int, dv: int, dtype: torch.dtype, descriptors: bool) -> list[Config]:
    """What may be chosen for a head of this kind, the safe choice first.

    ``descriptors``: the device has Hopper's tensor cores and every tensor can be read by descriptor.
    """
    return (hopper(dk, dv) if descriptors else []) or [portable(dk, dv, dtype)]

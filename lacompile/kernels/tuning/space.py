"""The tiles that a kernel can be compiled for: every one that may be chosen, each of which must be right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

Use = Literal["forward", "backward"]
CHUNK = 64


@dataclass(frozen=True)
class Config:
    """Tiles and scheduling of one kernel.

    Which body (``hopper`` or ``portable``), contraction block BK, column block BV, tokens to a chunk, warps, pipeline
    stages; how many programs a multiprocessor holds at a time, how many use up its share of an H100's memory bandwidth,
    and nanoseconds for a token where a program has a multiprocessor to itself.
    """

    body: Literal["hopper", "portable"]
    bk: int
    bv: int
    chunk: int
    warps: int
    stages: int
    resident: int = 1
    saturating: float = 0.7
    pace: float = 40.0


@dataclass(frozen=True)
class Kind:
    """What a choice of tiles may depend on. Not on batch or length: a change of those never compiles anything.

    Attributes:
        use: which kernel.
        dk, dv: head sizes, rounded up to the blocks that hold them.
        bits: of an element.
        per_token: decays per token instead of per head.
        decay_gradient: the backward kernel also writes what the decay's gradient is made of.
        descriptors: Hopper's tensor cores are there, and every tensor can be read by descriptor.
    """

    use: Use
    dk: int
    dv: int
    bits: int
    per_token: bool
    decay_gradient: bool
    descriptors: bool

    @classmethod
    def of(
        cls, use: Use, dk: int, dv: int, dtype: torch.dtype, per_token: bool, decay_gradient: bool, descriptors: bool
    ) -> Kind:
        """The kind of a call on heads of these sizes."""
        block_k, block_v = (max(64, next_power_of_2(d)) for d in (dk, dv))
        return cls(use, block_k, block_v, dtype.itemsize * 8, per_token, decay_gradient, descriptors)

    def __str__(self) -> str:
        gradient = ", decay gradient" if self.decay_gradient else ""
        source = "descriptors" if self.descriptors else "pointers"
        decay = "token" if self.per_token else "head"
        return f"{self.use} {self.dk}x{self.dv}, {self.bits} bits, decay per {decay}{gradient}, {source}"


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def portable(dk: int, dv: int, dtype: torch.dtype) -> Config:
    """The portable body's safe tile for contracting over ``dk`` into ``dv`` columns.

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


def portables(dk: int, dv: int, dtype: torch.dtype) -> list[Config]:
    """The portable body's tiles, the safe one first; as many as for contracting over ``dv`` into ``dk`` columns.

    With blocks of 128 there is one: a third stage does not fit into shared memory in the backward kernel.
    """
    safe = portable(dk, dv, dtype)
    if dtype == torch.float32 or 128 in (max(64, next_power_of_2(dk)), max(64, next_power_of_2(dv))):
        return [safe]
    return [safe, replace(safe, stages=safe.stages - 1)]


def hopper(dk: int, dv: int) -> list[Config]:
    """Hopper's body for heads of up to 128: sixteen columns to a warp, the safe choice first."""
    if max(dk, dv) > 128:
        return []
    if max(dk, dv) <= 64:
        return [Config("hopper", 64, 64, CHUNK, 4, stages, 2, 0.6, 14.0) for stages in (2, 3, 4)]
    wide = [Config("hopper", 128, 128, CHUNK, 8, stages, 1, 0.85, 31.0) for stages in (2, 3)]
    return [*wide, Config("hopper", 128, 64, CHUNK, 4, 2, 2, 0.8, 19.5)]


def candidates(
    dk: int, dv: int, dtype: torch.dtype, descriptors: bool, marks: torch.dtype | None = None
) -> list[Config]:
    """What may be chosen for a head of this kind, the safe choice first.

    The same place in the list for ``dk, dv`` and for ``dv, dk`` is a pair that one backward kernel can have.

    Args:
        dk, dv: head sizes of the contraction and of the columns.
        dtype: of the elements.
        descriptors: the device has Hopper's tensor cores and every tensor can be read by descriptor.
        marks: the dtype of the states that the kernel writes down for the decay's gradient, if it does.
    """
    found = hopper(dk, dv) if descriptors else []
    return [tiles for tiles in found if _is_sound(tiles, marks)] + portables(dk, dv, dtype)


def _is_sound(tiles: Config, marks: torch.dtype | None) -> bool:
    """Whether Hopper's body is known to be right with these tiles (docs/kernel-notes.md, hazards), and fits."""
    # Marks in bf16: wrong gradients of k, differently from run to run. Any marks: no room for a third stage.
    return tiles.warps < 8 or marks is None or (marks == torch.float32 and tiles.stages < 3)

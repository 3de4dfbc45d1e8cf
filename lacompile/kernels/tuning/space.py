"""The tiles that a kernel can be compiled for: every one that may be chosen, each of which must be right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

Use = Literal["forward", "backward"]
Body = Literal["hopper", "portable"]
CHUNK = 64
REGISTER_FILE = 65536
"""Registers of a multiprocessor."""


@dataclass(frozen=True)
class Config:
    """Tiles and scheduling of one kernel.

    Attributes:
        body: which one, ``hopper`` or ``portable``.
        bk, bv: blocks of the contraction and of columns.
        chunk: tokens to a chunk.
        warps: of a program; Hopper's body for 16 bits has so many twice, for the outputs and for the state.
        stages: of the pipeline.
        resident: how many programs a multiprocessor holds at a time.
        saturating: how many use up its share of an H100's memory bandwidth.
        pace: nanoseconds for a token where a program has a multiprocessor to itself.
    """

    body: Body
    bk: int
    bv: int
    chunk: int
    warps: int
    stages: int
    resident: int = 1
    saturating: float = 0.7
    pace: float = 40.0

    @property
    def constants(self) -> dict[str, int]:
        """What Hopper's kernels are compiled for beside blocks.

        REGISTERS are those of a thread that keeps the state; one that makes outputs has what is left of two threads'.
        """
        registers = 256 if self.bk == 128 else 168 if self.resident == 1 else 104
        return {"STAGES": self.stages, "REGISTERS": registers}

    @property
    def options(self) -> dict[str, int]:
        """What Hopper's kernels are launched with; programs that share a multiprocessor share its registers."""
        most = {"maxnreg": REGISTER_FILE // (self.resident * 2 * self.warps * 32)} if self.resident > 1 else {}
        return {"num_warps": self.warps} | most


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
        # Six products for one leave few registers: short chunks, or narrow blocks, some of which then spill and are
        # faster all the same (docs/kernel-notes/fp32.md).
        if max(bk, next_power_of_2(dv)) == 64:
            return Config("portable", bk, min(bv, 32), CHUNK, 4, 1, pace=65.0)
        if max(bk, next_power_of_2(dv)) == 128:
            return Config("portable", bk, bv, 16, 4, 1, pace=300.0)
        return Config("portable", bk, min(bv, 32), 16, 8, 1, pace=300.0)
    if bk == 256:
        return Config("portable", bk, min(bv, 32), CHUNK, 4, 2)
    # Two programs share a multiprocessor: at most 255 registers to a thread and 113 KiB of shared memory each.
    return Config("portable", bk, bv, CHUNK, 4, 3 if bk == 64 else 2, resident=2, saturating=1.4)


def portables(dk: int, dv: int, dtype: torch.dtype) -> list[Config]:
    """The portable body's tiles, the safe one first; as many as for contracting over ``dv`` into ``dk`` columns.

    With blocks of 128 there is one: a third stage does not fit into shared memory in the backward kernel.
    """
    safe = portable(dk, dv, dtype)
    if dtype == torch.float32 or 128 in (max(64, next_power_of_2(dk)), max(64, next_power_of_2(dv))):
        return [safe]
    return [safe, replace(safe, stages=safe.stages - 1)]


def hopper(dk: int, dv: int, dtype: torch.dtype, gradient: bool = False) -> list[Config]:
    """Hopper's body for heads of up to 128, the safe choice first.

    What the decay's gradient is made of needs a fourth tile for each stage, hence fewer stages. In fp32 digits take all
    of the shared memory (hopper/exact.py).
    """
    if max(dk, dv) > 128:
        return []
    if dtype == torch.float32:
        bk = max(64, next_power_of_2(dk))
        return [Config("hopper", bk, 64, CHUNK, 8, 1, saturating=1.6, pace=95.0 if bk == 128 else 70.0)]
    if max(dk, dv) > 64:
        return [Config("hopper", 128, 128, CHUNK, 4, n, 1, 0.46, 19.8) for n in ((2,) if gradient else (3, 2))]
    alone = [Config("hopper", 64, 64, CHUNK, 4, n, 1, 0.5, 11.2) for n in ((4,) if gradient else (4, 6))]
    return [*alone, Config("hopper", 64, 64, CHUNK, 4, 2 if gradient else 3, 2, 0.55, 12.7)]


def candidates(dk: int, dv: int, dtype: torch.dtype, descriptors: bool, gradient: bool = False) -> list[Config]:
    """What may be chosen for a head of this kind, the safe choice first.

    The same place in the list for ``dk, dv`` and for ``dv, dk`` is a pair that one backward kernel can have.

    Args:
        dk, dv: head sizes of the contraction and of the columns.
        dtype: of the elements.
        descriptors: the device has Hopper's tensor cores and every tensor can be read by descriptor.
        gradient: the kernel also writes what the decay's gradient is made of.
    """
    return (hopper(dk, dv, dtype, gradient) if descriptors else []) + portables(dk, dv, dtype)

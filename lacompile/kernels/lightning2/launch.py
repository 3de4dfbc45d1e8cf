"""What a launch needs besides a kernel: tile sizes, segments, layouts. Tensors and numbers only, no kernel code."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import gcd

import torch
from torch import Tensor

from ..tuning.choose import place
from ..tuning.space import CHUNK, Body, Config, Kind, Use, candidates, next_power_of_2, portable
from .compiler import identity

TMA = True  # read and write by tensor descriptors where that is possible
HOPPER = True  # use the body in hopper/ where that is possible
# Tokens between two states that are written down when the decay's gradient is wanted (see decay_grad.py): a power of
# two and a multiple of every chunk. Between them rounding accumulates, as the root of their number.
SPAN = 2048
# Segments are multiples of this many tokens; a multiple of every chunk.
GRANULE = 512
forced: tuple[Kind, int] | None = None
"""The candidate that is being tried for a kind of kernel (see trial.py)."""


def blocks(columns: int, block: int) -> int:
    """How many blocks cover so many columns."""
    return -(-columns // block)


def config(
    use: Use,
    dk: int,
    dv: int,
    dtype: torch.dtype,
    device: torch.device,
    descriptors: bool,
    per_token: bool,
    decay_gradient: bool = False,
) -> tuple[Config, Config]:
    """The tiles for contracting over ``dk`` into ``dv`` columns, and those that go with them the other way round.

    ``descriptors``: every tensor can be read by one. ``decay_gradient``: the backward kernel is to find that too.
    """
    hopper = descriptors and HOPPER and has_warp_group_products(device)
    found, turned = (candidates(*sizes, dtype, hopper, decay_gradient) for sizes in ((dk, dv), (dv, dk)))
    kind = Kind.of(use, dk, dv, dtype, per_token, decay_gradient, hopper)
    if forced is not None and forced[0] == kind:
        at = forced[1]
    else:
        at = place(kind, found, device, identity, lambda n: _milliseconds(kind, dtype, device, n))
    return found[at], turned[at]


def _milliseconds(kind: Kind, dtype: torch.dtype, device: torch.device, n: int) -> float | None:
    from .trial import milliseconds

    return milliseconds(kind, dtype, device, n)


def prepass_config(dk: int, dv: int, dtype: torch.dtype) -> Config:
    """The tiles of the pre-pass, which has one product and reads two tensors."""
    tiles = portable(dk, dv, dtype)
    if dtype == torch.float32:
        return replace(tiles, chunk=32) if tiles.bk == 128 else tiles
    return tiles if tiles.bk > 128 else replace(tiles, stages=3)


def precision(dtype: torch.dtype, device: torch.device, body: Body = "portable") -> str:
    """How fp32 products are formed: as PyTorch's own, by ``torch.set_float32_matmul_precision``.

    Six products of bf16 each, as exact as fp32 itself; one of TF32, an error of about 3e-4, where that allows it.
    Hopper's body forms six in any case: it is faster so than the portable one with TF32. 16-bit inputs ignore it.
    Triton's interpreter has fp32 itself.
    """
    allowed = body == "portable" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    if dtype != torch.float32 or allowed:
        return "tf32"
    return "bf16x6" if device.type == "cuda" else "ieee"


def digits(dtype: torch.dtype, narrow: str) -> dict[str, int]:
    """How many bf16 numbers one of q, of k and of v is the sum of; in fp32 three, but one where it is ``narrow``."""
    return {f"{x}_DIGITS": 3 if dtype == torch.float32 and x.lower() not in narrow else 1 for x in "QKV"}


def saves(precision: str, narrow: str, operands: str) -> bool:
    """Whether a product of these ``operands`` has fewer factors of bf16, since they are ``narrow``."""
    return precision == "bf16x6" and all(x in narrow for x in operands)


def is_exact(precision: str) -> bool:
    """Whether sums keep what products keep of fp32, more than 16-bit inputs have."""
    return precision != "tf32"


def setting(q: Tensor) -> Hashable:
    """What a launch depends on beside its tensors."""
    return precision(q.dtype, q.device), forced, _stood_for.get()


def span(per_token: bool, q: Tensor, v: Tensor) -> int:
    """Tokens between two marks.

    In fp32 rounding is what there is of errors. Gates that share a parameter add up theirs: marks take half of the
    memory of q, as many as that allows. One decay for all tokens adds them all up: a mark at every chunk.
    """
    if q.dtype != torch.float32:
        return SPAN
    if not per_token:
        return CHUNK
    return max(CHUNK, min(SPAN, 4 * next_power_of_2(max(q.shape[3], v.shape[3]))))


MAX_SEGMENTS = 64
PIECES = 8
PIECE = 2 * CHUNK


@dataclass(frozen=True)
class Segments:
    """A sequence split into ``count`` segments of ``tokens`` tokens (the last is shorter).

    The pre-pass cuts each segment into up to PIECES pieces, which run in parallel.
    """

    tokens: int
    count: int

    @property
    def piece(self) -> int:
        """Tokens to a piece, a multiple of every chunk; the last pieces may be empty.

        No fewer than PIECE: a piece's state is written and read, which is more than it is made from if it is short.
        """
        return max(PIECE, -(-self.tokens // (PIECES * CHUNK)) * CHUNK)


# The plan counts in nanoseconds. A program takes this long beside its tokens; a pre-pass this long beside its pieces,
# the states that its programs start from included; and each segment begins from a state, after a step of the scan.
START, PREPASS, SCAN_STEP = 3300.0, 7000.0, 2000.0
# Programs that share a multiprocessor do this many times the work of one that has it to itself.
TOGETHER = 1.25
# A token of the pre-pass beside one of the main pass, and how many of its programs share a multiprocessor.
PREPASS_PACE, PREPASS_RESIDENT = 0.5, 3
# A piece's state is written and read, at two thirds of the memory's nominal speed.
TRAFFIC = 3.0
# Over so many tokens programs that share tiles drift apart until they move twice the bytes.
DRIFT = 2.4e6


@dataclass(frozen=True)
class Hardware:
    """How many multiprocessors a device has, and a multiprocessor's share of its memory's bandwidth, an H100's being 1.

    The default is an H100. An H200's multiprocessors are the same, so that times by program hold for both.
    """

    processors: int = 132
    bandwidth: float = 1.0


H100_BANDWIDTH = 2 * 2.619e9 * 5120 / 8 / 132
"""Bytes per second and multiprocessor: two transfers in a cycle of its memory, on a bus of so many bits."""


@cache
def hardware(device: torch.device) -> Hardware:
    """What a device is; an H100 for tensors that are not on a GPU (Triton's interpreter)."""
    if device.type != "cuda":
        return Hardware()
    found = torch.cuda.get_device_properties(device)
    total = 2 * 1e3 * found.memory_clock_rate * found.memory_bus_width / 8  # the clock is in kHz
    share = total / found.multi_processor_count / H100_BANDWIDTH
    return Hardware(found.multi_processor_count, share or 1.0)  # a driver that does not know says 0


@lru_cache(maxsize=4096)
def plan(length: int, programs: int, hardware: Hardware, tiles: Config, uses: int = 1) -> Segments:
    """How to split ``length`` tokens when one segment would make ``programs`` programs, of so many ``uses``.

    Segments are multiples of GRANULE tokens. The model is of the multiprocessor that gets the most programs, no faster
    than memory is for all of them, and of a pre-pass, which for the backward pass goes both ways at once. It is fitted
    to times on an H200 (docs/kernel-notes/few-heads-and-tokens.md).
    """
    processors, passes = hardware.processors, min(uses, 2)
    memory = tiles.pace * programs * length / (processors * tiles.saturating * hardware.bandwidth)
    parts = passes * programs / uses  # programs of the pre-pass for each segment and piece, each with a tile of a state
    bytes_per_ns = 1e-9 * H100_BANDWIDTH * hardware.bandwidth * processors
    states = TRAFFIC * 4 * tiles.bk * tiles.bv * parts / bytes_per_ns
    shared = max(1.0, tiles.resident / TOGETHER)

    def main(tokens: int, count: int) -> float:
        most = blocks(programs * count, processors)
        full, rest = divmod(most, tiles.resident)
        # Those left over by full multiprocessors may find one that is free, or one that is not.
        last = 0.0 if not rest else 1.0 if most == rest else (1.0 + shared) / 2
        return max((START + tiles.pace * tokens) * (full * shared + last), START + memory * (1 + tokens / DRIFT))

    best, cost = Segments(max(length, 1), 1), main(length, 1)
    for count in range(2, min(MAX_SEGMENTS, blocks(length, GRANULE)) + 1):
        tokens = blocks(length, count * GRANULE) * GRANULE
        split = Segments(tokens, blocks(length, tokens))
        pieces, borders = blocks(tokens, split.piece), split.count - 1
        work = split.piece + parts * (length - tokens) / (PREPASS_RESIDENT * processors)
        prepass = PREPASS + SCAN_STEP * borders + PREPASS_PACE * tiles.pace * work + states * borders * pieces
        this = main(tokens, split.count) + prepass
        if borders and this < cost:
            best, cost = split, this
    return best


_stood_for: ContextVar[tuple[int, int] | None] = ContextVar("_stood_for", default=None)


@contextmanager
def standing_for(batch: int, length: int) -> Iterator[None]:
    """One sequence of a few tokens is cut into segments inside if ``batch`` sequences of ``length`` would be."""
    token = _stood_for.set((batch, length))
    try:
        yield
    finally:
        _stood_for.reset(token)


def split(length: int, programs: int, device: torch.device, tiles: Config, uses: int = 1) -> Segments:
    """The plan for a device."""
    stood_for = _stood_for.get()
    if stood_for is None:
        return plan(length, programs, hardware(device), tiles, uses)
    real = plan(stood_for[1], stood_for[0] * programs, hardware(device), tiles, uses)
    return Segments(GRANULE, blocks(length, GRANULE)) if real.count > 1 else Segments(length, 1)


class _Thread(threading.local):
    has_context = False


_thread = _Thread()
AS_IT_IS = nullcontext()


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of x the current one, and known to this thread.

    A thread gets a device's context with the first kernel that PyTorch or Triton launch from it. A descriptor needs it
    before that, where nothing else was launched: what memory is asked for may come from PyTorch's cache.
    """
    device = x.device
    if device.type != "cuda":
        return AS_IT_IS
    if device.index != torch.cuda.current_device():
        return torch.cuda.device_of(x)
    if not _thread.has_context:
        torch.cuda.set_device(device)
        _thread.has_context = True
    return AS_IT_IS


def unit_last(x: Tensor) -> Tensor:
    """x with its last stride 1 and strides small enough for int32 offsets inside a tile; a copy only if it must."""
    return x if x.stride(-1) == 1 and x.stride(-2) < 2**24 else x.contiguous()


def unit(*tensors: Tensor) -> int:
    """8 if every row of every tensor starts a multiple of 8 elements from its start, else 1.

    Strides are handed to the kernels in this unit: so the compiler knows that rows are aligned for vector loads, and
    no stride needs to be a compile-time property.
    """
    common = 8
    for x in tensors:
        for size, stride in _outer(x):
            common = gcd(common, stride) if size > 1 else common
    return 8 if common == 8 else 1


@cache
def has_tma(device: torch.device) -> bool:
    """Whether a device has a tensor memory accelerator (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def has_warp_group_products(device: torch.device) -> bool:
    """Whether a device has Hopper's tensor cores; those that came later have others."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def use_tma(*tensors: Tensor) -> bool:
    """Whether every tensor ``[B,H,N,D]`` can be read by descriptor: rows aligned to 16 bytes, none repeated."""
    if not TMA or not has_tma(tensors[0].device):
        return False
    return all(
        x.data_ptr() % 16 == 0
        and all(size == 1 or (stride * x.element_size() % 16 == 0 and 0 < stride < 2**37) for size, stride in _outer(x))
        for x in tensors
    )


def portable_tma(tma: bool, dtype: torch.dtype) -> bool:
    """Whether the portable kernels read by descriptor what may be read so: 16-bit tensors they do."""
    return tma and dtype.itemsize == 2


def _outer(x: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of all dimensions but the last."""
    return list(zip(x.shape[:-1], x.stride()[:-1], strict=True))


def strides(x: Tensor, unit: int) -> tuple[int, int, int]:
    """Strides of batch, head and token in ``unit``."""
    return x.stride(0) // unit, x.stride(1) // unit, x.stride(2) // unit


def decay_strides(log_decay: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and token of log-decays ``[H]`` or ``[B,H,N]``."""
    if log_decay.dim() == 1:
        return 0, log_decay.stride(0), 0
    return log_decay.stride(0), log_decay.stride(1), log_decay.stride(2)


class Memory:
    """Makes tensors like ``x``, one for each call."""

    def __init__(self, x: Tensor):
        self.shape, self.stride, self.dtype, self.device = x.shape, x.stride(), x.dtype, x.device

    def __call__(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def empty_like_q(q: Tensor, heads: int, columns: int) -> Tensor:
    """``[B,H,N,columns]`` laid out like q: tokens before heads in memory if q's are, so that merging heads is free."""
    batch, _, length, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty(batch, length, heads, columns).transpose(1, 2)
    return q.new_empty(batch, heads, length, columns)


def dense_state(state: Tensor | None) -> Tensor | None:
    """A state ``[B,H,Dk,Dv]`` in contiguous memory; it is small beside the sequence."""
    return None if state is None else state.contiguous()


def grad_like(x: Tensor, heads: int) -> Tensor:
    """Memory for the gradient of x with all ``heads`` heads, laid out like x where the heads are x's own."""
    if x.shape[1] == heads:
        grad = torch.empty_like(x)
        return grad if grad.stride(-1) == 1 else x.new_empty(x.shape)
    return empty_like_q(x, heads, x.shape[3])


def fold(grad: Tensor, heads: int) -> Tensor:
    """The gradient of a tensor whose heads were shared: summed over those that shared it."""
    return grad if grad.shape[1] == heads else grad.unflatten(1, (heads, -1)).sum(2)

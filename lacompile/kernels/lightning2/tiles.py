"""Tiles of the sequence in and out of a kernel: by the tensor memory accelerator (TMA) or by pointers.

A source is either a tensor descriptor of a whole ``[B,H,N,D]`` tensor with boxes ``[1,1,CHUNK,columns]``, or a pointer
to token 0 of one head. Descriptors leave the address arithmetic to the hardware, which on Hopper saves 40 of 255
registers; pointers take any stride.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def of_head(source, batch, head, batch_stride, head_stride, UNIT: tl.constexpr, TMA: tl.constexpr):
    """The source of one head; strides in units of UNIT elements."""
    if TMA:
        return source
    else:
        return source + (batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride) * UNIT


@triton.jit
def read(
    source,
    batch,
    head,
    stride,
    at,
    stop,
    column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """``[ROWS, COLUMNS]`` from token ``at`` and ``column`` on; zeros from ``stop`` and from column WIDTH on.

    Offsets inside a tile are int32, the tile's own is int64. Descriptors end where the tensor does, so that with TMA
    ``stop`` must be the sequence's end or a multiple of ROWS.
    """
    if TMA:
        return source.load([batch, head, at, column]).reshape(ROWS, COLUMNS)
    else:
        t = tl.arange(0, ROWS)[:, None]
        n = column + tl.arange(0, COLUMNS)[None, :]
        inside = (t < stop - at) & (n < WIDTH)
        return tl.load(source + at.to(tl.int64) * stride + (t * stride + n), mask=inside, other=0.0)


@triton.jit
def write(
    target,
    tile,
    batch,
    head,
    stride,
    at,
    stop,
    column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """Stores what :func:`read` would read, in the target's dtype."""
    if TMA:
        target.store([batch, head, at, column], tile.to(target.dtype).reshape(1, 1, ROWS, COLUMNS))
    else:
        t = tl.arange(0, ROWS)[:, None]
        n = column + tl.arange(0, COLUMNS)[None, :]
        inside = (t < stop - at) & (n < WIDTH)
        out = tile.to(target.dtype.element_ty)
        tl.store(target + at.to(tl.int64) * stride + (t * stride + n), out, mask=inside)

"""Compiling what a call will launch before its tensors are there: the same call on a few tokens that stand for them.

Nothing that a kernel is compiled for depends on batch or length, apart from whether the sequence is cut into segments
at all: :func:`.launch.split` answers for the lengths that are stood for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor

from ..tuning.choose import mode
from . import launch
from .backward import backward
from .decode import MAX_TOKENS
from .forward import forward

Number = Callable[[Any], int]


@dataclass(frozen=True)
class Like:
    """What of a tensor ``[B,Hx,N,D]`` decides which kernel reads it.

    Attributes:
        heads, columns: Hx and D.
        dtype, device: of its elements.
        tokens_first: tokens before heads in memory.
        unit: the largest power of two up to 8 that its strides, in elements, are multiples of.
        described: it may be read by descriptor, as far as its address and repeated elements tell.
    """

    heads: int
    columns: int
    dtype: torch.dtype
    device: torch.device
    tokens_first: bool = False
    unit: int = 8
    described: bool = True

    @classmethod
    def of(cls, x: Tensor, number: Number) -> Like:
        """Of a tensor without values. One whose last stride is not 1 is copied before a kernel sees it."""
        shape, strides = [number(n) for n in x.shape], [number(n) for n in x.stride()]
        if strides[3] != 1:
            return cls(shape[1], shape[3], x.dtype, x.device)
        outer = [stride for size, stride in zip(shape[:3], strides[:3], strict=True) if size != 1]
        begins = number(x.storage_offset()) * x.element_size() % 16 == 0
        unit, described = gcd(8, *outer), begins and all(n != 0 for n in outer)
        return cls(shape[1], shape[3], x.dtype, x.device, strides[1] < strides[2], unit, described)

    def made(self, tokens: int) -> Tensor:
        """One sequence of so many tokens."""
        width = -(-self.columns // 8) * 8 + self.unit % 8
        order = (tokens, self.heads) if self.tokens_first else (self.heads, tokens)
        size, skipped = tokens * self.heads * width, 0 if self.described else 1
        x = torch.zeros(size + skipped, dtype=self.dtype, device=self.device)[skipped:]
        x = x.view(1, *order, width)[..., : self.columns]
        return x.transpose(1, 2) if self.tokens_first else x


@dataclass(frozen=True)
class Call:
    """A call of the operator whose tensors are not there yet: see :func:`lacompile.decayed_attention`.

    Attributes:
        q, k, v: what they are like.
        decay: dtype of the log-decays.
        heads: H.
        per_token: whether there is a log-decay for each token.
        state: dtype of the initial state, if there is one.
        batch, length: B and N.
        want_state: the last state is returned.
        gradients, decay_gradient: it is differentiated, by the log-decay too.
        narrow: which of q, k and v hold numbers of bf16.
    """

    q: Like
    k: Like
    v: Like
    decay: torch.dtype
    heads: int
    per_token: bool
    state: torch.dtype | None
    batch: int
    length: int
    want_state: bool
    gradients: bool
    decay_gradient: bool
    narrow: str

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        initial_state: Tensor | None,
        want_state: bool,
        narrow: str = "",
        number: Number = int,
    ) -> Call:
        """Of tensors without values. ``number``: what a size is in the call at hand, if it is a symbol."""
        tensors = [x for x in (q, k, v, log_decay, initial_state) if x is not None]
        heads = max(number(x.shape[0 if x.dim() == 1 else 1]) for x in tensors)
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        return cls(
            *(Like.of(x, number) for x in (q, k, v)), log_decay.dtype, heads, log_decay.dim() == 3,
            None if initial_state is None else initial_state.dtype, number(q.shape[0]), number(q.shape[2]),
            want_state, gradients, gradients and log_decay.requires_grad, narrow,
        )  # fmt: skip


def compile_kernels(call: Call) -> None:
    """Compiles and checks the kernels of a call, but not those of a few tokens, which are small.

    Where a search for tiles is asked for it does nothing: that wants the device for itself.
    """
    if call.length <= MAX_TOKENS or mode() not in ("off", "cached"):
        return
    tokens = min(call.length, 2 * launch.GRANULE)
    q, k, v = (like.made(tokens) for like in (call.q, call.k, call.v))
    decay = q.new_zeros((1, call.heads, tokens) if call.per_token else (call.heads,), dtype=call.decay)
    state = q.new_zeros(1, call.heads, q.shape[3], v.shape[3], dtype=call.state or torch.float32)
    start, d_end = (state if wanted else None for wanted in (call.state is not None, call.want_state))
    with torch.no_grad(), launch.standing_for(call.batch, call.length):
        o, _ = forward(q, k, v, decay, 1.0, start, call.want_state, call.narrow)
        if call.gradients:
            backward(o, d_end, q, k, v, decay, 1.0, start, call.decay_gradient, call.narrow)

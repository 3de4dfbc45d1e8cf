"""Before a kernel is trusted it is asked, once for each of its kinds, for something whose answer is known to the bit.

Compilers of GPU code have been seen to lose products that read their operands from registers. Without decay sums of
small integers are exact in every dtype, so that one lost or doubled product shows. It costs about a millisecond.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

HEADS, LENGTH = 4, 200
VERDICTS: dict[Hashable, bool] = {}


class WrongKernel(RuntimeWarning):
    """A kernel that was compiled on this machine does not compute what it should; the slow form is used instead."""


def is_right(kind: Hashable, device: torch.device, check: Callable[[], bool]) -> bool:
    """Whether kernels of this kind pass ``check``, which runs one; asked once."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return True
    if kind not in VERDICTS:
        VERDICTS[kind] = True  # for the call that checks
        VERDICTS[kind] = check()
        if not VERDICTS[kind]:
            message = f"{kind} returned wrong numbers for small integers; PyTorch operations are used instead"
            warnings.warn(message, WrongKernel, stacklevel=2)
    return VERDICTS[kind]


class Integers:
    """q, k, v and do ``[1,HEADS,LENGTH,D]`` of a few small integers, no decay, and states of zeros."""

    def __init__(self, dk: int, dv: int, like: Tensor, per_token: bool, aligned: bool):
        generator = torch.Generator().manual_seed(0)

        def sparse(columns: int) -> Tensor:
            shape = (1, HEADS, LENGTH, columns)
            signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
            made = (signs * (torch.rand(shape, generator=generator) < 4 / columns)).to(like.device, like.dtype)
            return made if aligned else torch.cat([made.new_zeros(1), made.flatten()])[1:].view(shape)

        self.q, self.k, self.v, self.do = sparse(dk), sparse(dk), sparse(dv), sparse(dv)
        shape = (1, HEADS, LENGTH) if per_token else (HEADS,)
        self.log_decay = torch.zeros(shape, dtype=torch.float32, device=like.device)
        self.state = torch.zeros((1, HEADS, dk, dv), dtype=torch.float32, device=like.device)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv."""
        q, k, v, do = (x.double() for x in (self.q, self.k, self.v, self.do))
        scores, d_scores = (q @ k.mT).tril(), (do @ v.mT).tril()
        return d_scores @ k, d_scores.mT @ q, scores.mT @ do

    def output(self) -> Tensor:
        """o."""
        q, k, v = (x.double() for x in (self.q, self.k, self.v))
        return (q @ k.mT).tril() @ v


def equal(found: Tensor, want: Tensor) -> bool:
    """Whether both are the same numbers in the dtype of ``found``."""
    return torch.equal(found, want.to(found.dtype))

"""Before a kernel is trusted it is asked, once for each of its kinds, for something whose answer is known to the bit.

Compilers of GPU code have been seen to lose products that read their operands from registers. Without decay sums of
integers are exact in every dtype, so that one lost or doubled product shows, and so does a state that arrives wrong.
They are small, but for fp32's values, which have more bits than one factor of its products. It costs about ten
milliseconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

HEADS, LENGTH = 4, 200
WIDE = 257
"""What fp32's values are multiples of: more than the eight bits of one bf16 factor, and sums of them are exact."""
VERDICTS: dict[Hashable, bool] = {}


class WrongKernel(RuntimeWarning):
    """A kernel that was compiled on this machine does not compute what it should; the slow form is used instead."""


def is_right(kind: Hashable, device: torch.device, check: Callable[[], bool]) -> bool:
    """Whether kernels of this kind pass ``check``, which runs one; asked once."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return True
    if kind not in VERDICTS:
        VERDICTS[kind] = True  # for the call that checks
        VERDICTS[kind] = check() and check()  # by Triton's launch, then as every later call is launched
        if not VERDICTS[kind]:
            message = f"{kind} returned wrong numbers for integers; PyTorch operations are used instead"
            warnings.warn(message, WrongKernel, stacklevel=2)
    return VERDICTS[kind]


class Integers:
    """q, k, v, do ``[1,HEADS,LENGTH,D]``, a state and the last state's gradient of a few integers; no decay.

    ``exact``: the kernel forms fp32's products as exactly as fp32; those of q, k and v that are ``narrow`` stay so.
    """

    def __init__(
        self, dk: int, dv: int, like: Tensor, per_token: bool, aligned: bool, exact: bool = False, narrow: str = ""
    ):
        drawn: Any = {"generator": torch.Generator().manual_seed(0), "device": "cpu"}

        def sparse(rows: int, columns: int, some: float) -> Tensor:
            shape = (1, HEADS, rows, columns)
            signs = torch.randint(0, 2, shape, **drawn) * 2 - 1
            return (signs * (torch.rand(shape, **drawn) < some)).to(like.device)

        # smaller heads overlap in more tokens, and sums grow
        wide = exact and "v" not in narrow and min(dk, dv) >= 16

        def tokens(columns: int, factor: int = 1) -> Tensor:
            made = (factor * sparse(LENGTH, columns, 4 / columns)).to(like.dtype)
            return made if aligned else torch.cat([made.new_zeros(1), made.flatten()])[1:].view(made.shape)

        self.q, self.k, self.v, self.do = tokens(dk), tokens(dk), tokens(dv, WIDE if wide else 1), tokens(dv)
        shape = (1, HEADS, LENGTH) if per_token else (HEADS,)
        self.log_decay = torch.zeros(shape, dtype=torch.float32, device=like.device)
        self.state, self.d_end = (sparse(dk, dv, 0.25).float() for _ in range(2))

    def outputs(self, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """o and the last state in fp64, from the state or from nothing."""
        q, k, v = (x.double() for x in (self.q, self.k, self.v))
        before = torch.zeros_like(self.state) if start is None else start
        return (q @ k.mT).tril() @ v + q @ before.double(), before + k.mT @ v

    def gradients(self, start: Tensor | None, d_end: Tensor | None) -> tuple[Tensor, ...]:
        """Those of q, k, v, of the log-decay as one per token, and of the state, in fp64."""
        q, k, v, do = (x.double() for x in (self.q, self.k, self.v, self.do))
        before, after = (torch.zeros_like(self.state).double() if x is None else x.double() for x in (start, d_end))
        scores, d_scores = (q @ k.mT).tril(), (do @ v.mT).tril()
        dq, dk, dv = d_scores @ k + do @ before.mT, d_scores.mT @ q + v @ after.mT, scores.mT @ do + k @ after
        later = ((q * dq).sum(-1) - (k * dk).sum(-1)).flip(-1).cumsum(-1).flip(-1)
        end = self.outputs(start)[1]
        return dq, dk, dv, later + (end * after).sum((-2, -1))[..., None], after + q.mT @ do


def equal(found: Iterable[Tensor], want: Iterable[Tensor]) -> bool:
    """Whether they are the same numbers in the dtypes found; what was not asked for is empty, and right."""
    pairs = zip(found, want, strict=True)
    return all(a.numel() == 0 or torch.equal(a, (b.sum((0, 2)) if a.dim() == 1 else b).to(a.dtype)) for a, b in pairs)

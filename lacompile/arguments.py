"""Arguments of the public functions: what becomes of them, and the error that names the first one that is wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .errors import BadArgument


def heads_of(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None) -> int:
    """H of a call."""
    from .kernels.reference import head_count

    return head_count(q, k, v, log_decay, state)


def state_dtype(q: Tensor) -> torch.dtype:
    """The dtype that states are kept in for inputs like q."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def as_scale(scale: Any) -> float:
    """The factor of the output, a number of Python."""
    if isinstance(scale, Tensor) or not isinstance(scale, int | float):
        raise BadArgument("scale", "a Python number", type(scale).__name__)
    return float(scale)


def as_log_decay(log_decay: Any, q: Tensor) -> Tensor:
    """Log-decays as a tensor; where they are given as a list, which costs no synchronisation, the sign is checked."""
    if isinstance(log_decay, Tensor):
        return log_decay
    try:
        numbers = torch.as_tensor(log_decay, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise BadArgument("log_decay", "a tensor, or numbers in a list", type(log_decay).__name__) from None
    given = tree_leaves(log_decay) if isinstance(log_decay, list | tuple) else numbers.flatten().tolist()
    if not all(n <= 0 for n in given):  # asked of the numbers: a graph that holds a tensor of them has no answer
        raise BadArgument("log_decay", "natural logarithms of at most 0", f"{float(numbers.max())}")
    if not isinstance(q, Tensor):
        return numbers
    return numbers.to(q.device, state_dtype(q))


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    *,
    state_name: str = "initial_state",
    states: int | None = None,
) -> None:
    """Raises BadArgument for the first argument that does not fit the others; ``states`` is B unless given."""
    optional = () if state is None else ((state_name, state),)
    for name, x in (("q", q), ("k", k), ("v", v), ("log_decay", log_decay), *optional):
        _check_tensor(name, x)
        if x.device != q.device:
            raise BadArgument(name, f"device {q.device} like q", str(x.device))
    batch, _, length, dk = q.shape
    heads = heads_of(q, k, v, log_decay, state)
    for name, x in (("k", k), ("v", v)):
        if x.shape[0] != batch or x.shape[2] != length:
            raise BadArgument(name, f"batch {batch} and length {length} like q", f"{tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise BadArgument(name, f"dtype {q.dtype} like q", str(x.dtype))
    if k.shape[3] != dk:
        raise BadArgument("k", f"head dimension {dk} like q", f"{k.shape[3]}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[1] == 0 or heads % x.shape[1]:
            raise BadArgument(name, f"a number of heads that divides {heads}", f"{x.shape[1]}")
    want = (heads,) if log_decay.dim() == 1 else (batch, heads, length)
    if tuple(log_decay.shape) != want:
        raise BadArgument("log_decay", f"shape {want}", f"{tuple(log_decay.shape)}")
    want = (batch if states is None else states, heads, dk, v.shape[3])
    if state is not None and tuple(state.shape) != want:
        raise BadArgument(state_name, f"shape {want}", f"{tuple(state.shape)}")


_LAYOUTS = {
    "q": ("a tensor [B,H,N,D]", (4,)),
    "k": ("a tensor [B,H,N,D]", (4,)),
    "v": ("a tensor [B,H,N,D]", (4,)),
    "log_decay": ("shape [H] or [B,H,N]", (1, 3)),
    "initial_state": ("a tensor [B,H,Dk,Dv]", (4,)),
    "state": ("a tensor [B,H,Dk,Dv]", (4,)),
}


def _check_tensor(name: str, x: Any) -> None:
    layout, dimensions = _LAYOUTS[name]
    if not isinstance(x, Tensor):
        raise BadArgument(name, layout, type(x).__name__)
    if x.dim() not in dimensions:
        raise BadArgument(name, layout, f"{x.dim()} dimensions {tuple(x.shape)}")
    if not x.is_floating_point():
        raise BadArgument(name, "a floating-point tensor", str(x.dtype))

"""Seeded arguments of a decayed attention: the same numbers for every dtype, device and layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def qkv(
    batch: int = 2,
    heads: int = 4,
    length: int = 40,
    dk: int = 16,
    dv: int | None = None,
    *,
    q_heads: int | None = None,
    k_heads: int | None = None,
    v_heads: int | None = None,
    tokens_first: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q ``[B,Hq,N,Dk]``, k ``[B,Hk,N,Dk]`` and v ``[B,Hv,N,Dv]``, normally distributed.

    k is scaled by ``Dk**-0.5``, so that a score ``q_i . k_j`` is of the order of one.

    Args:
        batch, heads, length, dk: B, H, N and Dk; any of them may be 0, N in particular.
        dv: Dv; Dk unless given.
        q_heads, k_heads, v_heads: Hq, Hk and Hv; H unless given. Each should divide H.
        tokens_first: lay the tensors out as ``[B,N,H,D]`` in memory, as projections do; the shape stays the same.
        dtype, device, requires_grad: of the results.
        seed: of the random numbers, which are drawn in fp64 on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    dv = dk if dv is None else dv
    shapes = ((q_heads, dk, 1.0), (k_heads, dk, max(dk, 1) ** -0.5), (v_heads, dv, 1.0))
    made = []
    for own, size, factor in shapes:
        x = factor * torch.randn(
            batch, heads if own is None else own, length, size, generator=generator, dtype=torch.float64, device="cpu"
        )
        x = x.to(device=device, dtype=dtype)
        if tokens_first:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        made.append(x.requires_grad_(requires_grad))
    return made[0], made[1], made[2]


def head_log_decay(
    heads: int = 4,
    *,
    fastest: float = 0.5,
    slowest: float = 0.005,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
) -> Tensor:
    """One log-decay per head ``[H]``: natural logarithms from ``-fastest`` to ``-slowest``, geometrically spaced."""
    steps = torch.linspace(math.log(fastest), math.log(slowest), heads, dtype=torch.float64, device="cpu")
    return (-steps.exp()).to(device=device, dtype=dtype).requires_grad_(requires_grad)


def token_log_decay(
    batch: int = 2,
    heads: int = 4,
    length: int = 40,
    *,
    mean: float = 0.1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
    seed: int = 1,
) -> Tensor:
    """One log-decay per token ``[B,H,N]``: natural logarithms, uniform in ``(-2 mean, 0]``."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(batch, heads, length, generator=generator, dtype=torch.float64, device="cpu")
    return (-2 * mean * uniform).to(device=device, dtype=dtype).requires_grad_(requires_grad)


def state(
    batch: int = 2,
    heads: int = 4,
    dk: int = 16,
    dv: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
    seed: int = 2,
) -> Tensor:
    """A state before the first token, ``[B,H,Dk,Dv]``, normally distributed."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, dk, dk if dv is None else dv)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return x.to(device=device, dtype=dtype).requires_grad_(requires_grad)

"""The implementations that are compared, all called alike: ``peer(q, k, v, log_decay)`` gives o ``[B,H,N,D]``.

q, k and v are ``[B,H,N,D]`` with tokens before heads in memory, as projections make them. What a peer cannot do it
raises; whoever is not installed is left out. Softmax attention computes something else: it is there for scale.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lacompile import decayed_attention, decode_step

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Unsupported(Exception):
    """A peer has no such function."""


@dataclass(frozen=True)
class Peer:
    """One implementation.

    Attributes:
        name: as in tables and pictures.
        attend: the call, on all tokens of a sequence.
        decode: the call on one token, with a state that it may overwrite: (q, k, v, log_decay, state) to o.
        heads_first: it wants tensors that are contiguous as ``[B,H,N,D]``.
        compiles_each_shape: a new size is a new kernel.
        same_function: whether it computes a decayed attention, so that it is judged against fp64.
    """

    name: str
    attend: Attention
    decode: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    heads_first: bool = False
    compiles_each_shape: bool = False
    same_function: bool = True


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _softmax(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _decay_argument(log_decay: Tensor) -> dict[str, Tensor]:
    return {"g_gamma": log_decay} if log_decay.dim() == 1 else {"g": log_decay.transpose(1, 2)}


def _fla(function: str) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        from fla.ops import simple_gla

        call = getattr(simple_gla, function)
        tokens_first = (x.transpose(1, 2) for x in (q, k, v))
        return call(*tokens_first, **_decay_argument(log_decay), scale=1.0)[0].transpose(1, 2)

    return attend


def _fla_decode(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    tokens_first = (x.transpose(1, 2) for x in (q, k, v))
    decay = _decay_argument(log_decay)
    return fused_recurrent_simple_gla(
        *tokens_first, **decay, scale=1.0, initial_state=state, output_final_state=True
    )[0].transpose(1, 2)  # fmt: skip


def _official(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    from lightning_attn.ops import lightning_attn_func

    if log_decay.dim() != 1:
        raise Unsupported("no decay per token")
    return lightning_attn_func(q, k, v, -log_decay[:, None, None])


OURS = Peer("lacompile", decayed_attention, lambda q, k, v, g, state: decode_step(q, k, v, g, state))
SOFTMAX = Peer("softmax (SDPA)", _softmax, same_function=False)
FLA = Peer("fla chunk", _fla("chunk_simple_gla"), _fla_decode)


def installed() -> list[Peer]:
    """Ours, and every peer that is there."""
    found = [OURS]
    if torch.cuda.is_available() and _has("fla"):
        found += [FLA, Peer("fla fused_chunk", _fla("fused_chunk_simple_gla"))]
    if torch.cuda.is_available() and _has("lightning_attn"):
        found.append(Peer("official", _official, heads_first=True, compiles_each_shape=True))
    return [*found, SOFTMAX]


def share_autotuning(shard: int = 0, shards: int = 1) -> None:
    """Triton kernels that tune themselves, if imported after this: each ``shards``-th configuration from ``shard`` on.

    A peer with a hundred configurations compiles for minutes. Spread over processes that share Triton's cache on disk
    it takes a fraction of that, and one that tries them all afterwards finds them compiled. It then times each for
    25 ms, a quarter of Triton's own choice and still tens of calls.
    """
    from triton.runtime import autotuner
    from triton.testing import do_bench

    made = autotuner.Autotuner.__init__

    def briefly(call, quantiles):  # type: ignore[no-untyped-def]
        return do_bench(call, warmup=5, rep=25, quantiles=quantiles)

    def with_fewer(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        made(self, *args, **kwargs)
        self._do_bench = briefly
        self.configs = self.configs[shard::shards] or self.configs[:1]

    autotuner.Autotuner.__init__ = with_fewer

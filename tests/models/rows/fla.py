"""fla-core: the plain PyTorch references that its kernels are tested against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..loading import load
from ..matrix import Row

B, H, D = 1, 2, 8


def naive(family: str, name: str, file: str = "naive") -> Any:
    return getattr(load("fla", f"ops/{family}/{file}.py"), name)


def given(*sizes: int) -> Tensor:
    return torch.randn(sizes, requires_grad=True)


def tokens_first(length: int, *features: int) -> list[Tensor]:
    return [given(B, length, H, f) for f in features]


def heads_first(length: int, *features: int) -> list[Tensor]:
    return [given(B, H, length, f) for f in features]


def gates(*sizes: int) -> Tensor:
    return F.logsigmoid(torch.randn(sizes)).requires_grad_()


def shares(*sizes: int) -> Tensor:
    return torch.rand(sizes).requires_grad_()


def retention(n):
    return naive("retention", "naive_retention"), heads_first(n, D, D, D)


def simple_parallel(n):
    f = naive("simple_gla", "naive_parallel_simple_gla")
    return lambda *x: f(*x)[0], (*tokens_first(n, D, D, D), gates(B, n, H))


def simple_chunks(n):
    f = naive("simple_gla", "naive_chunk_simple_gla")
    args = (*tokens_first(n, D, D, 2 * D), gates(B, n, H))
    return lambda *x: f(*x, chunk_size=16)[0], args


def simple_chunks_with_state(n):
    f = naive("simple_gla", "naive_chunk_simple_gla")
    args = (*tokens_first(n, D, D, D), gates(B, n, H), given(B, H, D, D))
    return lambda *x: f(*x, output_final_state=True, chunk_size=16), args


def simple_tokens(n):
    f = naive("simple_gla", "naive_recurrent_simple_gla")
    args = (*tokens_first(n, D, D, D), gates(B, n, H), given(B, H, D, D))
    return lambda q, k, v, g, s: f(q, k, v, g, initial_state=s), args


def linear_chunks(normalize):
    def make(n):
        f = naive("linear_attn", "naive_chunk_linear_attn")
        return lambda q, k, v: f(q.exp(), k.exp(), v, normalize=normalize), tokens_first(n, D, D, D)

    return make


def linear_tokens(normalize):
    def make(n):
        f = naive("linear_attn", "naive_recurrent_linear_attn")
        return lambda q, k, v: f(q.exp(), k.exp(), v, normalize=normalize)[0], tokens_first(n, D, D, D)

    return make


def gla(n):
    f = naive("gla", "naive_recurrent_gla")
    return lambda *x: f(*x)[0], (*tokens_first(n, D, D, D), gates(B, n, H, D))


def rwkv6_tokens(n):
    f = naive("rwkv6", "naive_recurrent_rwkv6", "recurrent_naive")
    return lambda *x: f(*x)[0], (*heads_first(n, D, D, D), gates(B, H, n, D), given(H, D))


def rwkv6_chunks(n):
    f = naive("rwkv6", "naive_chunk_rwkv6", "chunk_naive")
    args = (*heads_first(n, D, D, D), gates(B, H, n, D), given(H, D))
    return lambda *x: f(*x, chunk_size=8), args


def hgrn(n):
    f = naive("hgrn", "naive_recurrent_hgrn")
    return lambda *x: f(*x)[0], (given(B, n, D), gates(B, n, D))


def gsa(n):
    f = naive("gsa", "naive_recurrent_gsa")
    return lambda *x: f(*x)[0], (*tokens_first(n, D, D, D, 4), gates(B, n, H, 4))


def abc(n):
    f = naive("abc", "naive_cumsum_abc")
    return lambda *x: f(*x)[0], heads_first(n, D, D, D, 4)


def based(use_norm):
    def make(n):
        f = naive("based", "naive_parallel_based")
        return lambda *x: f(*x, use_norm=use_norm), heads_first(n, D, D, D)

    return make


def rebased(n):
    return naive("rebased", "naive_parallel_rebased"), heads_first(n, D, D, D)


def delta(name, by_chunks):
    def make(n):
        f = naive("delta_rule", name)
        q, k, v = heads_first(n, D, D, D)
        more = {"chunk_size": 8} if name.endswith("chunkwise") else {"BM": 32, "BN": 16} if by_chunks else {}
        run = lambda q, k, v, b: f(q, F.normalize(k, dim=-1), v, b, **more)[0]  # noqa: E731
        return run, (q, k, v, shares(*q.shape[:3]))

    return make


def gated_delta_tokens(n):
    f = naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")
    run = lambda q, k, v, b, g: f(q, F.normalize(k, dim=-1), v, b, g)[0]  # noqa: E731
    return run, (*tokens_first(n, D, D, D), shares(B, n, H), gates(B, n, H))


def gated_delta_chunks(n):
    f = naive("gated_delta_rule", "naive_chunk_gated_delta_rule")
    run = lambda q, k, v, b, g: f(q, F.normalize(k, dim=-1), v, g, b, chunk_size=8)[0]  # noqa: E731
    return run, (*tokens_first(n, D, D, D), shares(B, n, H), gates(B, n, H))


def delta_product(n):
    f = naive("gated_delta_product", "naive_recurrent_gated_delta_product")
    run = lambda q, k, v, g, b: f(q, F.normalize(k, dim=-1), v, g, b, 1.0, num_householder=2)[0]  # noqa: E731
    return run, (*tokens_first(n, D), *tokens_first(2 * n, D, D), gates(B, n, H), shares(B, 2 * n, H))


def kda_tokens(n):
    f = naive("kda", "naive_recurrent_kda")
    run = lambda q, k, v, g, b: f(q, F.normalize(k, dim=-1), v, g, b)[0]  # noqa: E731
    return run, (*tokens_first(n, D, D, D), gates(B, n, H, D), shares(B, n, H))


def kda_chunks(n):
    f = naive("kda", "naive_chunk_kda")
    run = lambda q, k, v, g, b: f(q, F.normalize(k, dim=-1), v, g, b, chunk_size=8)[0]  # noqa: E731
    return run, (*tokens_first(n, D, D, D), gates(B, n, H, D), shares(B, n, H))


def comba(n):
    f = naive("comba", "naive_recurrent_comba")
    run = lambda q, k, v, p, b, g: f(q, F.normalize(k, dim=-1), v, F.normalize(p, dim=-1), b, g)[0]  # noqa: E731
    return run, (*tokens_first(n, D, D, D, D), shares(B, n, H), gates(B, n, H))


def mesa(n):
    f = naive("mesa_net", "naive_mesa_net_exact")
    return lambda q, k, v, g, l, b: f(q, k, v, g, l, b)[0], (  # noqa: E741
        *tokens_first(n, D, D, D),
        gates(B, n, H),
        (torch.rand(H, D) + 1).requires_grad_(),
        shares(B, n, H),
    )


def mesa_chunks(n):
    f = naive("mesa_net", "naive_mesa_net_CG")
    return lambda q, k, v, g, l, b: f(q, k, v, g, l, b, 8, max_CG_iteration=2)[0], (  # noqa: E741
        *tokens_first(n, D, D, D),
        gates(B, n, H),
        (torch.rand(H, D) + 1).requires_grad_(),
        shares(B, n, H),
    )


def log_linear(n):
    f = naive("log_linear_attn", "naive_log_linear_attn")
    return f, (*tokens_first(n, D, D, D), gates(B, n, H), shares(B, n, H, 4))


def forgetting(n):
    f = naive("forgetting_attn", "naive_forgetting_attn")
    return lambda *x: f(*x), (*tokens_first(n, D, D, D), gates(B, n, H))


def softmax(n):
    f = naive("attn", "naive_parallel_attn")
    return lambda q, k, v, g: f(q, k, v, g=g)[0], (*tokens_first(n, D, D, D), gates(B, n, H))


def stickbreaking(n):
    f = naive("stickbreaking_attn", "naive_stickbreaking_attn")
    return lambda *x: f(*x)[0], tokens_first(n, D, D, D)


def row(what: str, formulation: str, make: Any, length: int, rewrites: int = 1, reason: str | None = None, **more: Any):
    return Row("fla-core", what, formulation, make, length, rewrites, reason, **more)


ROWS = [
    row("`naive_retention`", "parallel", retention, 40, before=48, any_length="a number"),
    row("`naive_parallel_simple_gla`", "parallel", simple_parallel, 40, before=48),
    row("`naive_chunk_simple_gla`", "chunkwise", simple_chunks, 48),
    row("`naive_chunk_simple_gla`, padded", "chunkwise", simple_chunks, 37, before=39, any_length="a number"),
    row("`naive_chunk_simple_gla`, state in and out", "chunkwise", simple_chunks_with_state, 48),
    row("`naive_recurrent_simple_gla`, state in and out", "recurrent", simple_tokens, 12),
    row("`naive_chunk_linear_attn`", "chunkwise", linear_chunks(False), 128, before=192),
    row("`naive_chunk_linear_attn`, normalised", "chunkwise", linear_chunks(True), 128, 2),
    row("`naive_recurrent_linear_attn`", "recurrent", linear_tokens(False), 12),
    row("`naive_recurrent_linear_attn`, normalised", "recurrent", linear_tokens(True), 12, 2),
    row("`naive_parallel_based`", "parallel", based(True), 24, 5, before=32),
    row("`naive_parallel_based`, not normalised", "parallel", based(False), 24, 3),
    row("`naive_parallel_rebased`", "parallel", rebased, 24, 2),
    row("`naive_recurrent_gla`", "decay per feature", gla, 8, 0, "decay"),
    row("`naive_recurrent_rwkv6`", "decay per feature", rwkv6_tokens, 8, 0, "decay"),
    row("`naive_chunk_rwkv6`", "decay per feature", rwkv6_chunks, 16, 0, "decay", grads=False),
    row("`naive_recurrent_hgrn`", "decay per feature", hgrn, 8, 0, "separable"),
    row("`naive_recurrent_gsa`", "decay per feature", gsa, 6, 1, "decay"),
    row("`naive_cumsum_abc`", "other", abc, 12, 2),
    row("`delta_rule_recurrence`", "delta rule", delta("delta_rule_recurrence", False), 6, 0, "recurrence"),
    row("`delta_rule_chunkwise`", "delta rule", delta("delta_rule_chunkwise", True), 16, 0, "recurrence"),
    row("`delta_rule_parallel`", "delta rule", delta("delta_rule_parallel", True), 64, 0, "recurrence"),
    row("`naive_recurrent_gated_delta_rule`", "delta rule", gated_delta_tokens, 6, 0, "recurrence"),
    row("`naive_chunk_gated_delta_rule`", "delta rule", gated_delta_chunks, 16, 0, "recurrence"),
    row("`naive_chunk_gated_delta_rule`, padded", "delta rule", gated_delta_chunks, 13, 0, "recurrence"),
    row("`naive_recurrent_gated_delta_product`", "delta rule", delta_product, 4, 0, "recurrence"),
    row("`naive_recurrent_kda`", "delta rule", kda_tokens, 4, 0, "recurrence"),
    row("`naive_chunk_kda`", "delta rule", kda_chunks, 16, 0, "recurrence"),
    row("`naive_recurrent_comba`", "delta rule", comba, 4, 0, "recurrence"),
    row("`naive_mesa_net_exact`", "other", mesa, 4, 1, "separable"),
    row("`naive_mesa_net_CG`", "other", mesa_chunks, 16, 2, "separable"),
    row("`naive_log_linear_attn`", "other", log_linear, 8, 0, "causal-range"),
    row("`naive_forgetting_attn`", "other", forgetting, 24, 0, "separable"),
    row("`naive_parallel_attn`, gated", "other", softmax, 24, 0, "separable"),
    row("`naive_stickbreaking_attn`", "other", stickbreaking, 24, 0, "separable"),
]

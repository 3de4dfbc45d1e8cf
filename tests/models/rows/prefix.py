"""Linear attention by prefix sums, masks made row by row, chunks, recursion, and one feature at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..loading import load
from ..matrix import Row

TRANSFORMER = "linear-attention-transformer"
TRANSFORMER_LACKS = (
    "local_attention",
    "linformer",
    "product_key_memory",
    "axial_positional_embedding",
    "linear_attention_transformer",
    "linear_attention_transformer.reversible",
)
PERFORMER_LACKS = ("local_attention", "axial_positional_embedding", "performer_pytorch.reversible")


def heads(n: int, d: int = 8) -> list[Tensor]:
    return [torch.randn(1, 2, n, d, requires_grad=True) for _ in range(3)]


def transformer(bucket):
    def make(n):
        attend = load("linear_attention_transformer", "linear_attention_transformer.py", TRANSFORMER_LACKS)
        return lambda q, k, v: attend.causal_linear_attn(q, k, v, bucket_size=bucket), heads(n)

    return make


def performer(n):
    attend = load("performer_pytorch", "performer_pytorch.py", PERFORMER_LACKS).causal_linear_attention_noncuda
    return lambda q, k, v: attend(q.exp(), k.exp(), v, chunk_size=8), heads(n)


def leet(name: str) -> Any:
    """A method's file; the one that builds an extension when it is imported is for other methods."""
    return load("leetDecoding", f"methods/{name}.py", ("leetDecoding.methods.causal_dot_product",))


SLOPES = torch.tensor([0.5, 0.1])


def masked_by_rows(n):
    return lambda q, k, v: leet("linear_attn").linear_attn(q, k, v, SLOPES.to(q.device)), heads(n)


def lower_triangle(n):
    return leet("linear_attn").linear_attn, heads(n)


def lightning(n):
    f = leet("lightningAttention2_torch").lightningAttention2_torch
    return lambda q, k, v: f(q, k, v, SLOPES.to(q.device)), heads(n)


def lightning_without_decay(n):
    return leet("lightningAttention2_torch").lightningAttention2_torch, heads(n)


def fleet(n):
    return leet("FleetAttention").FleetAttention, heads(n)


def recursion(n):
    def run(q, k, v, slopes):
        return leet("Recursion").recursive_infer_with_decay(q, k, v, 0, n, slopes)

    return run, (*heads(n), SLOPES.to(torch.get_default_device()))


ROWS = [
    Row(TRANSFORMER, "`causal_linear_attn`, buckets of one token", "parallel", transformer(1), 24, 2, before=32),
    Row(
        TRANSFORMER,
        "`causal_linear_attn`, buckets of 8, none of which sees itself",
        "other",
        transformer(8),
        24,
        0,
        "causal-range",
    ),
    Row("performer-pytorch", "`causal_linear_attention_noncuda`", "chunkwise", performer, 24, 2),
    Row("leetDecoding", "`linear_attn`", "parallel", masked_by_rows, 8),
    Row("leetDecoding", "`linear_attn`, no decay", "parallel", lower_triangle, 24, before=32),
    Row("leetDecoding", "`lightningAttention2_torch`", "chunkwise", lightning, 300),
    Row("leetDecoding", "`lightningAttention2_torch`, no decay", "chunkwise", lightning_without_decay, 300),
    Row("leetDecoding", "`FleetAttention`, no decay", "other", fleet, 24),
    Row("leetDecoding", "`recursive_infer_with_decay`", "other", recursion, 24, 1, "causal-range"),
]

"""Retention of two packages: masked, by tokens and by chunks, with the normalisers of the one that has them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from ..loading import load
from ..matrix import Row

TORCHSCALE_LACKS = (
    "fairscale",
    "fairscale.nn",
    "torchscale.architecture.utils",
    "torchscale.component.xmoe.moe_layer",
    "torchscale.component.xmoe.routing",
    "torchscale.component.droppath",
    "torchscale.component.feedforward_network",
)


class Torchscale(nn.Module):
    """The layer with the positions that the package's decoder gives it."""

    def __init__(self, chunks: bool):
        super().__init__()
        sizes = {"decoder_embed_dim": 32, "decoder_retention_heads": 2, "recurrent_chunk_size": 8}
        args = SimpleNamespace(multiway=False, layernorm_eps=1e-6, **sizes)
        module = load("torchscale", "architecture/retnet.py", TORCHSCALE_LACKS)
        self.retention = module.MultiScaleRetention(args, 32, 64, 2)
        self.positions = module.RetNetRelPos(args)
        self.chunks = chunks

    def forward(self, x):
        where = self.positions(x.shape[1], chunkwise_recurrent=self.chunks)
        return self.retention(x, where, chunkwise_recurrent=self.chunks)


def torchscale(chunks):
    return lambda n: (Torchscale(chunks), (torch.randn(2, n, 32),))


class Parallel(nn.Module):
    def __init__(self):
        from yet_another_retnet.retention import MultiScaleRetention

        super().__init__()
        self.retention = MultiScaleRetention(32, 4)

    def forward(self, x):
        return self.retention.forward_parallel(x, x, x)[0]


def parallel(n):
    return Parallel(), (torch.randn(2, n, 32),)


def heads(n: int) -> list[torch.Tensor]:
    return [torch.randn(1, 4, n, 8, requires_grad=True) for _ in range(3)]


def by_tokens(n):
    from yet_another_retnet.retention import retention_recurrent

    def run(q, k, v, state):
        out = []
        for t in range(q.shape[2]):
            o, state = retention_recurrent(q[:, :, t], k[:, :, t], v[:, :, t], state)
            out.append(o)
        return torch.stack(out, 2), state

    return run, (*heads(n), torch.randn(1, 4, 8, 8, requires_grad=True))


def by_chunks(n):
    from yet_another_retnet.retention import retention_chunkwise

    def run(q, k, v):
        out, state = [], None
        for start in range(0, q.shape[2], 8):
            o, state = retention_chunkwise(*(x[:, :, start : start + 8] for x in (q, k, v)), state)
            out.append(o)
        return torch.cat(out, 2)

    return run, heads(n)


YET_ANOTHER = "yet-another-retnet"
ROWS = [
    Row("torchscale", "`MultiScaleRetention`, its normaliser too", "parallel", torchscale(False), 40, 3, before=48),
    Row(
        "torchscale",
        "`MultiScaleRetention`, `chunkwise_recurrent=True`",
        "chunkwise",
        torchscale(True),
        24,
        0,
        "single-term",
    ),
    Row(YET_ANOTHER, "`MultiScaleRetention.forward_parallel`", "parallel", parallel, 40, before=48),
    Row(YET_ANOTHER, "`retention_recurrent` over tokens, state in and out", "recurrent", by_tokens, 8),
    Row(YET_ANOTHER, "`retention_chunkwise` over chunks", "chunkwise", by_chunks, 24),
]

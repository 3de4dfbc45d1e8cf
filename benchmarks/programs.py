"""Programs of any size for the benchmarks of the analysis: loops, batched chunks, and networks without a match.

Each family builds, for a number of repetitions, a function and its inputs. Tensors are tiny: the analysis sees shapes,
and Dynamo runs the program on fakes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS, DIM, CHUNK = 2, 8, 16
Program = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Family:
    """``nodes`` is about how many nodes of the Dynamo graph one repetition takes."""

    build: Callable[[int], Program]
    nodes: float
    matches: bool

    def of_nodes(self, n: int) -> tuple[int, Program]:
        """The program of about ``n`` nodes, and its repetitions."""
        count = max(2, round(n / self.nodes))
        torch.manual_seed(0)
        return count, self.build(count)


def sequences(length: int) -> list[Tensor]:
    return [torch.randn(1, HEADS, length, DIM) for _ in range(3)]


def token_loop(tokens: int) -> Program:
    """One step of the recurrence after the other, a decay per token."""

    def f(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        state, out = q.new_zeros(1, HEADS, DIM, DIM), []
        for t in range(tokens):
            state = state * g[:, :, t, None, None].exp() + k[:, :, t, :, None] * v[:, :, t, None, :]
            out.append((q[:, :, t, :, None] * state).sum(-2))
        return torch.stack(out, 2)

    return f, (*sequences(tokens), -torch.rand(1, HEADS, tokens))


def chunk_loop(chunks: int) -> Program:
    """A state carried from chunk to chunk, a decay per token, the last chunk as long as the others."""

    def f(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        state, out = q.new_zeros(1, HEADS, DIM, DIM), []
        above = torch.ones(CHUNK, CHUNK, dtype=torch.bool).triu(1)
        for start in range(0, chunks * CHUNK, CHUNK):
            qc, kc, vc, gc = (x[:, :, start : start + CHUNK] for x in (q, k, v, g))
            total = gc.cumsum(-1)
            weights = (total[..., :, None] - total[..., None, :]).masked_fill(above, float("-inf")).exp()
            out.append((qc @ kc.mT * weights) @ vc + (qc * total.exp()[..., None]) @ state)
            kc = kc * (total[..., -1:] - total).exp()[..., None]
            state = state * total[..., -1, None, None].exp() + kc.mT @ vc
        return torch.cat(out, 2)

    return f, (*sequences(chunks * CHUNK), -torch.rand(1, HEADS, chunks * CHUNK))


def segment_sums(x: Tensor) -> Tensor:
    """``[.., i, j]``: the sum over positions j + 1 to i, and -inf above the diagonal."""
    n = x.shape[-1]
    below, upto = (torch.ones(n, n, dtype=torch.bool).tril(d) for d in (-1, 0))
    total = x[..., :, None].expand(*x.shape, n).masked_fill(~below, 0).cumsum(-2)
    return total.masked_fill(~upto, float("-inf"))


def batched_scans(layers: int) -> Program:
    """Layers of Mamba-2's scan: all chunks at once, the recurrence over chunks a matrix of decays."""
    chunks = 4

    def scan(x: Tensor, g: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (chunks, CHUNK)) for f in (torch.sin, torch.cos, torch.tanh))
        g = g.unflatten(-1, (chunks, CHUNK))
        total = g.cumsum(-1)
        inside = (q @ k.mT * segment_sums(g).exp()) @ v
        states = (k * (total[..., -1:] - total).exp()[..., None]).mT @ v
        states = torch.cat([torch.zeros_like(states[:, :, :1]), states], 2)
        between = segment_sums(F.pad(total[..., -1], (1, 0))).exp()
        states = torch.einsum("bhcz,bhzde->bhcde", between, states)[:, :, :-1]
        return (inside + (q * total.exp()[..., None]) @ states).flatten(2, 3)

    def f(x: Tensor, g: Tensor) -> Tensor:
        for _ in range(layers):
            x = F.layer_norm(x + scan(x, g), (DIM,))
        return x

    length = chunks * CHUNK
    return f, (torch.randn(1, HEADS, length, DIM), -torch.rand(1, HEADS, length))


def softmax_transformer(layers: int) -> Program:
    """Attention with a causal softmax, written out, and a perceptron."""

    def f(x: Tensor, qkv: Tensor, out: Tensor, up: Tensor, down: Tensor) -> Tensor:
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        for _ in range(layers):
            y = F.layer_norm(x, (x.shape[-1],))
            q, k, v = (y @ qkv).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
            scores = (q @ k.mT * DIM**-0.5).masked_fill(future, float("-inf"))
            x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ out
            x = x + F.gelu(F.layer_norm(x, (x.shape[-1],)) @ up) @ down
        return x

    d = HEADS * DIM
    return f, (torch.randn(1, 12, d), *(torch.randn(s) / d for s in ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d))))


def perceptron(layers: int) -> Program:
    """Deep, with residual connections."""

    def f(x: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
        for _ in range(layers):
            x = x + F.gelu(F.linear(F.layer_norm(x, (DIM,)), up, bias)) @ down
        return x

    return f, (torch.randn(4, DIM), torch.randn(DIM, DIM), torch.randn(DIM, DIM), torch.randn(DIM))


def nonlinear_recurrence(tokens: int) -> Program:
    """A loop over tokens that is no linear attention."""

    def f(x: Tensor, h: Tensor, w: Tensor) -> Tensor:
        out = []
        for t in range(tokens):
            h = torch.tanh(h @ w + x[:, t])
            out.append(h)
        return torch.stack(out, 1)

    return f, (torch.randn(2, tokens, DIM), torch.randn(2, DIM), torch.randn(DIM, DIM))


FAMILIES: dict[str, Family] = {
    "token loop": Family(token_loop, 10, True),
    "chunk loop": Family(chunk_loop, 35, True),
    "batched scans": Family(batched_scans, 61, True),
    "softmax transformer": Family(softmax_transformer, 24, False),
    "perceptron": Family(perceptron, 5, False),
    "non-linear recurrence": Family(nonlinear_recurrence, 4, False),
}


def dynamo_graph(program: Program, then: Callable[[Any, Any], object]) -> None:
    """Hands the one graph that Dynamo makes of a program to ``then``, which runs inside Dynamo as a backend does."""
    f, inputs = program
    taken = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        taken.append(then(gm, example_inputs))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(f, backend=backend, dynamic=False, fullgraph=True)(*inputs)
    assert len(taken) == 1

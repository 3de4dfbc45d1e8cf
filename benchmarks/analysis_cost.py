"""What the analysis costs where it finds nothing: its seconds, beside those of Inductor on the same graph.

    python benchmarks/analysis_cost.py [--out benchmarks/results/analysis_cost_cpu.csv]

Two models without a decayed attention: a small GPT-like transformer with softmax attention, and a small convolutional
net. Each is compiled for inference, which is where Inductor takes the least time. Both times are those of the first
call on a graph, after the imports of both have been paid for by another graph. The caches on disk are empty at first;
the second size of a model finds kernels that the first has compiled, so that its share is the less flattering one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Row
from torch import Tensor, nn

from lacompile import _compat
from lacompile.backend import decide
from lacompile.options import Options

TARGET = 0.05
COLUMNS = ["model", "layers", "nodes", "analysis_s", "inductor_s", "share"]


class Block(nn.Module):
    """Attention with a causal softmax, written out, and a perceptron."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.second(x))


class GPT(nn.Module):
    """Tokens in, logits out."""

    def __init__(self, layers: int, dim: int = 64, heads: int = 4, vocabulary: int = 256, length: int = 128):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


class Residual(nn.Module):
    """Two convolutions, normalised, around which the input goes."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.layers(x)).relu()


def conv_net(blocks: int, channels: int = 32) -> nn.Module:
    stages = [nn.Conv2d(3, channels, 3, padding=1), *(Residual(channels) for _ in range(blocks))]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


MODELS: dict[str, tuple[Callable[[int], nn.Module], Callable[[], Tensor]]] = {
    "softmax transformer": (GPT, lambda: torch.randint(0, 256, (2, 128))),
    "convolutional net": (conv_net, lambda: torch.randn(2, 3, 32, 32)),
}


class Timed:
    """A backend that analyses a graph and then hands it to Inductor, and takes the time of both."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def __call__(self, gm: Any, example_inputs: Any) -> Any:
        start = time.perf_counter()
        decision = decide(gm, example_inputs, Options())
        analysed = time.perf_counter()
        assert decision.rewritten is None, "this is a benchmark of graphs without a match"
        compiled = _compat.compile_with_inductor(gm, example_inputs, {})
        done = time.perf_counter()
        self.rows.append(
            {
                "nodes": len(gm.graph.nodes),
                "analysis_s": round(analysed - start, 4),
                "inductor_s": round(done - analysed, 4),
                "share": round((analysed - start) / (done - analysed), 4),
                "near_misses": len(decision.report.near_misses),
            }
        )
        return compiled


def measure(model: nn.Module, x: Tensor) -> list[Row]:
    torch._dynamo.reset()
    backend = Timed()
    with torch.no_grad():
        torch.compile(model.eval().to(x.device), backend=backend, dynamic=False)(x)
    return backend.rows


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a CSV file; a page with the same name is written beside it")
    args = parser.parse_args()
    if args.device == "cpu" and (why := _compat.cpu_compiler_error()) is not None:
        sys.exit(f"Inductor cannot compile here, so there is nothing to compare with: {why}")
    warnings.filterwarnings("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        measure(nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1)), torch.ones(2, 8, device=args.device))
        for name, (build, example) in MODELS.items():
            for layers in args.layers:
                torch.manual_seed(0)
                for row in measure(build(layers), example().to(args.device)):
                    rows.append({"model": name, "layers": layers, **row})
                    print(rows[-1], flush=True)
    print(harness.markdown(rows, COLUMNS))
    worst = max(r["share"] for r in rows)
    print(f"the largest share is {worst:.1%}; the target is less than {TARGET:.0%}")
    if args.out is not None:
        about = harness.provenance("torch", threads=torch.get_num_threads())
        harness.write_csv(args.out, about, rows)
        harness.write_page(args.out.with_suffix(".md"), "Cost of the analysis without a match", about, rows, COLUMNS)


if __name__ == "__main__":
    main()

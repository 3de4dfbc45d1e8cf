"""Tokens per second of a training step against the length of the sequence, at constant tokens per step.

    python benchmarks/model.py --out benchmarks/results/model_h200.csv

Two small models written in plain PyTorch, each layer compiled by ``backend="lightning"`` and by Inductor alone: one in
the style of TransNormer (a masked square, as its authors write it for training) and one in the style of MiniMax (a loop
over chunks of 256). Beside them the same layers with softmax attention, PyTorch's fused kernel. A step is forward,
backward and AdamW, in bf16. Every row is a process of its own: they compile side by side and are timed one at a time.
A row that does not compile within --limit seconds is given up.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import harness
import processes
import torch
import torch.nn.functional as F
from harness import DEVICE, Row
from torch import Tensor, nn

import lacompile
from lacompile.backend import lightning

# ------------------------------------------------------------------------------------------------------ three models


def slopes(heads: int, layer: int, layers: int) -> Tensor:
    """Minus the log-decay of each head: a geometric series, smaller in later layers; ``[H]``."""
    series = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
    return series * (1 - layer / (layers - 1 + 1e-5) + 1e-5)


class Mixer(nn.Module):
    """Projections to heads and back; subclasses say what happens between. ``[B,N,F]`` to ``[B,N,F]``."""

    def __init__(self, width: int, heads: int, layer: int, layers: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.gate, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, width)
        self.register_buffer("slope", slopes(heads, layer, layers))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def merge(self, o: Tensor, gate: Tensor) -> Tensor:
        return self.out(F.rms_norm(o.transpose(1, 2).flatten(2), (gate.shape[-1],)) * gate)


class TransNormer(Mixer):
    """Scores times a mask of decays (arXiv 2307.14995)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        i = torch.arange(x.shape[1], device=x.device)
        distance = i[:, None] - i[None, :]
        decay = torch.exp(-self.slope.float()[:, None, None] * distance)
        mask = torch.where(distance >= 0, decay, 0.0).to(x.dtype)
        o = ((F.silu(q) @ F.silu(k).transpose(-1, -2)) * mask) @ v
        return self.merge(o, self.gate(x))


class MiniMax(Mixer):
    """A loop over chunks that carries the state (arXiv 2501.08313)."""

    CHUNK = 256

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.silu(y) for y in self.split(x))
        slope = self.slope.float()[:, None, None]
        i = torch.arange(1, self.CHUNK + 1, device=x.device)
        distance = (i[:, None] - i[None, :])[None]
        diagonal = torch.exp(torch.where(distance >= 0, -slope * distance, float("-inf"))).to(x.dtype)
        to_query = torch.exp(-slope * i[:, None]).to(x.dtype)
        from_key = torch.exp(-slope * (self.CHUNK - i[:, None])).to(x.dtype)
        whole = torch.exp(-slope * self.CHUNK).to(x.dtype)
        state = torch.zeros(x.shape[0], self.heads, q.shape[-1], v.shape[-1], dtype=x.dtype, device=x.device)
        parts = []
        for qc, kc, vc in zip(q.split(self.CHUNK, 2), k.split(self.CHUNK, 2), v.split(self.CHUNK, 2), strict=True):
            within = ((qc @ kc.transpose(-1, -2)) * diagonal) @ vc
            parts.append(within + (qc * to_query) @ state)
            state = whole * state + (kc * from_key).transpose(-1, -2) @ vc
        return self.merge(torch.cat(parts, 2), torch.sigmoid(self.gate(x)))


class Softmax(Mixer):
    """PyTorch's fused softmax attention in the same place."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True), torch.sigmoid(self.gate(x)))


class Block(nn.Module):
    """A mixer and a gated perceptron, each after a norm and with a residual."""

    def __init__(self, mixer: Mixer, width: int):
        super().__init__()
        self.mixer, self.first, self.second = mixer, nn.RMSNorm(width), nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 5 * width), nn.Linear(5 * width // 2, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.first(x))
        a, b = self.up(self.second(x)).chunk(2, -1)
        return x + self.down(F.silu(a) * b)


MIXERS: dict[str, type[Mixer]] = {"TransNormer": TransNormer, "MiniMax": MiniMax, "softmax": Softmax}

# ----------------------------------------------------------------------------------------------------------- one row


@dataclass(frozen=True)
class Run:
    """What one row is about. ``tokens`` is that of a step, ``length`` that of a sequence."""

    style: str
    backend: str
    length: int
    tokens: int
    width: int
    heads: int
    layers: int
    seconds: float
    limit: int


def training_step(run: Run) -> Callable[[], object]:
    torch.manual_seed(0)
    mixers = [MIXERS[run.style](run.width, run.heads, n, run.layers) for n in range(run.layers)]
    blocks = [Block(mixer, run.width).to(DEVICE, torch.bfloat16) for mixer in mixers]
    backend = lightning if run.backend == "lightning" else run.backend
    model = nn.Sequential(*(torch.compile(block, backend=backend, dynamic=False) for block in blocks))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    x = torch.randn(run.tokens // run.length, run.length, run.width, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(run.width, device=DEVICE, dtype=torch.bfloat16)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (model(x) @ weight).float().square().mean().backward()
        optimizer.step()

    return step


def rewrites() -> int:
    """How many attentions of a layer the backend has rewritten."""
    report = lacompile.last_report()
    return 0 if report is None else len(report.rewrites)


def measure(run: Run) -> Row:
    """One row; the first step, which compiles, beside those of other rows."""
    row: Row = {"style": run.style, "backend": run.backend, "N": run.length, "B": run.tokens // run.length}
    try:
        with processes.compiling(run.limit):
            step = training_step(run)
            row["first_s"] = round(first(step), 2)
            harness.release()
        if run.backend == "lightning":
            row["rewrites"] = rewrites()
            if not row["rewrites"]:
                row["failed"] = "nothing was rewritten"
                print(lacompile.last_report(), file=sys.stderr)
                return row
        with harness.turn(alone=True):
            step()
            row["peak_gb"] = round(harness.extra_bytes(step) / 1e9, 2)
            found = harness.times(step, run.seconds)
        row |= found.columns() | {"calls": found.calls, "tokens_per_s": round(run.tokens / (1e-3 * found.p50))}
    except torch.OutOfMemoryError:
        row["failed"] = "out of memory"
    except Exception as error:
        traceback.print_exc()
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return row


def first(step: Callable[[], object]) -> float:
    """Seconds of the first step. What does not fit beside the others may fit alone: that is found out later."""
    start = time.perf_counter()
    try:
        return harness.seconds(step)
    except torch.OutOfMemoryError:
        return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------------- all rows

LENGTHS = [2**n for n in (10, 12, 13, 15, 17)]
INDUCTOR_ON_A_LOOP, INDUCTOR_ON_A_MASK = 2**12, 2**15  # where it takes minutes, and where no device has the memory
COLUMNS = ["style", "backend", "N", "B", "tokens_per_s", "p50_ms", "peak_gb", "first_s", "failed"]


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a CSV file")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--tokens", type=int, default=2**17, help="of one step")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.6, help="for each figure")
    parser.add_argument("--limit", type=int, default=240, help="seconds in which a row must compile")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--dry", action="store_true", help="tiny models, on any device")
    parser.add_argument(processes.ONE, dest="one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        return processes.answer(args.one, lambda run: measure(Run(**run)))
    if args.dry:
        args.lengths, args.tokens, args.width, args.heads, args.seconds = [256, 512], 1024, 32, 2, 0.05
    shape = {k: getattr(args, k) for k in ("tokens", "width", "heads", "layers")}
    kinds = [(style, backend) for style in ("TransNormer", "MiniMax") for backend in ("lightning", "inductor")]
    runs = [
        asdict(Run(style, backend, length, **shape, seconds=args.seconds, limit=args.limit))
        for length in sorted(args.lengths, reverse=True)  # those that compile longest begin first
        for style, backend in [*kinds, ("softmax", "inductor")]
        if (style, backend) != ("MiniMax", "inductor") or length <= INDUCTOR_ON_A_LOOP
        if (style, backend) != ("TransNormer", "inductor") or length <= INDUCTOR_ON_A_MASK
    ]
    about = harness.provenance("torch", "triton", dtype="bfloat16", **shape)
    rows: list[Row] = []
    for run, row in processes.rows(__file__, runs, args.processes, args.limit):
        row = {"style": run["style"], "backend": run["backend"], "N": run["length"]} | row
        harness.show(row, COLUMNS)
        rows = sorted([*rows, row], key=lambda r: (r["style"], r["backend"], r["N"]))
        if args.out is not None:
            harness.write_csv(args.out, about, rows)
            harness.write_page(args.out.with_suffix(".md"), "Training step", about, rows, COLUMNS)


if __name__ == "__main__":
    main()

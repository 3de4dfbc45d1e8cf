"""The public MiniMax Lightning-Attention layer: eager, Inductor and lightning, forward and training step, in one run.

    python benchmarks/minimax_layer.py --lengths 2048 8192 32768 --out benchmarks/results/minimax_layer

Writes OUT.json and OUT.md after every row. Times are medians in milliseconds; the first call includes compilation.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import statistics
import sys
import time
import traceback
from pathlib import Path

import torch
import triton
from torch import nn
from transformers import MiniMaxConfig
from transformers import __version__ as transformers_version
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

import lacompile

BACKENDS = ("lightning", "eager", "inductor")


class Layer(nn.Module):
    """The attention of layer 1 of 4, 128 features to a head."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        config = MiniMaxConfig(
            hidden_size=hidden, num_attention_heads=heads, head_dim=128, num_hidden_layers=4, block_size=256,
            layer_types=["linear_attention"] * 4,
        )  # fmt: skip
        self.attention = MiniMaxLightningAttention(config, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, None, None)[0]


def synchronised(f):
    torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def median_ms(f, seconds: float = 1.0) -> float:
    """Median of single calls timed by events, after a warm-up."""
    for _ in range(3):
        f()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - start < seconds and len(times) < 50):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        f()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after))
    return statistics.median(times)


def measure(backend: str, layer: Layer, length: int, hidden: int) -> dict[str, object]:
    """One row of the table."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(1, length, hidden, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn_like(x)
    run = layer if backend == "eager" else torch.compile(layer, backend=backend, dynamic=False)
    row: dict[str, object] = {"backend": backend, "N": length}

    def forward():
        with torch.no_grad():
            return run(x)

    def train():
        layer.zero_grad(set_to_none=True)
        given = x.detach().requires_grad_()
        (run(given) * weight).sum().backward()

    try:
        for name, step in (("forward", forward), ("train", train)):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            row[f"{name}_first_s"] = round(synchronised(step), 2)
            row[f"{name}_ms"] = round(median_ms(step), 3)
            row[f"{name}_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        exact = exact_output(layer, x)
        out = forward().double()
        row["error"] = float(((out - exact).norm() / exact.norm()).item())
    except torch.OutOfMemoryError:
        row["failed"] = "out of memory"
    except Exception as error:  # one backend's failure must not lose the other rows
        traceback.print_exc()
        row["failed"] = type(error).__name__
    if backend == "lightning":
        report = lacompile.last_report()
        row["rewrites"] = 0 if report is None else len(report.rewrites)
        here = f"{Path(__file__).resolve().parents[1]}/"
        row["report"] = re.sub(r"\S*site-packages/", "", str(report)).replace(here, "")
    return row


def exact_output(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """The layer in fp64 on the same rounded weights and buffers."""
    copied = Layer(x.shape[-1], layer.attention.num_attention_heads).to(x.device)
    copied.load_state_dict(layer.state_dict())
    for mine, theirs in zip(copied.buffers(), layer.buffers(), strict=True):
        mine.data = theirs.data
    with torch.no_grad():
        return copied.double()(x.double())


def table(rows: list[dict[str, object]]) -> str:
    heads = ["N", "backend", "forward_ms", "train_ms", "forward_first_s", "train_first_s", "train_peak_gb", "error"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = [row.get(h, row.get("failed", "")) for h in heads]
        lines.append("| " + " | ".join(f"{c:.2e}" if h == "error" and isinstance(c, float) else str(c)
                                       for h, c in zip(heads, cells, strict=True)) + " |")  # fmt: skip
    return "\n".join(lines)


def write(out: Path, about: dict[str, object], rows: list[dict[str, object]]) -> None:
    """OUT.json and OUT.md with the rows so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    described = "\n".join(f"- {k}: {v}" for k, v in about.items())
    out.with_suffix(".md").write_text(f"# MiniMax Lightning-Attention layer\n\n{described}\n\n{table(rows)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    layer = Layer(args.hidden, args.heads).to("cuda", torch.bfloat16)
    about = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "transformers": transformers_version, "python": platform.python_version(),
        "date": datetime.date.today().isoformat(), "command": "python " + " ".join(sys.argv), "dtype": "bfloat16",
        "batch": 1, "hidden": args.hidden, "heads": args.heads, "head_dim": 128,
    }  # fmt: skip
    rows: list[dict[str, object]] = []
    for length in args.lengths:
        for backend in args.backends:
            rows.append(measure(backend, layer, length, args.hidden))
            print({k: v for k, v in rows[-1].items() if k != "report"}, flush=True)
            if args.out is not None:
                write(args.out, about, rows)
    print(table(rows))


if __name__ == "__main__":
    main()

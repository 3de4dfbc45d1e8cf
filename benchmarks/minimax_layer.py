"""The public MiniMax Lightning-Attention layer: eager, Inductor and lightning, forward and training step, in one run.

    python benchmarks/minimax_layer.py --lengths 2048 8192 32768 --out benchmarks/results/minimax_layer.csv

OUT is a CSV file, written after every row; a page with the same name is written beside it. Times are medians in
milliseconds; the first call includes compilation.
"""

from __future__ import annotations

import argparse
import re
import traceback
from pathlib import Path

import harness
import torch
from harness import Row
from torch import nn
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

import lacompile

BACKENDS = ("lightning", "eager", "inductor")
TITLE = "MiniMax Lightning-Attention layer"
COLUMNS = ["N", "backend", "forward_ms", "train_ms", "forward_first_s", "train_first_s", "train_peak_gb", "error"]


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


def measure(backend: str, layer: Layer, length: int, hidden: int) -> Row:
    """One row of the table."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(1, length, hidden, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn_like(x)
    run = layer if backend == "eager" else torch.compile(layer, backend=backend, dynamic=False)
    row: Row = {"backend": backend, "N": length}

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
            row[f"{name}_first_s"] = round(harness.seconds(step), 2)
            row[f"{name}_ms"] = round(harness.times(step, 1.0).p50, 3)
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
    about = harness.provenance(
        "torch", "triton", "transformers", dtype="bfloat16", batch=1, hidden=args.hidden, heads=args.heads, head_dim=128
    )
    rows: list[Row] = []
    for length in args.lengths:
        for backend in args.backends:
            rows.append(measure(backend, layer, length, args.hidden))
            print({k: v for k, v in rows[-1].items() if k != "report"}, flush=True)
            if args.out is not None:
                harness.write_csv(args.out, about, rows)
                harness.write_page(args.out.with_suffix(".md"), TITLE, about, rows, COLUMNS)


if __name__ == "__main__":
    main()

"""Public layers, unmodified: eager, Inductor alone and lightning, forward and training step, in one run.

    python benchmarks/layers.py --out benchmarks/results --name h100

Three layers in bf16, one sequence each: the Lightning-Attention layer of transformers' MiniMax, the mixer of its
Mamba-2 (the plain path, in PyTorch operations), and the retention layer of examples/quickstart.py, a masked square.
Times are medians in milliseconds with a cold L2 cache; the first call includes compilation, beside that of other rows
and from cold caches. Short sequences are also timed under ``mode="reduce-overhead"``, in which CUDA graphs take the
host's share away from both. The error is that of the output's first 2,048 tokens, which the layers compute from the
first 2,048 of the input, against fp64. A row that does not compile within --limit seconds is given up.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import harness
import processes
import torch
from harness import DEVICE, Row
from torch import Tensor, nn

import lacompile
from lacompile.backend import lightning

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
JUDGED = 2048
GRAPHS = "reduce-overhead"
GRAPHED = 8192
"""Up to this length the host may be what is measured."""
BACKENDS = ("lightning", "eager", "inductor", f"lightning {GRAPHS}", f"inductor {GRAPHS}")
COLUMNS = [
    "N", "backend", "forward_ms", "train_ms", "forward_vs_inductor", "train_vs_inductor", "forward_first_s",
    "train_first_s", "forward_peak_gb", "train_peak_gb", "error", "failed",
]  # fmt: skip

# ------------------------------------------------------------------------------------------------------------- layers


def quickstart() -> ModuleType:
    """The example, which has two of the layers."""
    sys.path.insert(0, str(EXAMPLES))
    import quickstart

    return quickstart


def minimax(hidden: int, heads: int) -> nn.Module:
    return quickstart().minimax(hidden, heads)


def retention(hidden: int, heads: int) -> nn.Module:
    return quickstart().Retention(hidden, heads)


def mamba2(hidden: int, heads: int) -> nn.Module:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=hidden, num_heads=heads, head_dim=2 * hidden // heads, state_size=128, n_groups=1, expand=2
    )
    return Mamba2Mixer(config, 0)


@dataclass(frozen=True)
class Layer:
    """How a layer is made and called, and on how many tokens it is measured."""

    title: str
    build: Callable[[int, int], nn.Module]
    call: Callable[[nn.Module, Tensor], Tensor]
    hidden: int
    heads: int
    lengths: tuple[int, ...]


LAYERS = {
    "minimax": Layer(
        "MiniMax Lightning-Attention layer", minimax, lambda f, x: f(x, None, None)[0], 2048, 16, (2048, 8192, 32768)
    ),
    "mamba2": Layer(
        "Mamba-2 mixer, plain path", mamba2, lambda f, x: f(x), 1024, 32, (2048, 8192, 16384, 65536)
    ),
    "retention": Layer(
        "Retention layer, a masked square", retention, lambda f, x: f(x), 2048, 16, (2048, 8192, 32768)
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------------ one row


@dataclass(frozen=True)
class Run:
    """What one row is about. ``backend`` is that of torch.compile and, after a space, a mode."""

    layer: str
    backend: str
    length: int
    hidden: int
    heads: int
    seconds: float
    limit: int


class Steps:
    """A layer on one input, and its calls."""

    def __init__(self, run: Run):
        torch.manual_seed(0)
        self.kind = LAYERS[run.layer]
        self.layer = self.kind.build(run.hidden, run.heads).to(DEVICE, torch.bfloat16)
        name, _, mode = run.backend.partition(" ")
        compiled = {"eager": None, "lightning": lightning, "inductor": "inductor"}[name]
        options = {"mode": mode or None, "dynamic": False}
        self.run = torch.compile(self.layer, backend=compiled, **options) if compiled else self.layer
        self.x = torch.randn(1, run.length, run.hidden, device=DEVICE, dtype=torch.bfloat16)
        self.weight = torch.randn_like(self.x)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.kind.call(self.run, self.x)

    def train(self) -> None:
        self.layer.zero_grad(set_to_none=True)
        given = self.x.detach().requires_grad_()
        (self.kind.call(self.run, given) * self.weight).sum().backward()

    def error(self) -> float:
        """Of the first JUDGED tokens, against the layer in fp64 on the same rounded weights and buffers."""
        exact_layer = copy.deepcopy(self.layer).double()
        with torch.no_grad():
            exact = self.kind.call(exact_layer, self.x[:, :JUDGED].double())
            found = self.forward()[:, :JUDGED].double()
        return float(f"{float((found - exact).norm() / exact.norm()):.3g}")


def first_calls(steps: Steps, row: Row) -> None:
    """Seconds of the first calls. What does not fit beside the other rows may fit alone: that is found out later."""
    for name in ("forward", "train"):
        try:
            row[f"{name}_first_s"] = round(harness.seconds(getattr(steps, name)), 2)
        except torch.OutOfMemoryError:
            row[f"{name}_first_s"] = None
        harness.release()


def timed_calls(steps: Steps, row: Row, seconds: float) -> None:
    """Times and memory, and the error of the output."""
    for name in ("forward", "train"):
        try:
            step = getattr(steps, name)
            step()
            row[f"{name}_peak_gb"] = round(harness.extra_bytes(step) / 1e9, 2)
            row[f"{name}_ms"] = round(harness.times(step, seconds).p50, 3)
        except torch.OutOfMemoryError:
            row["failed"] = f"{name}: out of memory"
            return
        finally:
            steps.layer.zero_grad(set_to_none=True)
            harness.release()
    row["error"] = steps.error()


def measure(run: Run) -> Row:
    """One row."""
    row: Row = {"N": run.length, "backend": run.backend}
    try:
        if run.backend == "eager":
            with harness.turn(alone=True):
                timed_calls(Steps(run), row, run.seconds)
            return row
        with processes.compiling(run.limit):
            steps = Steps(run)
            first_calls(steps, row)
        if run.backend.startswith("lightning"):
            report = lacompile.last_report()
            row["rewrites"] = 0 if report is None else len(report.rewrites)
            if not row["rewrites"]:
                print(report, file=sys.stderr)
        with harness.turn(alone=True):
            timed_calls(steps, row, run.seconds)
    except torch.OutOfMemoryError:
        row["failed"] = "out of memory"
    except Exception as error:  # one backend's failure must not lose the other rows
        traceback.print_exc()
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return row


# ----------------------------------------------------------------------------------------------------------- all rows


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows in order, those of lightning with how many times as long Inductor alone takes in the same mode."""
    found = {(row["N"], row["backend"]): dict(row) for row in rows}
    for (length, backend), row in found.items():
        other = found.get((length, backend.replace("lightning", "inductor")), {})
        for name in ("forward", "train") if backend.startswith("lightning") else ():
            if other.get(f"{name}_ms") and row.get(f"{name}_ms"):
                row[f"{name}_vs_inductor"] = round(other[f"{name}_ms"] / row[f"{name}_ms"], 2)
    return [found[key] for key in sorted(found, key=lambda k: (k[0], BACKENDS.index(k[1])))]


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder: LAYER_layer_NAME.csv and .md for each layer")
    parser.add_argument("--name", default="gpu", help="of the device, in file names")
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--lengths", type=int, nargs="+", help="instead of each layer's own")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--seconds", type=float, default=0.6, help="for each figure")
    parser.add_argument("--limit", type=int, default=270, help="seconds in which a row must compile")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--small", action="store_true", help="an eighth of the width, for a CPU")
    parser.add_argument(processes.ONE, type=str, dest="one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        return processes.answer(args.one, lambda run: measure(Run(**run)))
    shrink = 8 if args.small else 1
    runs = [
        asdict(Run(name, backend, n, layer.hidden // shrink, layer.heads // shrink, args.seconds, args.limit))
        for name in args.layers
        for layer in [LAYERS[name]]
        for n in args.lengths or layer.lengths
        for backend in args.backends
        if GRAPHS not in backend or (n <= GRAPHED and harness.GPU)
    ]
    # What compiles longest begins first.
    runs.sort(key=lambda run: ("inductor" not in run["backend"] or run["layer"] == "retention", -run["length"]))
    about = harness.provenance("torch", "triton", "transformers", dtype="bfloat16", batch=1, processes=args.processes)
    rows: dict[str, list[Row]] = {name: [] for name in args.layers}
    for run, row in processes.rows(__file__, runs, args.processes, args.limit):
        name = run["layer"]
        rows[name].append({"N": run["length"], "backend": run["backend"]} | row)
        harness.show({"layer": name} | rows[name][-1], ["layer", *COLUMNS])
        if args.out is not None:
            layer, stem = LAYERS[name], args.out / f"{name}_layer_{args.name}"
            said = about | {"hidden": str(run["hidden"]), "heads": str(run["heads"])}
            harness.write_csv(stem.with_suffix(".csv"), said, compared(rows[name]))
            harness.write_page(stem.with_suffix(".md"), layer.title, said, compared(rows[name]), COLUMNS)


if __name__ == "__main__":
    main()

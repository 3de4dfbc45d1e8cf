"""Where the seconds of a first call go: Dynamo, the analysis, Inductor, the kernels, with the backend and without it.

    python benchmarks/compile_time.py --out benchmarks/results/compile_time_cpu.csv

The Lightning-Attention layer of transformers' MiniMax, forward, as examples/quickstart.py runs it, on sequences whose
loop over blocks of 256 is unrolled; in bf16 on a GPU. Each row has a process of its own with cold caches; ``run_s`` is
the second call, and ``kernels_s`` what the compiled graph takes longer in the first one, where the operator's kernels
are compiled. ``dynamo_s`` is what is left of the first call without the backend and those. A row that does not compile
within --limit seconds is given up, which is said in ``failed``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import processes
import torch
from harness import DEVICE, Row
from layers import LAYERS
from torch._inductor.compile_fx import compile_fx

import lacompile
from lacompile.backend import lightning

LENGTHS = (4096, 16384, 32768)
BACKENDS: dict[str, Callable[..., Any]] = {"lightning": lightning, "inductor": compile_fx}
COLUMNS = ["N", "backend", "first_s", "dynamo_s", "analysis_s", "inductor_s", "kernels_s", "run_s", "nodes"]
COLUMNS += ["nodes_handed_over", "rewrites", "failed"]
DTYPE = torch.bfloat16 if harness.GPU else torch.float32


def measure(run: Row) -> Row:
    """One row."""
    torch.manual_seed(0)
    kind = LAYERS["minimax"]
    layer = kind.build(run["hidden"], run["heads"]).to(DEVICE, DTYPE)
    x = torch.randn(1, run["N"], run["hidden"], device=DEVICE, dtype=DTYPE)
    row: Row = {"inductor_s": 0.0, "nodes": 0}
    ran: list[float] = []  # seconds in each call of a compiled graph

    def timed(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        start = time.perf_counter()
        row["nodes"] += len(gm.graph.nodes)
        compiled = BACKENDS[run["backend"]](gm, example_inputs)
        row["inductor_s"] += time.perf_counter() - start

        def called(*args: Any) -> Any:
            found: list[Any] = []
            ran.append(harness.seconds(lambda: found.append(compiled(*args))))
            return found[0]

        return called

    compiled = torch.compile(layer, backend=timed, dynamic=False)
    with processes.compiling(run["limit"]), torch.no_grad():
        row["first_s"] = harness.seconds(lambda: kind.call(compiled, x))
    in_graphs = sum(ran)
    with torch.no_grad():
        row["run_s"] = harness.seconds(lambda: kind.call(compiled, x))
    row["dynamo_s"] = row["first_s"] - row["inductor_s"] - in_graphs
    row["kernels_s"] = in_graphs - row["run_s"]
    if run["backend"] == "lightning":
        report = lacompile.last_report()
        assert report is not None
        row |= {"rewrites": len(report.rewrites), "nodes_handed_over": report.nodes_after}
        row["analysis_s"] = report.seconds["total"]
        row["inductor_s"] -= row["analysis_s"]
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a CSV file; a page with the same name is written beside it")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--limit", type=int, default=900, help="seconds of a first call")
    parser.add_argument(processes.ONE, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return processes.answer(args.one, measure)
    shape = {"hidden": args.hidden, "heads": args.heads}
    runs = [{"N": n, "backend": b, "limit": args.limit, **shape} for n in args.lengths for b in args.backends]
    about = harness.provenance("torch", "transformers", dtype=str(DTYPE).split(".")[1], batch=1, **shape)
    rows: list[Row] = []
    for run, row in processes.rows(__file__, runs, 1, args.limit):
        rows.append({"N": run["N"], "backend": run["backend"]} | row)
        harness.show(rows[-1], COLUMNS)
        if args.out is not None:
            harness.write_csv(args.out, about, rows)
            harness.write_page(args.out.with_suffix(".md"), "Seconds of a first call", about, rows, COLUMNS)


if __name__ == "__main__":
    main()

"""What the analysis costs for each node of a Dynamo graph, stage by stage, against the size of the graph.

    python benchmarks/analysis_time.py --out benchmarks/results/analysis_time_cpu.csv

Families of programs (programs.py), half of them without a match, at about 500 to 16,000 nodes, and a loop over 4,000
tokens. Seconds are those of the processor, so that a busy machine disturbs them less; ``wall_s`` are those of the
clock. ``capture`` is the graph run on fake tensors under the dispatch mode with an observer that does nothing; ``lift``
is what the normal forms take beyond that. Dynamo's own tracing is a column of its own and no part of the sum. Each row
has a process of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import processes
import torch
from harness import Row
from programs import FAMILIES, dynamo_graph

from lacompile import _compat, decision
from lacompile.options import Options
from lacompile.passes.capture import Capture, fake_mode_of
from lacompile.passes.capture.observer import Ignorant
from lacompile.passes.lift import analysis

TARGET = 1.5
"""Milliseconds for a node, capture included."""
STAGES = ("capture", "lift", "match", "validate", "rewrite", "rest")
SECONDS = ["dynamo_s", *(f"{s}_s" for s in STAGES), "wall_s"]
COLUMNS = ["family", "repetitions", "nodes", "rewrites", *SECONDS, "ms_per_node"]
SIZES = (500, 2000, 8000, 16000)
LONGEST = {"family": "token loop", "size": 40000}
"""A loop over 4,000 tokens."""
LIMIT = 3000


@contextmanager
def timed(spent: dict[str, float], places: dict[str, tuple[Any, str]]) -> Iterator[None]:
    """The processor's seconds inside functions, by stage: (module, name) of each."""

    def around(stage: str, f: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return f(*args, **kwargs)
            finally:
                spent[stage] = spent.get(stage, 0.0) + time.process_time() - start

        return call

    patches = [mock.patch.object(m, n, around(s, getattr(m, n))) for s, (m, n) in places.items()]
    for p in patches:
        p.start()
    try:
        yield
    finally:
        for p in patches:
            p.stop()


def analysed(gm: Any, example_inputs: Any) -> Row:
    """Nodes, rewrites, and the processor's seconds of each stage."""
    spent: dict[str, float] = {}
    places = {
        "analyse": (decision, "analyse"), "match": (analysis, "search"),
        "validate": (decision, "validate"), "rewrite": (decision, "rewrite"),
    }  # fmt: skip
    with timed(spent, places):
        start, clock = time.process_time(), time.perf_counter()
        made = decision.decide(gm, example_inputs, Options())
        total, wall = time.process_time() - start, time.perf_counter() - clock
    start = time.process_time()
    with _compat.suppressed_guards(fake_mode_of(gm)), decision.no_collection():
        Capture(gm, Ignorant()).run(example_inputs)
    capture = time.process_time() - start
    stages = {s: spent.get(s, 0.0) for s in ("match", "validate", "rewrite")}
    stages |= {"capture": capture, "lift": spent["analyse"] - stages["match"] - capture}
    stages["rest"] = total - sum(stages.values())
    nodes = len(gm.graph.nodes)
    row: Row = {"nodes": nodes, "rewrites": len(made.report.rewrites), "total_s": round(total, 4)}
    row |= {f"{s}_s": round(stages[s], 4) for s in STAGES}
    return row | {"wall_s": round(wall, 4), "ms_per_node": round(1e3 * total / nodes, 4)}


def warm_up() -> None:
    """What the first graph of a process pays once: imports, and the tables of PyTorch's dispatcher."""
    for name in ("token loop", "perceptron"):
        dynamo_graph(FAMILIES[name].of_nodes(30)[1], analysed)


def measure(run: Row) -> Row:
    torch.set_num_threads(1)
    warm_up()
    repetitions, program = FAMILIES[run["family"]].of_nodes(run["size"])
    found: Row = {}
    start = time.process_time()

    def then(gm: Any, example_inputs: Any) -> None:
        found["dynamo_s"] = round(time.process_time() - start, 4)
        found.update(analysed(gm, example_inputs))

    dynamo_graph(program, then)
    return {"repetitions": repetitions, **found}


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="nodes, about")
    parser.add_argument("--processes", type=int, default=1, help="rows that are measured at once")
    parser.add_argument("--out", type=Path, help="a CSV file; a page with the same name is written beside it")
    parser.add_argument(processes.ONE, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        processes.answer(args.one, measure)
        return
    runs = [{"family": f, "size": n} for n in args.sizes for f in args.families]
    if args.sizes == list(SIZES) and LONGEST["family"] in args.families:
        runs.append(LONGEST)
    about = harness.provenance("torch", seconds="of the processor, not of the clock", target_ms=TARGET)
    rows: list[Row] = []
    for run, row in processes.rows(__file__, runs, args.processes, LIMIT):
        rows.append(run | row)
        harness.show(rows[-1], [*COLUMNS, "failed"])
        rows.sort(key=lambda r: (list(FAMILIES).index(r["family"]), r["size"]))
        if args.out is not None:  # as it goes, so that a run that is cut off has its say
            harness.write_csv(args.out, about, rows)
            harness.write_page(args.out.with_suffix(".md"), "Time of the analysis", about, rows, COLUMNS)
    worst = max((r["ms_per_node"] for r in rows if "ms_per_node" in r), default=0.0)
    print(f"the most for a node is {worst:.2f} ms; the target is {TARGET} ms")
    if any("failed" in r for r in rows):
        sys.exit("some rows have failed")


if __name__ == "__main__":
    main()

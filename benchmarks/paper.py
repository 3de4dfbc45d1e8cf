"""The claim of Lightning Attention-2 as a measurement: time and memory for a token, against the length of the sequence.

    python benchmarks/paper.py --out benchmarks/results/paper_h200.csv

One sequence of 1 K to 1 M tokens in bf16, forward alone and forward with backward. A linear attention should take the
same for each token at any length (arXiv 2401.04658, figure 1); softmax attention takes more the longer the sequence
is. Memory is the peak beyond what the inputs take. A call is a replay of a CUDA graph, since the host would be what is
measured on short sequences. A method stops where one call takes longer than --longest seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import harness
import peers
import torch
from cases import Case, Inputs, reason, steps, warm
from harness import Row
from peers import Peer

LENGTHS = [2**n for n in range(10, 21)]
COLUMNS = ["implementation", "pass", "N", "p50_ms", "ns_per_token", "bytes_per_token", "failed"]


def rows_of(
    case: Case, compared: list[Peer], stopped: set[tuple[str, str]], seconds: float, longest: float
) -> list[Row]:
    """One row for each implementation and pass that has not stopped; adds to ``stopped`` those that do here."""
    rows: list[Row] = []
    x = Inputs.of(case)
    for peer in compared:
        for name, call in steps(peer, x).items():
            if (peer.name, name) in stopped:
                continue
            row: Row = {"implementation": peer.name, "pass": name, **case.columns()}
            try:
                row["bytes_per_token"] = round(harness.extra_bytes(call) / case.length, 1)
                found = harness.times(harness.graphed(call), seconds)
                row |= found.columns() | {"ns_per_token": round(1e6 * found.p50 / case.length, 3), "calls": found.calls}
                # The next length is twice this one; softmax attention takes four times as long for it.
                if 1e-3 * found.p50 > longest / 4:
                    stopped.add((peer.name, name))
            except torch.OutOfMemoryError:
                row["failed"] = "out of memory"
                stopped.add((peer.name, name))
            except Exception as error:
                row["failed"] = reason(error, peer)
            rows.append(row)
            harness.show(row, COLUMNS)
        harness.release()
    return rows


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a CSV file")
    parser.add_argument("--only", nargs="+", help="these implementations, by their names")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=0.2, help="for each figure")
    parser.add_argument("--longest", type=float, default=4.0, help="seconds of one call")
    parser.add_argument("--untuned-peers", action="store_true", help="peers try one configuration: a quick look")
    parser.add_argument("--dry", action="store_true", help="tiny problems, on any device")
    args = parser.parse_args()
    lengths, heads, dim = ([64, 128], 2, 16) if args.dry else (args.lengths, args.heads, args.dim)
    compared = [p for p in (peers.OURS, peers.FLA, peers.SOFTMAX) if p in peers.installed()]
    compared = [p for p in compared if args.only is None or p.name in args.only]
    cases = [Case(1, heads, n, dim) for n in lengths]
    if harness.GPU:
        peers.share_autotuning(shards=1000 if args.untuned_peers else 1)
        warm(cases, compared)
    with harness.turn(alone=True):
        about = harness.provenance(*harness.PACKAGES, dtype="bfloat16", batch=1, heads=heads, head_dim=dim)
        print(about, flush=True)
        rows: list[Row] = []
        stopped: set[tuple[str, str]] = set()
        for case in cases:
            rows += rows_of(case, compared, stopped, args.seconds, args.longest)
            if args.out is not None:
                harness.write_csv(args.out, about, rows)
                harness.write_page(args.out.with_suffix(".md"), "Against length", about, rows, COLUMNS)


if __name__ == "__main__":
    main()

"""The kernels against every public one: time, share of the memory floor, memory, and error against fp64.

    python benchmarks/kernels.py --out benchmarks/results/kernels_h200.csv

Every implementation is judged against fp64 before it is timed; one that is too far off is not timed. The floor is one
read and one write of every tensor at the speed of a large copy, measured in the same run: 8 D bytes for a token of a
head forward and 14 D backward in bf16, and the state read and written in decoding. Times are those of the device, in
replays of a CUDA graph with a cold cache; call_ms is that of a plain call from Python, which waits for the host where
the kernels are shorter than what launches them. Memory is the peak beyond what the inputs
take, in units of q. In a training step q, k and v need gradients, and the decay where it is given per token.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import harness
import peers
import processes
import torch
from cases import DTYPE, Case, Inputs, reason, steps, warm
from harness import DEVICE, Row
from peers import Peer
from torch import Tensor

from lacompile.kernels import reference
from lacompile.testing import budget, relative_error, state

BYTES_FORWARD, BYTES_BACKWARD = 8, 14  # of a token of a head, times D


CASES = [
    Case(8, 16, 4096, 128),
    Case(2, 64, 8192, 128),
    Case(1, 16, 32768, 128),
    Case(1, 16, 131072, 128),
    Case(4, 32, 4096, 64),
    Case(1, 64, 2048, 128),
    Case(8, 16, 4096, 128, per_token=True),
]
STEPS = [
    Case(64, 64, 1, 128),
    Case(64, 64, 16, 128),
    Case(1, 64, 1, 128),
]
DRY = [Case(1, 2, 200, 16), Case(1, 2, 200, 16, per_token=True)]
DRY_STEPS = [Case(2, 2, 1, 16)]
COLUMNS = [
    "B",
    "H",
    "N",
    "D",
    "decay",
    "pass",
    "implementation",
    "p50_ms",
    "call_ms",
    "share",
    "memory",
    "error",
    "failed",
]


def judged(name: str, got: object, exact: tuple[Tensor, list[Tensor]]) -> float:
    """The largest relative error of a pass.

    Raises:
        AssertionError: it is beyond the budget of the dtype.
    """
    if name == "forward":
        assert isinstance(got, Tensor)
        error, allowed = relative_error(got, exact[0]), budget(DTYPE).output
    else:
        error = max(relative_error(g, w) for g, w in zip(got, exact[1], strict=True))  # type: ignore[call-overload]
        allowed = budget(DTYPE).gradient
    assert error <= allowed, f"relative error {error:.1e} against fp64, allowed {allowed:.1e}"
    return error


def measured(call: Callable[[], object], floor_seconds: float, seconds: float) -> Row:
    """Times of the device and of a plain call, and the share of the floor."""
    plain = harness.times(call, seconds)
    found = harness.times(harness.graphed(call), seconds)
    share = round(1e3 * floor_seconds / found.p50, 4)
    return found.columns() | {"call_ms": plain.columns()["p50_ms"], "share": share, "calls": found.calls}


def rows_of(case: Case, compared: Sequence[Peer], bandwidth: float, seconds: float) -> list[Row]:
    """One row for each implementation and pass."""
    x = Inputs.of(case)
    exact = x.exact()
    rows: list[Row] = []
    for peer in compared:
        if case.per_token and not peer.same_function:
            continue
        own = Inputs.of(case, heads_first=True) if peer.heads_first else x
        for name, call in steps(peer, own).items():
            row: Row = case.columns() | {"pass": name, "implementation": peer.name}
            size = BYTES_FORWARD + (0 if name == "forward" else BYTES_BACKWARD)
            try:
                got = call()
                if peer.same_function:
                    row["error"] = float(f"{judged(name, got, exact):.3g}")
                del got
                row["memory"] = round(harness.extra_bytes(call) / (x.q.numel() * x.q.element_size()), 2)
                row |= measured(call, size * case.token_heads * case.dim / bandwidth, seconds)
                row["ns_per_token_head"] = round(1e6 * row["p50_ms"] / case.token_heads, 4)
            except Exception as error:  # the failure of one peer must not lose the other rows
                row["failed"] = reason(error, peer)
            rows.append(row)
            harness.show(row, COLUMNS)
        harness.release()
    return rows


def decode_rows(case: Case, compared: Sequence[Peer], bandwidth: float, seconds: float) -> list[Row]:
    """One row for each implementation that decodes; the floor is the state, read and written."""
    x = Inputs.of(case)
    begun = state(case.batch, case.heads, case.dim, device=DEVICE)
    args = (x.q, x.k, x.v, x.log_decay)
    want = reference.recurrence(*(t.double() for t in args), 1.0, begun.double())[0]
    rows: list[Row] = []
    for peer in compared:
        if peer.decode is None:
            continue
        row: Row = case.columns() | {"pass": "decode", "implementation": peer.name}
        carried = begun.clone()

        def call(decode=peer.decode, carried: Tensor = carried) -> Tensor:  # type: ignore[no-untyped-def]
            with torch.no_grad():
                return decode(*args, carried)

        try:
            row["error"] = float(f"{judged('forward', call(), (want, [])):.3g}")
            row |= measured(call, 2 * begun.numel() * begun.element_size() / bandwidth, seconds)
        except Exception as error:
            row["failed"] = reason(error, peer)
        rows.append(row)
        harness.show(row, COLUMNS)
    return rows


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a CSV file; a page with the same name is written beside it")
    parser.add_argument("--cases", type=int, nargs="*", help="only these, by their number")
    parser.add_argument("--seconds", type=float, default=0.25, help="for each figure")
    parser.add_argument("--only", nargs="+", help="these implementations, by their names")
    parser.add_argument("--processes", type=int, default=0, help="compile the peers in so many first")
    parser.add_argument("--untuned-peers", action="store_true", help="peers try one configuration: a quick look")
    parser.add_argument("--dry", action="store_true", help="tiny problems, on any device")
    parser.add_argument(processes.SHARD, help=argparse.SUPPRESS)
    args = parser.parse_args()
    begun = time.perf_counter()
    compared = [p for p in peers.installed() if args.only is None or p.name in args.only]
    chosen, decoded = (DRY, DRY_STEPS) if args.dry else (CASES, STEPS)
    cases = chosen if args.cases is None else [chosen[n] for n in args.cases]
    if args.shard is not None:
        shard, shards = map(int, args.shard.split("/"))
        peers.share_autotuning(shard, shards)
        return warm(cases, [p for p in compared if p is not peers.OURS], shard, shards)
    if args.processes:
        processes.compile_side_by_side(__file__, args.processes, FLA_CACHE_RESULTS="0")
    if harness.GPU:
        peers.share_autotuning(shards=1000 if args.untuned_peers else 1)
        warm(cases, compared)
        print(f"warm after {time.perf_counter() - begun:.0f} s", flush=True)
    with harness.turn(alone=True):
        bandwidth = harness.copy_bandwidth()
        about = harness.provenance(
            *harness.PACKAGES, dtype=str(DTYPE).split(".")[1], copy_bandwidth=f"{bandwidth / 1e12:.3f} TB/s"
        )
        print(about, flush=True)
        rows: list[Row] = []
        runs = [(rows_of, case) for case in cases] + [(decode_rows, case) for case in decoded]
        for run, case in runs:
            rows += run(case, compared, bandwidth, args.seconds)
            if args.out is not None:
                harness.write_csv(args.out, about, rows)
                harness.write_page(args.out.with_suffix(".md"), "Kernels", about, rows, COLUMNS)
            print(f"{time.perf_counter() - begun:.0f} s", flush=True)
    if any("failed" in row for row in rows if row["implementation"] == peers.OURS.name):
        sys.exit("a kernel of ours failed")


if __name__ == "__main__":
    main()

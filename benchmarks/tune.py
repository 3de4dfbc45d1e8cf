"""The tiles that are shipped for this GPU: every candidate of every kind of kernel, measured.

    python benchmarks/tune.py --out lacompile/kernels/tuning/configs --processes 12

Writes one file, named after the GPU. What wins is the geometric mean over four problems (lightning2/trial.py). With
--processes the candidates are compiled side by side first, which takes most of the time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import processes
import torch

from lacompile.kernels.lightning2.compiler import identity
from lacompile.kernels.lightning2.trial import milliseconds
from lacompile.kernels.tuning import table
from lacompile.kernels.tuning.search import search
from lacompile.kernels.tuning.space import Config, Kind, candidates

SIZES = (64, 128, 256)
USES = (("forward", False), ("backward", False), ("backward", True))
DTYPE = torch.bfloat16


def choices(sizes: Sequence[int], descriptors: bool) -> Iterator[tuple[Kind, list[Config]]]:
    """Every kind on square heads, with what there is to choose from."""
    for size in sizes:
        for use, gradient in USES:
            for per_token in (False, True):
                found = candidates(size, size, DTYPE, descriptors, gradient)
                yield Kind.of(use, size, size, DTYPE, per_token, gradient, descriptors), found


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=table.SHIPPED, help="a folder")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="heads; what the file has of others stays")
    parser.add_argument("--processes", type=int, default=0, help="compile in so many first")
    parser.add_argument(processes.SHARD, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda", 0)
    every = list(choices(args.sizes, torch.cuda.get_device_capability(device)[0] == 9))
    if args.shard is not None:
        shard, shards = map(int, args.shard.split("/"))
        for kind, n in [(kind, n) for kind, found in every for n in range(len(found))][shard::shards]:
            milliseconds(kind, DTYPE, device, n)
        return
    if args.processes:
        processes.compile_side_by_side(__file__, args.processes, "--sizes", *map(str, args.sizes))
    about, command = identity(device), "python " + " ".join(sys.argv)
    path = args.out / table.shipped_path(about.gpu).name
    winners: table.Table = table.read(path) if path.exists() else {}
    for kind, found in every:
        best = search(len(found), lambda n, kind=kind: milliseconds(kind, DTYPE, device, n), float("inf"))
        taken = [ms and round(ms, 4) for ms in best.milliseconds]
        winners[str(kind)] = table.Winner.of(found[best.place], taken, True)
        print(f"{kind}: {best.place} of {taken}", flush=True)
        table.write(path, about, winners, date=str(date.today()), command=command)


if __name__ == "__main__":
    main()

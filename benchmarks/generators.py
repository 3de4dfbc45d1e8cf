"""Thousands of programs nobody wrote: how many are rewritten, and whether any is rewritten wrongly.

    python benchmarks/generators.py --equivalent 2000 --twins 5000 --workers 16 --out benchmarks/results/generators

Every program comes from a seed (``tests/properties``). Validation is off: what is tested is the proof. An equivalent
program computes one decayed attention and must be rewritten. A twin differs from such a program by one change; it must
be refused, or what is put in its place must have the twin's own values and gradients: to 1e-6 where both are computed
in fp64 (else it is wrong), and within the error budget in fp32 (else it is counted under rounding).

The results are written as the run goes, so that one that is cut off has its say.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

TURNS = 250
TITLES = {"equivalents": "Equivalent programs", "twins": "Near twins"}


def judged(task: tuple[str, int], turned: bool) -> list[Any]:
    """The findings of one seed."""
    from tests.properties import survey

    which, seed = task
    try:
        return list(getattr(survey, which)([seed], turned=turned))
    except Exception as error:
        return [survey.Finding(seed, which, "failed", f"{type(error).__name__}: {error}", "")]


def prepare() -> None:
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def survey_all(
    wanted: Sequence[tuple[str, range]], workers: int, turned: bool, note: Callable[[dict[str, list[Any]]], None]
) -> None:
    """Judges the seeds of every kind in turns, and calls ``note`` with all findings after each turn."""
    found: dict[str, list[Any]] = {which: [] for which, _ in wanted}
    with multiprocessing.get_context("spawn").Pool(workers, prepare, maxtasksperchild=100) as pool:
        for turn in range(TURNS):
            tasks = [(which, s) for which, seeds in wanted for s in _share(seeds, turn)]
            for (which, _), findings in zip(tasks, pool.imap(partial(judged, turned=turned), tasks), strict=True):
                found[which] += findings
            note({which: list(fs) for which, fs in found.items()})


def _share(seeds: range, turn: int) -> range:
    return seeds[len(seeds) * turn // TURNS : len(seeds) * (turn + 1) // TURNS]


def table(found: Sequence[Any]) -> list[str]:
    outcomes = ("rewritten", "refused", "wrong", "rounding", "failed")
    lines = ["| formulation | programs | " + " | ".join(outcomes) + " |", "|---|" + "---|" * 6]
    for kind in [*sorted({f.kind for f in found}), "all"]:
        count = Counter(f.outcome for f in found if kind in (f.kind, "all"))
        lines.append(f"| {kind} | {sum(count.values())} | " + " | ".join(str(count[o]) for o in outcomes) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--equivalent", type=int, default=2000)
    parser.add_argument("--twins", type=int, default=5000)
    parser.add_argument("--first", type=int, default=10_000, help="the first seed")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--turned", action="store_true", help="the same programs, reading the sequence from its end")
    parser.add_argument("--date", default="")
    parser.add_argument("--commit", default="", help="what was judged, for the record")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix: .md and .json are written")
    args = parser.parse_args()
    wanted = [
        (which, range(args.first, args.first + count))
        for which, count in (("equivalents", args.equivalent), ("twins", args.twins))
    ]
    start = time.perf_counter()

    def note(found: dict[str, list[Any]]) -> None:
        write(args, wanted, found, time.perf_counter() - start)

    survey_all(wanted, args.workers, args.turned, note)
    print(args.out.with_suffix(".md").read_text())


def write(
    args: argparse.Namespace, wanted: Sequence[tuple[str, range]], found: dict[str, list[Any]], seconds: float
) -> None:
    """The results so far."""
    import torch

    sections, record = [], {}
    for which, seeds in wanted:
        judged_seeds = {f.seed for f in found[which]}
        bad = ("wrong", "rounding", "failed", *(["refused"] if which == "equivalents" else []))
        unexpected = [f for f in found[which] if f.outcome in bad]
        last = max(judged_seeds, default=seeds.start)
        sections += [f"## {TITLES[which]}", "", f"Seeds {seeds.start} to {last}.", "", *table(found[which]), ""]
        record[which] = {
            "seeds": [seeds.start, last],
            "outcomes": Counter(f.outcome for f in found[which]),
            "unexpected": [
                {"seed": f.seed, "kind": f.kind, "outcome": f.outcome, "detail": f.detail.replace(f"{ROOT}/", "")}
                for f in unexpected
            ],
        }
        if unexpected:
            sections += ["Unexpected: " + ", ".join(f"{f.seed} ({f.outcome})" for f in unexpected) + ".", ""]
    made = (
        f"torch {torch.__version__}, Python {platform.python_version()}, {args.workers} processes, {seconds:.0f} s, "
        f"{args.date}, commit {args.commit}"
    )
    head = ["# Programs from the generators", "", made, ""]
    head += ["    python benchmarks/generators.py " + " ".join(sys.argv[1:]), ""]
    args.out.with_suffix(".md").write_text("\n".join([*head, __doc__.split("\n\n", 2)[2], *sections]))
    args.out.with_suffix(".json").write_text(json.dumps({"environment": made, **record}, indent=1) + "\n")


if __name__ == "__main__":
    main()

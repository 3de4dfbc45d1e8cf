"""Thousands of programs nobody wrote: how many are rewritten, and whether any is rewritten wrongly.

    python benchmarks/generators.py --equivalent 2000 --twins 5000 --workers 16 --out benchmarks/results/generators

Every program comes from a seed (``tests/properties``). Validation is off: what is tested is the proof. An equivalent
program computes one decayed attention and must be rewritten. A twin differs from such a program by one change; it must
be refused, or what is put in its place must have the twin's own values and gradients.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")


def judged(task: tuple[str, int]) -> list[Any]:
    """The findings of one seed."""
    from tests.properties import survey

    which, seed = task
    try:
        return list(getattr(survey, which)([seed]))
    except Exception as error:
        return [survey.Finding(seed, which, "failed", f"{type(error).__name__}: {error}", "")]


def prepare() -> None:
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def survey_all(which: str, seeds: Sequence[int], workers: int) -> tuple[list[Any], float]:
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(workers, prepare, maxtasksperchild=100) as pool:
        found = [f for many in pool.imap_unordered(judged, [(which, s) for s in seeds], chunksize=4) for f in many]
    return sorted(found, key=lambda f: f.seed), time.perf_counter() - start


def table(found: Sequence[Any]) -> list[str]:
    outcomes = ("rewritten", "refused", "wrong", "failed")
    lines = ["| formulation | programs | " + " | ".join(outcomes) + " |", "|---|" + "---|" * 5]
    for kind in [*sorted({f.kind for f in found}), "all"]:
        count = Counter(f.outcome for f in found if kind in (f.kind, "all"))
        lines.append(f"| {kind} | {sum(count.values())} | " + " | ".join(str(count[o]) for o in outcomes) + " |")
    return lines


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--equivalent", type=int, default=2000)
    parser.add_argument("--twins", type=int, default=5000)
    parser.add_argument("--first", type=int, default=10_000, help="the first seed")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--date", default="")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix: .md and .json are written")
    args = parser.parse_args()
    sections, record = [], {}
    for which, count, title in (
        ("equivalents", args.equivalent, "Equivalent programs"),
        ("twins", args.twins, "Near twins"),
    ):
        seeds = range(args.first, args.first + count)
        found, seconds = survey_all(which, seeds, args.workers)
        sections += [f"## {title}", "", f"Seeds {seeds[0]} to {seeds[-1]}; {seconds:.0f} s.", "", *table(found), ""]
        unexpected = [
            f for f in found if f.outcome in ("wrong", "failed") or (which, f.outcome) == ("equivalents", "refused")
        ]
        record[which] = {
            "seeds": [seeds[0], seeds[-1]],
            "outcomes": Counter(f.outcome for f in found),
            "unexpected": [
                {"seed": f.seed, "kind": f.kind, "outcome": f.outcome, "detail": f.detail} for f in unexpected
            ],
        }
        if which == "equivalents" and unexpected:
            sections += [
                "Not rewritten, or wrong: " + ", ".join(f"{f.seed} ({f.outcome})" for f in unexpected) + ".",
                "",
            ]
    made = f"torch {torch.__version__}, Python {platform.python_version()}, {args.workers} processes, {args.date}"
    head = [
        "# Programs from the generators",
        "",
        made,
        "",
        "    python benchmarks/generators.py " + " ".join(sys.argv[1:]),
        "",
    ]
    args.out.with_suffix(".md").write_text("\n".join([*head, __doc__.split("\n\n", 2)[2], *sections]))
    args.out.with_suffix(".json").write_text(json.dumps({"environment": made, **record}, indent=1) + "\n")
    print("\n".join(sections))


if __name__ == "__main__":
    main()

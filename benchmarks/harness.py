"""What the benchmarks share: where a figure comes from, timing, memory, taking turns on a GPU, and tables on disk."""

from __future__ import annotations

import contextlib
import csv
import datetime
import fcntl
import gc
import importlib.metadata
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PACKAGES = ("torch", "triton", "transformers", "fla-core", "lightning-attn")
FLUSHED = 256 * 2**20
"""Bytes that are overwritten before each timed call: several times the largest L2 cache."""


# ------------------------------------------------------------------------------------------------------- provenance


def provenance(*packages: str, **more: object) -> dict[str, str]:
    """What a result needs to be believed: device, versions of ``packages``, date, command, and what else is said."""
    found = {"gpu" if GPU else "device": torch.cuda.get_device_name() if GPU else platform.processor() or "cpu"}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = torch.__version__ if name == "torch" else importlib.metadata.version(name)
    found["python"] = platform.python_version()
    found["date"] = datetime.date.today().isoformat()
    found["command"] = "python " + " ".join(sys.argv)
    return found | {k: str(v) for k, v in more.items()}


def write_csv(path: Path, about: dict[str, str], rows: Sequence[Row]) -> None:
    """The rows, under one comment line for each entry of ``about``; columns in the order in which they first occur."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        file.writelines(f"# {k}: {v}\n" for k, v in about.items())
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """What :func:`write_csv` wrote, as text."""
    lines = path.read_text().splitlines(keepends=True)
    head = [line for line in lines if line.startswith("# ")]
    about = dict(line[2:].rstrip().split(": ", 1) for line in head)
    return about, list(csv.DictReader(lines[len(head) :]))


def markdown(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A table; numbers with four significant digits, empty where a row has no such column."""

    def cell(x: object) -> str:
        return f"{x:.4g}" if isinstance(x, float) else str(x)

    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(c, "")) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def show(row: Row, columns: Sequence[str]) -> None:
    """One line on the screen."""
    print(" ".join(str(row.get(c, "-")) for c in columns), flush=True)


def write_page(path: Path, title: str, about: dict[str, str], rows: Sequence[Row], columns: Sequence[str]) -> None:
    """A page with what the result rests on and a table of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    said = "\n".join(f"- {k}: {v}" for k, v in about.items())
    path.write_text(f"# {title}\n\n{said}\n\n{markdown(rows, columns)}\n")


# ------------------------------------------------------------------------------------------------- time and memory


@dataclass(frozen=True)
class Times:
    """Quantiles of the duration of one call in milliseconds, over ``calls`` calls."""

    p20: float
    p50: float
    p80: float
    calls: int

    def columns(self) -> Row:
        return {"p20_ms": _digits(self.p20), "p50_ms": _digits(self.p50), "p80_ms": _digits(self.p80)}


def _digits(x: float) -> float:
    return float(f"{x:.5g}")


def synchronise() -> None:
    if GPU:
        torch.cuda.synchronize()


def seconds(f: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, all of its work on the device included."""
    synchronise()
    start = time.perf_counter()
    f()
    synchronise()
    return time.perf_counter() - start


def times(f: Callable[[], object], budget: float = 0.25) -> Times:
    """Single calls, timed by events on a GPU with a cold L2 cache, for about ``budget`` seconds after a warm-up."""
    f()
    once = seconds(f)
    count = max(1 if once > budget else 5, min(200, int(budget / max(once, 1e-6))))
    for _ in range(min(count, 3) if once < budget else 0):
        f()
    return quantiles(_timed_on_gpu(f, count) if GPU else [1e3 * seconds(f) for _ in range(count)])


def _timed_on_gpu(f: Callable[[], object], count: int) -> list[float]:
    flushed = torch.empty(FLUSHED, dtype=torch.int8, device=DEVICE)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for before, after in pairs:
        flushed.zero_()
        before.record()
        f()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairs]


def quantiles(milliseconds: Sequence[float]) -> Times:
    """p20, p50 and p80 of single durations."""
    if len(milliseconds) == 1:
        return Times(*milliseconds * 3, 1)
    cuts = statistics.quantiles(milliseconds, n=10, method="inclusive")
    return Times(cuts[1], cuts[4], cuts[7], len(milliseconds))


def graphed(f: Callable[[], object]) -> Callable[[], object]:
    """``f`` as one replay of a CUDA graph: its work on the device without the host's share. ``f`` itself on a CPU."""
    if not GPU:
        return f
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            f()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = f()

    def replay(kept: object = kept) -> None:
        graph.replay()

    return replay


def extra_bytes(f: Callable[[], object]) -> int:
    """How much memory a call needs at its peak beyond what is there before it; 0 on a CPU.

    Not the first one: kernels are compiled, tried and checked in that.
    """
    if not GPU:
        return 0
    f()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = f()
    peak = torch.cuda.max_memory_allocated()
    del kept
    return peak - before


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy on the device: the ceiling of the shares."""
    size = 2**31 if GPU else 2**24
    source, target = (torch.empty(size, dtype=torch.int8, device=DEVICE) for _ in range(2))
    return 2 * size / (1e-3 * times(lambda: target.copy_(source), 0.2).p50)


def release() -> None:
    """Gives memory that nothing uses back to the device."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------------------- taking turns


@contextlib.contextmanager
def turn(*, alone: bool) -> Iterator[None]:
    """Processes compile side by side and are timed one at a time: with ``alone``, while no other is in its turn."""
    with open(Path(tempfile.gettempdir()) / "lacompile-benchmark-turn", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield

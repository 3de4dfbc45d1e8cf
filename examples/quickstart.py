"""Two layers that know nothing of this package, three ways: eager, Inductor, and ``backend="lightning"``.

One is the Lightning-Attention layer of the public MiniMax model, as it stands in transformers. The other is a plain
retention layer, written as a masked square. For each the table shows times, speed-ups, the cost of the first call and
the difference to a run in fp64; the report of the rewrite follows. It runs on a GPU where there is one, else on the
CPU, in less than three minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

# ------------------------------------------------------------------------------------------------------- the two layers


def minimax(hidden: int, heads: int) -> nn.Module:
    """The attention of layer 1 of 4 of a MiniMax model, with nothing changed."""
    config = MiniMaxConfig(
        hidden_size=hidden, num_attention_heads=heads, head_dim=hidden // heads, num_hidden_layers=4,
        layer_types=["linear_attention"] * 4,
    )  # fmt: skip
    return MiniMaxLightningAttention(config, 1)


class Retention(nn.Module):
    """Retention as a masked square: each head forgets at a rate of its own (arXiv 2307.08621, equation 5)."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads, self.head_dim = heads, hidden // heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.gate = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, hidden)

    def decay(self, length: int, device: torch.device) -> Tensor:
        gamma = 1 - 2.0 ** (-5 - torch.arange(self.heads, device=device))
        i = torch.arange(length, device=device)
        distance = i[:, None] - i[None, :]
        return torch.where(distance >= 0, gamma[:, None, None] ** distance.clamp(min=0), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        weights = q @ k.transpose(-1, -2) * self.head_dim**-0.5
        weights = weights * self.decay(x.shape[1], x.device).to(x.dtype)
        y = F.rms_norm(weights @ v, (self.head_dim,))
        return self.out(F.silu(self.gate(x)) * y.transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class Case:
    """A layer, how it is called, and on how many tokens."""

    title: str
    build: Callable[[int, int], nn.Module]
    call: Callable[[Any, Tensor], Tensor]
    length: dict[str, int]


CASES = {
    "retention": Case(
        "plain retention layer, a masked square", Retention, lambda f, x: f(x), {"cpu": 1024, "cuda": 8192}
    ),
    "minimax": Case(
        "MiniMaxLightningAttention of transformers, untouched",
        minimax,
        lambda f, x: f(x, None, None)[0],
        {"cpu": 4096, "cuda": 8192},
    ),
}
SIZES = {"cpu": (512, 8, torch.float32), "cuda": (2048, 16, torch.bfloat16)}
"""Hidden size, heads and dtype."""

COLUMNS = ("eager", "inductor", "lightning")
"""Eager mode, and two backends of torch.compile."""

# ------------------------------------------------------------------------------------------------------------ measuring


@dataclass
class Stage:
    """Forward passes or training steps of one layer, by column; seconds, and a tensor to compare."""

    first: dict[str, float] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    results: dict[str, Tensor] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def median(self, column: str) -> float | None:
        return statistics.median(self.times[column]) if self.times.get(column) else None


class Bench:
    """One layer on one input, all columns."""

    def __init__(self, case: Case, device: str, length: int, deadline: float):
        self.case, self.device, self.length, self.deadline = case, device, length, deadline
        self.hidden, self.heads, self.dtype = SIZES[device]
        torch.manual_seed(0)
        self.layer = case.build(self.hidden, self.heads).to(device, self.dtype).eval()
        self.x = torch.randn(1, length, self.hidden, device=device, dtype=self.dtype)
        self.weight = torch.randn_like(self.x)
        self.report: Any = None

    def forward(self, f: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.case.call(f, x)

    def step(self, f: Any, x: Tensor) -> Tensor:
        """Forward and backward; the gradient of the input."""
        x = x.detach().requires_grad_()
        (self.case.call(f, x) * self.weight.to(x.dtype)).sum().backward()
        assert x.grad is not None
        return x.grad

    def timed(self, run: Callable[..., Tensor], f: Any) -> tuple[float, Tensor]:
        self.layer.zero_grad(set_to_none=True)
        self.wait()
        start = time.perf_counter()
        result = run(f, self.x)
        self.wait()
        return time.perf_counter() - start, result

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def measure(self, run: Callable[..., Tensor], what: str) -> Stage:
        """First calls, then rounds in which every column has its turn, so that a busy machine troubles all alike."""
        from lacompile import last_report

        stage, fs = Stage(), {}
        for column in COLUMNS:
            progress(f"{what}, {column}: first call")
            f = self.layer if column == "eager" else torch.compile(self.layer, backend=column, dynamic=False)
            try:
                stage.first[column], stage.results[column] = self.timed(run, f)
            except Exception as error:
                stage.failed[column] = reason(error)
                continue
            if column == "lightning":
                self.report = last_report()
            stage.times[column], fs[column] = [], f
        progress(f"{what}: rounds")
        start, rounds = time.perf_counter(), 0
        while rounds < 3 or (rounds < 25 and (spent := time.perf_counter() - start) < 12 and (rounds < 7 or spent < 3)):
            for column, f in fs.items():
                stage.times[column].append(self.timed(run, f)[0])
            rounds += 1
        return stage

    def train(self, forward: Stage) -> Stage | None:
        """Training steps; None where their compilation would, by the forward pass's, take the run past its limit."""
        compiled = sum(forward.first.get(c, 0) for c in COLUMNS[1:])
        if self.device == "cpu" and time.monotonic() + 2.6 * compiled + 20 > self.deadline:
            return None
        return self.measure(self.step, "training step")

    def exact(self) -> tuple[Tensor | None, Tensor | None]:
        """Output and gradient of the input, in fp64 from the same rounded weights; None where memory does not do."""
        from lacompile.testing.fp64 import in_fp64

        progress("fp64 run")
        layer = copy.deepcopy(self.layer).double()
        try:
            with in_fp64():
                x = self.x.double().requires_grad_()
                out = self.case.call(layer, x)
                (out * self.weight.double()).sum().backward()
            return out.detach(), x.grad
        except torch.OutOfMemoryError:
            return None, None


def reason(error: Exception) -> str:
    """The first line of what a compiler had to say."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    while getattr(error, "inner_exception", None) is not None:
        error = error.inner_exception  # type: ignore[attr-defined]
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def progress(text: str) -> None:
    print(f"  ... {text}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------- printing


def rows(stage: Stage, exact: Tensor | None, what: str, compared: str) -> Iterator[list[str]]:
    """The lines of the table for one stage."""
    yield [what] + ["failed" if c in stage.failed else "" for c in COLUMNS]
    yield ["  first call, s"] + [show(stage.first.get(c), "{:.2f}") for c in COLUMNS]
    yield ["  median, ms"] + [show(stage.median(c), "{:.1f}", 1e3) for c in COLUMNS]
    for other in COLUMNS[:2]:
        base = stage.median(other)
        ratios = [base / t if base and (t := stage.median(c)) else None for c in COLUMNS]
        yield [f"  speed-up over {other}"] + [show(r, "{:.2f}x") for r in ratios]
    differences = [relative(stage.results.get(c), exact) for c in COLUMNS]
    yield [f"  {compared} to fp64"] + [show(d, "{:.1e}") for d in differences]


def show(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else form.format(value * factor)


def relative(got: Tensor | None, want: Tensor | None) -> float | None:
    """``||got - want|| / ||want||``."""
    return None if got is None or want is None else float((got.double() - want).norm() / want.norm())


def print_table(lines: list[list[str]]) -> None:
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    for line in lines:
        cells = [line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def run(bench: Bench) -> None:
    """Measures one layer and prints its table and its report."""
    hidden, heads, dtype = bench.hidden, bench.heads, str(bench.dtype).removeprefix("torch.")
    print(f"\n{bench.case.title}")
    print(f"batch 1, N = {bench.length}, hidden {hidden}, {heads} heads x {hidden // heads}, {dtype}, {bench.device}\n")
    forward = bench.measure(bench.forward, "forward")
    report = bench.report
    training = bench.train(forward)
    output, gradient = bench.exact()
    lines = [["", *COLUMNS]]
    if report is not None:
        lines.append(["graph nodes handed to Inductor", "-", str(report.nodes_before), str(report.nodes_after)])
    lines += rows(forward, output, "forward", "output")
    if training is not None:
        lines += rows(training, gradient, "training step", "input gradient")
    print_table(lines)
    if training is None:
        print("training step left out: compiling it would take this run past its limit (--seconds)")
    for stage, what in ((forward, "forward"), (training, "training step")):
        for column, why in (stage.failed if stage else {}).items():
            print(f"{column} failed at {what}: {why}")
    if report is not None:
        print(f"\nlacompile.last_report() after the forward pass:\n{report}")


# ----------------------------------------------------------------------------------------------------------------- main


def warm_up(device: str) -> None:
    """What the first compilation of a process costs once: the imports of Inductor, its precompiled header."""
    for backend in COLUMNS[1:]:
        progress(f"warming up {backend}")
        x = torch.ones(8, device=device, requires_grad=True)
        with contextlib.suppress(Exception):  # the tables will say what cannot be compiled
            torch.compile(lambda t: t.exp() + 1, backend=backend)(x).sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SIZES), help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--length", type=int, help="number of tokens; default: see the tables")
    parser.add_argument("--layer", choices=[*CASES, "all"], default="all", help="which layer; default: all")
    parser.add_argument(
        "--seconds", type=float, default=165.0,
        help="on a CPU, leave out training steps that would take the run past this; default: 165",
    )  # fmt: skip
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore")
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"PyTorch {torch.__version__} on {device} ({where}); times are medians, differences relative L2")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # an empty one: first calls are first calls
        warm_up(device)
        for case in CASES.values() if args.layer == "all" else [CASES[args.layer]]:
            run(Bench(case, device, args.length or case.length[device], deadline))


if __name__ == "__main__":
    main()

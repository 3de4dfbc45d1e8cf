"""Many programs judged, one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from .judge import Run, differ, judge, run
from .program import Program, write
from .twins import twin

Outcome = Literal["rewritten", "refused", "wrong", "rounding", "failed"]
SAME = 1e-6  # relative; a twin differs from its original by more, in an output or in a gradient
TRIES = 40
LARGEST = 1e30  # the gradients of a rewritten program pass fp32 on their way


@dataclass(frozen=True)
class Finding:
    """``refused`` also means another number of rewrites than is right, of an equivalent program; ``rounding`` one that
    computes the program's own values in fp64 and is over the error budget in fp32."""

    seed: int
    kind: str
    outcome: Outcome
    detail: str
    source: str

    def __str__(self) -> str:
        return f"seed {self.seed} ({self.kind}): {self.outcome}\n{self.detail}\n\n{self.source}"


def equivalents(seeds: Iterable[int], *, turned: bool = False) -> Iterator[Finding]:
    """The program of each seed, or the one that reads the sequence from its end.

    Raises:
        AssertionError: a program does not compute its fact; the generator is at fault.
    """
    for seed in seeds:
        program = replace(write(seed), turned=turned)
        exact = run(program.build(), program, exact=True)
        _is_the_fact(program, exact)
        yield _judged(seed, program, program.source, exact, program.rewrites)


def twins(seeds: Iterable[int], *, turned: bool = False) -> Iterator[Finding]:
    """A twin of the program of each seed: one change after which it runs, and computes something else."""
    for seed in seeds:
        program = replace(write(seed), turned=turned)
        exact = run(program.build(), program, exact=True)
        for attempt in range(TRIES):
            source = twin(program.source, TRIES * seed + attempt)
            changed = None if source is None else runs(program, source)
            if source is not None and changed is not None and differ(exact, changed, SAME):
                yield _judged(seed, program, source, changed, None)
                break


def runs(program: Program, source: str) -> Run | None:
    """What a change of a program computes in fp64; None if it is no program, or its numbers are too large."""
    try:
        with _poisoned():
            made = run(program.build(source), program, exact=True)
    except Exception:  # a change may break anything: shapes, names, dtypes
        return None
    return made if all(bool((x.abs() < LARGEST).all()) for x in made.all) else None


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Memory that is made without values holds NaN: a program that reads where it has not written computes nothing."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _is_the_fact(program: Program, exact: Run) -> None:
    assert all(bool(torch.isfinite(x).all()) for x in exact.all), f"a gradient that is not finite\n{program.source}"
    for got, want in zip(exact.outputs, program.reference(), strict=True):
        error = float((got - want).detach().norm() / want.detach().norm())
        assert error < 1e-9, f"the generator wrote another program: off by {error:.1e}\n{program.source}"


def _judged(seed: int, program: Program, source: str, exact: Run, rewrites: tuple[int, ...] | None) -> Finding:
    try:
        verdict = judge(source, program, exact)
    except Exception as error:
        return Finding(seed, program.kind, "failed", f"{type(error).__name__}: {error}", source)
    if verdict.wrong:
        return Finding(seed, program.kind, "wrong", f"{verdict.wrong}\n{verdict.report}", source)
    if verdict.rounding:
        return Finding(seed, program.kind, "rounding", f"{verdict.rounding}\n{verdict.report}", source)
    right = verdict.rewrites > 0 if rewrites is None else verdict.rewrites in rewrites
    return Finding(seed, program.kind, "rewritten" if right else "refused", verdict.report, source)

"""The support matrix: what is found of each public program, one row each, in ``docs/support-matrix.md``.

A row says which program, and what must be found of it. Its test runs the program, compares it with fp64, and fails
where it finds something else than the row says, or than the page says. ``make matrix`` writes the page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch

from lacompile.report import Report
from lacompile.testing import assert_rewritten

PAGE = Path(__file__).parents[2] / "docs" / "support-matrix.md"
FORMULATIONS = ("parallel", "chunkwise", "recurrent", "whole model", "delta rule", "decay per feature", "other")
HEAD = """# Support matrix

What the test run finds of public programs, each as its package ships it. `make matrix` writes this page, and the tests
fail where they find something else than it says. Outputs and all gradients of every program are compared with a run in
fp64, whether it is rewritten or left alone. Which forms are found, by subject, is in [forms.md](forms.md).

- *rewrites*: how many decayed attentions became the operator; 0 is right for a program that is none.
- *left alone because*: the [obligation](matching/proof.md#obligations) that failed, and what was found instead. Beside
  a rewrite, the reason is of another part of the program.
- *any length*: what becomes of it where the length is not a number, as after a call with another one. "yes": the same
  rewrites for all lengths. "a number": Dynamo compiles anew for each length, as it does for loops, with the same
  rewrites. Empty: not asked.

| formulation | package | program | rewrites | left alone because | any length | seen with |
|---|---|---|---|---|---|---|
"""

Program = Callable[..., Any]


@dataclass(frozen=True)
class Row:
    """A public program and what must be found of it.

    Attributes:
        package: the distribution that ships it.
        what: the program, and how it is called, in Markdown.
        formulation: one of ``FORMULATIONS``.
        make: the program and its arguments for a sequence of some length, made anew for each run.
        length: that length.
        rewrites: how many decayed attentions there are.
        reason: the obligation that a near miss must name; None where there must be no near miss.
        before: the length of a call before, so that the length is no number; None not to ask.
        any_length: what that finds: "yes", "a number", or how many rewrites if it is another number.
        grads: compare gradients of what requires one.
    """

    package: str
    what: str
    formulation: str
    make: Callable[[int], tuple[Program, Sequence[Any]]]
    length: int
    rewrites: int = 1
    reason: str | None = None
    before: int | None = None
    any_length: str = "yes"
    grads: bool = True

    def __post_init__(self) -> None:
        assert self.formulation in FORMULATIONS, self.formulation

    def __str__(self) -> str:
        return f"{self.package} {self.what}".replace("`", "")

    @property
    def installed(self) -> bool:
        """Whether the package is there; it need not be."""
        return next(distributions(name=self.package), None) is not None

    @property
    def key(self) -> tuple[str, str]:
        return self.package, self.what

    def found(self) -> list[str]:
        """Runs the program: the cells of the page but for the last.

        Raises:
            AssertionError: something else is found than the row says, or a number is off.
        """
        report = self._run(self.rewrites)
        reasons = {m.obligation: m.found for m in report.near_misses}
        assert (self.reason in reasons) if self.reason else not reasons, f"expected reason {self.reason}\n{report}"
        because = f"`{self.reason}`: {reasons[self.reason]}" if self.reason else "; ".join(report.notes)
        cells = [self.formulation, self.package, self.what, str(self.rewrites), because, self._any_length()]
        return [c.replace("|", "\\|") for c in cells]

    def _run(self, count: int, before: int | None = None) -> Report:
        torch.manual_seed(0)
        after = None if before is None else self.make(before)[1]
        torch.manual_seed(0)
        program, args = self.make(self.length)
        return assert_rewritten(program, *args, count=count, grads=self.grads, compiled=False, after=after)

    def _any_length(self) -> str:
        if self.before is None:
            return ""
        count = int(self.any_length) if self.any_length.isdigit() else self.rewrites
        report = self._run(count, self.before)
        if self.any_length.isdigit():
            return self.any_length
        numbers = [r.length.isdigit() for r in report.rewrites]
        found = "a number" if numbers and all(numbers) else "yes"
        assert found == self.any_length, f"any length: {found}, expected {self.any_length}\n{report}"
        return found


def seen_with(package: str) -> str:
    """The versions at hand."""
    return f"torch {version('torch').partition('+')[0]}, {package} {version(package)}"


def lines() -> dict[tuple[str, str], list[str]]:
    """The cells of each row of the page."""
    if not PAGE.exists():
        return {}
    rows = [_cells(line) for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {(r[1], r[2]): r for r in rows[1:]}


def _cells(line: str) -> list[str]:
    return [c.strip().replace("\0", "\\|") for c in line.strip("|\n ").replace("\\|", "\0").split("|")]


def write(found: Sequence[Sequence[str]]) -> None:
    """Writes the page. Versions that an old row of the same content was seen with stay."""
    before = lines()
    rows = []
    for cells in sorted(found, key=lambda r: (FORMULATIONS.index(r[0]), int(r[3]) == 0, r[1].lower())):
        old = before.get((cells[1], cells[2]))
        seen = {seen_with(cells[1])} | (set(old[-1].split("; ")) if old and old[:-1] == list(cells) else set())
        rows.append(f"| {' | '.join([*cells, '; '.join(sorted(seen))])} |\n")
    PAGE.write_text(HEAD + "".join(rows))

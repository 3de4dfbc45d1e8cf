"""A slice of the generators for every change; ``benchmarks/generators.py`` runs the whole."""

from __future__ import annotations

import pytest

from .choices import shrink
from .program import write
from .survey import equivalents, runs, twins

BLOCK = 15
MISSED = {35}
"""Seeds of programs that are no rewrites yet: one more is a form that was lost."""


BLOCKS = [(start * BLOCK, False) for start in range(4)] + [(start * BLOCK, True) for start in (2, 3)]
"""Seeds, and whether their programs read the sequence from its end: the same programs, between flips."""


@pytest.mark.parametrize(("start", "turned"), BLOCKS)
def test_equivalent_programs_are_rewritten(start, turned):
    found = list(equivalents(range(start, start + BLOCK), turned=turned))
    bad = [f for f in found if f.outcome in ("wrong", "rounding", "failed")]
    assert not bad, "\n\n".join(map(str, bad))
    missed = [f for f in found if f.outcome == "refused" and f.seed not in MISSED]
    assert not missed, "\n\n".join(map(str, missed))


@pytest.mark.parametrize(("start", "turned"), BLOCKS)
def test_near_twins_are_not_taken_for_what_they_are_not(start, turned):
    found = list(twins(range(start, start + BLOCK), turned=turned))
    assert len(found) > BLOCK / 2
    bad = [f for f in found if f.outcome in ("wrong", "rounding", "failed")]
    assert not bad, "\n\n".join(map(str, bad))


def test_what_reads_where_nothing_was_written_is_no_twin():
    """It would be compared by what memory held before, which no run has in common with another."""
    program = write(3)
    before, returned = program.source.rsplit("return ", 1)
    assert runs(program, f"{before}return {returned}") is not None
    first = returned.split(",")[0].strip()
    assert runs(program, f"{before}return {first} + torch.empty_like({first})") is None


def test_a_program_is_its_record():
    program = write(3)
    assert write(3, program.record).source == program.source


def test_a_record_shrinks_to_what_matters():
    program = write(5)
    small = shrink(program.record, lambda record: "torch.cat" in write(5, record).source)
    made = write(5, small)
    assert "torch.cat" in made.source and sum(map(bool, small)) <= sum(map(bool, program.record))

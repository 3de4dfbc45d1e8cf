"""Every program of the support matrix is found, or left alone, as its row says, and as the page says."""

from __future__ import annotations

import pytest

from .matrix import PAGE, Row, lines
from .rows import ROWS


def test_the_page_has_these_rows():
    assert sorted(lines()) == sorted(r.key for r in ROWS), f"write {PAGE.name} anew: make matrix"


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_row(row: Row):
    if not row.installed:
        pytest.skip("a public package that is tested where it is installed")
    assert row.found() == lines()[row.key][:-1], f"write {PAGE.name} anew: make matrix"

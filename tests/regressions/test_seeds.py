"""Programs of the generator that a change of the rules once lost."""

from __future__ import annotations

import pytest

from tests.properties import survey

SEEDS = {
    10027: "infinity times a known rate, as in the mask of RetNet, is no rounding error",
    10015: "the gate's logarithm of one chunk is a part of a function that no value holds whole",
    10916: "what a head sums over two tokens of a chunk is no sum over all tokens of another head",
}


@pytest.mark.parametrize("seed", SEEDS)
def test_is_rewritten(seed):
    (found,) = survey.equivalents([seed])
    assert found.outcome == "rewritten", found

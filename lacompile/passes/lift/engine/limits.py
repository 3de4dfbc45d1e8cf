"""Where the lift stops looking: the sizes at which it gives up, and how it says so."""

from __future__ import annotations

MAX_TERMS = 12  # of one side of a product of sums
MAX_CASES = 8
MAX_FACTORS = 10
MAX_TABLE = 4096  # numbers


class GiveUp(Exception):
    """This operation cannot be looked into; its result becomes an opaque leaf. Never leaves the lift."""


class Unmerged(GiveUp):
    """A sum of too many terms that do not merge, as in a recurrence of another kind."""

"""Where the lift stops looking: the sizes at which it gives up, and how it says so."""

from __future__ import annotations

from ..domain.exponent import Mono
from ..domain.term import Term

MAX_TERMS = 12  # of one side of a product of sums
MAX_CASES = 8
FEW_CASES = 4  # that a write leaves, before neighbours are looked for
MAX_FACTORS = 10
MAX_RATES = 8  # of one weight: those of a decay telescope, however many tokens it is over
MAX_TABLE = 4096  # numbers


class GiveUp(Exception):
    """This operation cannot be looked into; its result becomes an opaque leaf. Never leaves the lift."""


class Unmerged(GiveUp):
    """A sum of too many terms that do not merge, as in a recurrence of another kind."""


def bounded(t: Term) -> Term:
    """A product that has not grown too long: a recurrence of another kind adds factors, or rates, with each token."""
    if len(t.accs) > MAX_FACTORS:
        raise Unmerged("a product of too many factors")
    if len(t.exp.lin) + len(t.exp.sums) > MAX_RATES and len(_rates(t)) > MAX_RATES:
        raise Unmerged("a weight of too many rates")
    return t


def _rates(t: Term) -> set[Mono]:
    return {mono for mono, _ in t.exp.lin} | {mono for (mono, _), _ in t.exp.sums}

"""An unrolled loop of state updates of which no more can be said: its steps do not merge, each by itself is no sum.

What token ``t`` reads from a state is a sum of ``t`` products. Where queries, keys, values or weights of each token are
tensors of its own, no index runs over the tokens and no obligation speaks of them. But that there is one product more
for each token shows, in values side by side or in one that holds them all. Nothing here decides what is rewritten.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import accumulate
from operator import and_

from ...facts import Progress
from ..domain.affine import ZERO, Aff
from ..domain.term import Term
from ..engine import Engine
from ..interpret import Known
from .proof import Refused

FEWEST = 4  # steps, below which sums of one product more than the one before are nothing out of the ordinary


def unrolled(engine: Engine, values: Iterable[Known]) -> tuple[Known, Refused] | None:
    """The value that shows the loop, or the last of those that do, and what it is; None if there is no such loop."""
    steps: dict[object, dict[int, Known]] = {}
    for known in values:
        read = [(t, n) for c in known.value.cases for t in c.terms if (n := _products(engine, t))]
        if (found := _in_a_row(_by_place(engine, known, read))) >= FEWEST:
            return known, _refused(found)
        for counted in ([(t, 1) for t, _ in read], read) if read else ():
            key = counted is read, known.node.op, known.node.target, known.value.shape
            steps.setdefault(key, {}).setdefault(sum(n for _, n in counted), known)
    for alike in steps.values():
        if (found := _in_a_row(alike)) >= FEWEST:
            return alike[max(alike)], _refused(found)
    return None


def weighed_apart(engine: Engine, values: Iterable[Known]) -> tuple[Known, Refused] | None:
    """A value whose rows are one sum but for a factor that each row has of its own, as where a running scale divides a
    state in each step; None if there is none.
    """
    for known in values:
        for v, size in enumerate(known.value.shape):
            terms = [t for c in known.value.cases for t in c.terms if t.bound(engine.space)]
            rows = [Counter(t.signature) for t in terms if len(set(_rows(engine, t, v, size))) == 1]
            shared = reduce(and_, rows) if rows else Counter[int]()
            own = {tuple((row - shared).elements()) for row in rows}
            if shared.total() > 2 and len(rows) == len(own) >= FEWEST:
                return known, Refused(
                    "single-term",
                    "one sum over j <= i",
                    f"{len(rows)} rows of one sum, each times a factor of its own",
                    Progress.NAMED,
                    "a factor that is computed step by step, as a running scale, is no part of one tensor",
                )
    return None


def state_alone() -> Refused:
    """Of a sum over tokens, decayed, that no row reads: what a prefill may be left with."""
    return Refused(
        "causal-range",
        "rows that each read the sum up to them",
        "the state behind the last token, and no row that reads one before",
        Progress.NAMED,
        "one product of all keys and values, weighted, is what remains to be done; the operator would do more",
    )


def _refused(steps: int) -> Refused:
    return Refused(
        "single-term",
        "one sum over j <= i",
        f"an unrolled loop: at least {steps} sums, each of one product more than the one before",
        Progress.NAMED,
        "what each step is computed from is no part of one tensor, or its result is put into what is not looked into",
    )


def _products(engine: Engine, t: Term) -> int:
    """How many products of a query, a key and a value are added up, over features too; 0 of what is no such sum."""
    data = [a for a in t.accs if not engine.leaves[a[0]].parameter]
    bound = t.bound(engine.space)
    if len(data) < 3 or not any(sum(v in engine.space.vars_of(idx) for _, idx in data) > 1 for v in bound):
        return 0
    ends = [engine.bounds(v, t.guards).ends for v in bound]
    lengths = [e[1] - e[0] + 1 if e is not None else Aff.var(0) for e in ends]
    return math.prod(int(n.const) for n in lengths) if all(n.is_const for n in lengths) else 0


def _by_place(engine: Engine, known: Known, read: Sequence[tuple[Term, int]]) -> set[int]:
    """How many sums that did not merge there are at a place, for the dimension along which that differs most."""
    found: list[set[int]] = [set()]
    for v, size in enumerate(known.value.shape):
        changes: Counter[int] = Counter()
        for low, high in (_rows(engine, t, v, size) for t, _ in read):
            changes[low] += 1
            changes[high + 1] -= 1
        found.append({n for n in accumulate(changes[at] for at in sorted(changes)) if n})
    return max(found, key=len)


def _rows(engine: Engine, t: Term, v: int, size: Aff) -> tuple[int, int]:
    """The first and the last place of the value along a dimension that a sum counts at, as far as they are numbers."""
    ends = engine.bounds(v, t.guards)
    low, high = ends.low or [ZERO], ends.high or [size - 1]  # what holds everywhere is no guard
    if ends.other or len(low) > 1 or len(high) > 1 or not low[0].is_const or not high[0].is_const:
        return 0, 0
    return int(low[0].const), int(high[0].const)


def _in_a_row(sizes: Iterable[int]) -> int:
    """How many of these sizes, from the smallest on, are each by one number more than the one before."""
    first, second, *rest = [*sorted(set(sizes)), 0, 0]
    step = second - first
    return 0 if step <= 0 else next(n for n, size in enumerate([first, second, *rest]) if size != first + n * step)

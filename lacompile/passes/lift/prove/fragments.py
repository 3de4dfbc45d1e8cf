"""A chunk of a loop whose chunks do not merge: an attention by itself, which costs more as an operator than it saves.

That the whole is something else has been found by then. Of a loop the whole shows one of two things: more tokens than
those of the chunk, in what the chunk reads a part of, or what the rows of a chunk read of all tokens of an earlier one.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..domain.affine import Aff
from ..domain.space import Space
from ..domain.term import Term
from ..engine import Engine
from ..interpret import Known
from .proof import Proof
from .roles import sequence_index

HINT = "its chunks are attentions by themselves, each of which costs more as an operator than it saves"


def is_fragment(engine: Engine, refused: Iterable[Known], p: Proof) -> bool:
    """Whether what is proved is a chunk of one of the values that were refused on the way to it."""
    return any(_reads_an_earlier_chunk(engine, c.terms, p) for known in refused for c in known.value.cases)


def is_part(space: Space, p: Proof) -> bool:
    """Whether some operand is read in half of its length at most: more than what a convolution leaves over."""
    return any(space.lower(size - p.length * 2, {}) >= 0 for size in p.lengths())


def _reads_an_earlier_chunk(engine: Engine, terms: Iterable[Term], p: Proof) -> bool:
    terms = [t for t in terms if p.leaves.intersection(t.leaves)]
    rows = [(t, found) for t in terms if (found := sequence_index(engine, t)) is not None]
    return any(_is_of_all_tokens(engine, t, row, j, p.length) for row, (j, _) in rows for t in terms if t is not row)


def _is_of_all_tokens(engine: Engine, t: Term, row: Term, j: int, length: Aff) -> bool:
    """Whether a term sums over as many tokens as there are what another one sums over those up to the row."""
    if t.signature != row.signature or sequence_index(engine, t) is not None:
        return False
    summed = {(leaf, n) for leaf, idx in row.accs for n, i in enumerate(idx) if i.coef(j)}
    ends = {v: engine.bounds(v, t.guards).ends for v in t.bound(engine.space)}
    whole = {v for v, end in ends.items() if end is not None and end[1] - end[0] + 1 == length}
    return bool(summed) and all(
        any(leaf == of and not whole.isdisjoint(engine.space.vars(idx[n])) for of, idx in t.accs) for leaf, n in summed
    )

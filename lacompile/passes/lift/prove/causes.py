"""Why a sum over positions is no decayed attention, where more can be said than which obligation failed first.

A recurrence of another kind fails some obligation in every one of its unrolled steps, and which one is an accident: the
pieces do not merge, a range ends early. What kind it is, the factors say: what they are, and what they were computed
from. Nothing here decides what is rewritten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import permutations

import torch

from ...facts import Progress
from ..domain.affine import Aff
from ..domain.exponent import Access, Mono
from ..domain.kinds import Opaque, Symbol
from ..domain.term import Term
from ..engine import Engine
from .proof import Refused
from .roles import sequence_index

aten = torch.ops.aten

MAXIMA = {p.__name__ for p in (aten.maximum, aten.max, aten.amax, aten.cummax)}
SOLVERS = {p.__name__ for p in (aten.linalg_solve_triangular, aten.triangular_solve, aten.linalg_inv_ex)}
MAX_VISITED = 64  # values that a factor was computed from, or added up from, before that counts as unknown


class Causes:
    """What the sums of one program are instead of decayed attentions; each is told once, for its factors."""

    def __init__(self, engine: Engine):
        self.engine, self.space = engine, engine.space
        self._told: set[int] = set()
        self._maxima: list[int] = []  # of each leaf: the most maxima on a way to it
        self._solved: list[bool] = []

    def of(self, terms: Sequence[Term], refused: bool) -> Refused | None:
        """The cause that shows in this sum, the one closest to what the program is first; None if none does.

        Some say something only of a value that is nearly an attention, which was ``refused``.
        """
        self._look_at_new_leaves()
        if self._made_of_another(terms):
            return Refused(
                "recurrence",
                "keys and values that are not computed from the state",
                "a state that is read back into its own update (a delta rule)",
                Progress.ADDENDS,
                "what is added to it is a contraction of what was added before",
            )
        if any(self._maxima[leaf] > 1 for t in terms for mono, _ in _moving(t) for leaf, _ in mono):
            return Refused(
                "bounded-weights",
                "a weight of the keys that is finite by itself",
                "an exponential gate that a running maximum keeps finite",
                Progress.DECAY,
                "apart, the exponential of the gate may overflow where the stabilised one does not",
            )
        if refused and any(self._solved[leaf] for t in terms for leaf, _ in t.accs):
            return Refused(
                "recurrence",
                "keys and values that are not computed from the state",
                "a factor made by a triangular solve, or token by token (as in a delta rule)",
                Progress.DECAY,
            )
        if refused and any(self._by_channel(t) for t in terms):
            return _of_channels()
        if refused and self._scaled_apart(terms):
            return Refused(
                "single-term",
                "one sum over j <= i",
                "sums that are each divided by a maximum of their own, as those of chunks are",
                Progress.DECAY,
                "the maximum is one of the scores and states inside each chunk, which the operator never holds",
            )
        tied = {found[1] for t in terms if (found := sequence_index(self.engine, t)) is not None}
        sums = [t for t in terms if t.bound(self.space)]  # beside terms of single positions
        if sums and all(self._elementwise(t, tied) for t in sums):
            return Refused(
                "separable", "queries and keys", "an elementwise recurrence, without queries and keys", Progress.NAMED
            )
        if (count := self._unrolled(sums)) and not refused:
            return Refused(
                "single-term",
                "one sum over j <= i",
                f"{count} sums of the same factors that do not merge",
                Progress.MERGE,
                "an unrolled loop is one sum if its weights are products of one positive decay for each token",
            )
        return None

    def of_state(self, terms: Iterable[Term]) -> Refused | None:
        """The cause that shows in a state of which nothing more is known, as where no row that reads it is."""
        return _of_channels() if any(self._by_channel_of_state(t) for t in terms) else None

    def told(self, terms: Iterable[Term]) -> bool:
        """Whether the cause of a sum with some of these factors was told before; it is from now on."""
        factors = {leaf for t in terms for leaf, _ in t.accs}
        before = bool(factors & self._told)
        self._told |= factors
        return before

    # ------------------------------------------------------------------------------- what a value was computed from

    def _look_at_new_leaves(self) -> None:
        """A leaf is computed from older ones: one pass in the order of their birth."""
        for leaf in range(len(self._maxima), len(self.engine.leaves)):
            kind = self.engine.leaves[leaf].kind
            sources = () if self._projected(leaf) else self._sources(leaf)
            name = _name(kind)
            self._maxima.append((name in MAXIMA) + max((self._maxima[s] for s in sources), default=0))
            self._solved.append(name in SOLVERS or self._substituted(leaf) or any(self._solved[s] for s in sources))

    def _sources(self, leaf: int) -> tuple[int, ...]:
        kind = self.engine.leaves[leaf].kind
        return kind.of if isinstance(kind, Opaque) else self.engine.leaves.made_of(leaf)

    def _projected(self, leaf: int) -> bool:
        """A product with a parameter: behind it is another layer of the model."""
        kind = self.engine.leaves[leaf].kind
        return isinstance(kind, Opaque) and any(self.engine.leaves[s].parameter for s in kind.of)

    def _substituted(self, leaf: int) -> bool:
        """A sum given up as its summands hold each other: the rows of an inverse, each computed from those before."""
        kind = self.engine.leaves[leaf].kind
        if not isinstance(kind, Opaque):
            return False
        return any(self._holds(x, y) for x, y in permutations(kind.summands[:MAX_VISITED], 2))

    def _descent(self, leaf: int) -> set[int]:
        """The leaves that this one was computed from through a contraction, as far as they are looked for."""
        work, seen, out = [(leaf, False)], {(leaf, False)}, set()
        while work and len(seen) < MAX_VISITED:
            at, contracted = work.pop(0)
            if contracted:
                out.add(at)
            if self._projected(at):
                continue
            contracted = contracted or isinstance(self.engine.leaves[at].kind, Opaque)
            fresh = [(s, contracted) for s in self._sources(at) if (s, contracted) not in seen]
            seen.update(fresh)
            work += fresh
        return out

    # ------------------------------------------------------------------------------------- a state read by its update

    def _made_of_another(self, terms: Sequence[Term]) -> bool:
        """Whether a summand was computed from another one, by a contraction.

        The state of a delta rule is S + k (v - k S): the product that is added holds those added before, in its own
        factors, or in what one of them descends from.
        """
        return any(
            self._outer(new) and bool(old.accs) and (self._holds(new, old) or self._descends(new, old))
            for new, old in permutations(terms, 2)
        )

    def _outer(self, t: Term) -> bool:
        """An outer product: no factor holds all dimensions that the product has."""
        held = [self._free(a) for a in t.accs]
        return len(held) > 1 and frozenset().union(*held) not in held

    def _holds(self, new: Term, old: Term) -> bool:
        """Whether ``new`` is ``old`` times more, a leaf that is contracted at one place being there at another too."""
        mine, theirs = Counter(new.signature), Counter(old.signature)
        bound = new.bound(self.space)
        if not bound or theirs.total() < 2 or mine == theirs or theirs - mine:
            return False
        return any(
            a[0] == b[0] and _apart(a, b) and bound & self.space.vars_of(a[1]) for a, b in permutations(new.accs, 2)
        )

    def _descends(self, new: Term, old: Term) -> bool:
        mine, theirs = set(new.signature), set(old.signature)
        if len(theirs) == 1:
            if not _unmerged(self.engine.leaves[old.accs[0][0]].kind):
                return False
        elif not self._outer(old) or not any(_at_a_number(a, b) for a in new.accs for b in old.accs):
            return False
        return any(theirs <= self._descent(leaf) for leaf in sorted(mine - theirs))

    def _free(self, a: Access) -> frozenset[int]:
        return frozenset(v for v in self.space.vars_of(a[1]) if v >= 0)

    # -------------------------------------------------------------------------------------------------------- weights

    def _unrolled(self, sums: Sequence[Term]) -> int:
        """How many sums there are of the same queries, keys and values, at other positions; 0 if they are few."""
        leaves = self.engine.leaves
        alike = Counter(t.signature for t in sums if sum(not leaves[x].parameter for x in set(t.signature)) > 2)
        most = max(alike.values(), default=0)
        return most if most > 2 else 0

    def _scaled_apart(self, terms: Sequence[Term]) -> bool:
        """Whether every sum has a factor made by a maximum, and no two of them the same one."""
        made = [{leaf for leaf in t.signature if self._maxima[leaf]} for t in terms if t.bound(self.space)]
        return len(made) > 1 and all(made) and not set.intersection(*made)

    def _by_channel(self, t: Term) -> bool:
        """Whether a weight moves at a rate of its own for each feature that is contracted."""
        found = sequence_index(self.engine, t)
        features = t.bound(self.space) - {found[0] if found else None}
        sums = {mono for (mono, _), _ in t.exp.sums}
        moving = [m for m, f in _moving(t) if m in sums or not f.is_const]
        return any(features & self.space.vars_of(idx) for m in moving for _, idx in m)

    def _by_channel_of_state(self, t: Term) -> bool:
        """The same of an outer product over all tokens: a rate for each dimension that one of its factors alone has.

        A head is one that both have, or that one has beside its features.
        """
        if not self._outer(t):
            return False
        held = [self._free(a) for a in t.accs]
        bound = t.bound(self.space)
        along = {v for m, f in _moving(t) if bound & self.space.vars(f) for a in m for v in self._free(a)}
        largest = {mine for mine in held if not any(mine < theirs for theirs in held)}
        own = [mine - frozenset().union(*largest - {mine}) for mine in largest]
        return len(own) > 1 and any(mine and mine <= along for mine in own)

    def _elementwise(self, t: Term, positions: set[int]) -> bool:
        """A weighted sum over positions alone, one factor of which holds all else that the product holds."""
        bound = t.bound(self.space)
        if len(bound) != 1 or not any(bound & self.space.vars(f) for _, f in _moving(t)):
            return False
        along = [a for a in t.accs if bound & self.space.vars_of(a[1])]
        if any(positions & self._free(a) for a in (*along, *(a for m, _ in _moving(t) for a in m))):
            return False
        rest = frozenset().union(*map(self._free, t.accs)) - positions
        return any(rest <= self._free(a) for a in along)


def _of_channels() -> Refused:
    return Refused("decay", "one decay per head", "a decay that differs by feature channel", Progress.DECAY)


def _apart(a: Access, b: Access) -> bool:
    """Whether two accesses of one leaf read it at places a number apart."""
    return any((x - y).is_const and x != y for x, y in zip(a[1], b[1], strict=True))


def _at_a_number(a: Access, b: Access) -> bool:
    """Whether ``a`` reads the leaf of ``b`` at a place of its own, as one step of a loop does."""
    return a[0] == b[0] and any(x != y and x.is_const for x, y in zip(a[1], b[1], strict=True))


def _unmerged(kind: object) -> bool:
    return isinstance(kind, Opaque) and kind.unmerged


def _name(kind: object) -> str:
    if isinstance(kind, Symbol):
        return getattr(kind.op, "overloadpacket", kind.op).__name__
    return kind.label if isinstance(kind, Opaque) else ""


def _moving(t: Term) -> Iterator[tuple[Mono, Aff]]:
    """The rates of a weight, each with what it moves with."""
    yield from t.exp.lin
    yield from (key for key, _ in t.exp.sums)

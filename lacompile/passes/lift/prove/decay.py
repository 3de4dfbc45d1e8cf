"""The weight of a sum: a decay ``exp(G_i - G_j)`` of each head, and factors of rows, of keys and of features.

The obligations of obligations.py that ask for this: decay, unit-diagonal, bounded-weights.
"""

from __future__ import annotations

import math

import torch

from ...facts import Progress
from ..domain.affine import TAU, Aff
from ..domain.exponent import Access, Exponent, Mono, sub_mono
from ..domain.intervals import BOUNDS, product
from ..domain.kinds import Opaque, Table
from ..normal.logs import log_summands
from .proof import Refused, at_position, unbounded
from .roles import Roles

LARGEST_EXPONENT = 80.0  # exp of it is finite in float32 and bfloat16
LARGEST_IN_HALF = 7.0  # exp of it, times a key of up to 60, is finite in float16
MOST_STEPS = 4096  # of a decay at once: a chunk and more
GROWTH = 1e-9
BOUND = {p.__name__ for p in BOUNDS}


def _times(f: Aff) -> str:
    return "an exponent that is not linear in positions" if f.divides else f"an exponent times {f}"


class Decay(Roles):
    """The exponents of the main term, each of them put where it belongs."""

    def sort_weights(self) -> None:
        i, j = self.n, self.j
        self.main = self.main.but(exp=self._own_decay_apart(self.main.exp))
        for mono, f in self.main.exp.lin:
            holders = set().union(*(self.space.vars(x) for _, idx in mono for x in idx), set()) | self.space.vars(f)
            if holders & set(self.features) or (self.e is not None and self.e in holders):
                self._feature_weight(mono, f, holders)
            elif not mono:
                self._constant_weight(f)
            elif i not in holders and j not in holders:
                if not f.is_const:
                    raise Refused("decay", "a weight of i - j", _times(f), Progress.DECAY)
                self.proof.k_weights.append((self._renamed_mono(mono), float(f.const)))
            elif f.is_const:
                if i in holders and j in holders:
                    raise Refused(
                        "separable", "weights exp(G_i - G_j)", "an exponent holding both positions", Progress.FACTORS
                    )
                into = self.proof.outer_weights if i in holders else self.proof.k_weights
                into.append((self._renamed_mono(mono), float(f.const)))
            else:
                self._fixed_decay(mono, f)
        self._token_decays()

    def _own_decay_apart(self, exp: Exponent) -> Exponent:
        """The same exponent, what weighs a token at once as a factor of its key: in ``a (S + k v)``, ``a k``.

        ``P(i + 1) - P(j)`` is the decay after the token, and the token's own. Where the row has its own as a factor,
        ``exp(P(i)) a_i``, the factor goes: that is ``exp(P(i + 1))``. Where it has not, ``P(i) - P(j)`` stays: a row
        reads before it decays. A row that reads the position before it has decayed by then, or decays later.
        """
        lin, sums = list(exp.lin), []
        for (mono, pos), c in exp.sums:
            if pos == Aff.var(self.j) and not self.later and self._reads_before_decay(exp, mono, c):
                self.proof.delayed = True
            elif pos == Aff.var(self.j):
                lin.append((sub_mono(self.space, mono, {TAU: pos}), Aff.lit(-c)))
                pos = pos + 1
            elif pos == Aff.var(self.n) and (a := self._decay_of_row(mono, c)) is not None:
                self._drop_of_row(a)
                pos = pos + 1
            sums.append(((mono, pos), c))
        return Exponent.of(lin, sums)

    def _reads_before_decay(self, exp: Exponent, mono: Mono, c: float) -> bool:
        """Whether the weight is ``exp(P(i) - P(j))``, which is 1 on the diagonal."""
        return ((mono, Aff.var(self.n)), -c) in exp.sums and self._decay_of_row(mono, -c) is None

    def _decay_of_row(self, mono: Mono, c: float) -> Access | None:
        """The factor that is each row's own decay, ``exp(P(i)) a_i``; None if there is none."""
        own = self._renamed_mono(sub_mono(self.space, mono, {TAU: Aff.var(self.n)}))
        if c != 1 or len(own) != 1:
            return None
        of_row = (*self.proof.outer, *self.proof.q)
        return next((a for a in of_row if log_summands(self.engine.leaves, a) == [(1.0, own[0])]), None)

    def _drop_of_row(self, a: Access) -> None:
        """Takes a factor away from those of the row."""
        (self.proof.outer if a in self.proof.outer else self.proof.q).remove(a)

    def check_finite(self) -> None:
        """exp(I_j - m_i) is finite where exp(I_j) is not: a key's weight must be bounded without the row's.

        Or the program computes it by itself, and is not finite either.
        """
        if not self.proof.outer_weights:
            return
        half = self.known.compute is torch.float16
        largest = LARGEST_IN_HALF if half else LARGEST_EXPONENT
        for mono, c in self.proof.k_weights:
            low, high = -math.inf, math.inf
            alone = mono[0][0] if len(mono) == 1 else None
            if alone is not None:
                leaf = self.engine.leaves[alone]
                low, high = leaf.interval
                self.proof.looked_at |= leaf.rests_on
            if max(c * low, c * high) <= largest:
                continue
            if alone is None or half or (alone, c) not in self.engine.exponentials:
                raise unbounded()
            self.proof.overflowing.append((alone, c))

    def check_decays(self) -> None:
        """What is known to grow is no decay: the operator's exponents are at most 0, and may be skipped where small."""
        low = high = 0.0
        known = True
        for mono, c in (*self.proof.fixed, *self.proof.tokens):
            ends = (c, c)
            for leaf, _ in mono:
                ends = product(ends, self.engine.leaves[leaf].interval)
                known &= isinstance(self.engine.leaves[leaf].kind, Table)
            low, high = low + ends[0], high + ends[1]
        if high > GROWTH and (known or low >= 0):
            raise Refused(
                "decay", "a decay, which is at most 1", "a factor that grows from token to token", Progress.DECAY
            )

    def _feature_weight(self, mono: Mono, f: Aff, holders: set[int] | frozenset[int]) -> None:
        """exp of plain data (a feature map) is a factor of its side; a decay that differs by feature is refused."""
        if not f.is_const or (self.n in holders and self.j in holders):
            raise Refused("decay", "one decay per head", "a decay that differs by feature channel", Progress.DECAY)
        with_e = self.e is not None and self.e in holders
        if self.j in holders and not with_e:
            self.proof.k_weights.append((self._renamed_mono(mono), float(f.const)))
        elif self.n in holders and not with_e:
            self.proof.q_weights.append((self._renamed_mono(mono), float(f.const)))
        else:
            raise Refused("decay", "one decay per head", "an exponential of a value feature", Progress.DECAY)

    def _constant_weight(self, f: Aff) -> None:
        step = f.coef(self.n)
        if f != Aff.var(self.n) * step - Aff.var(self.j) * step + f.const:
            raise Refused("decay", "a weight of i - j", f"exp({f})", Progress.DECAY)
        if step:
            self.proof.fixed.append(((), float(step)))
        if abs(f.const) > LARGEST_EXPONENT:
            raise Refused(
                "bounded-weights", "weights that are finite", f"exp({f.const:g}) times each of them", Progress.DECAY
            )
        self.proof.scale *= math.exp(f.const)

    def _fixed_decay(self, mono: Mono, f: Aff) -> None:
        step = f.coef(self.n)
        shape = Aff.var(self.n) * step - Aff.var(self.j) * step
        if f.without(self.n).without(self.j).terms or f - f.const != shape or not step:
            raise Refused("decay", "a weight of i - j", _times(f), Progress.DECAY)
        if any(self.space.vars(x) & {self.n, self.j} for _, idx in mono for x in idx):
            raise Refused("decay", "one decay per head", "a slope that differs by position", Progress.DECAY)
        if abs(f.const) > MOST_STEPS * abs(step):
            raise Refused(
                "bounded-weights", "weights that are finite", f"{f.const / step:g} steps at once", Progress.DECAY
            )
        if f.const:  # so many steps at once, as where a row decays before it reads
            self.proof.q_weights.append((self._renamed_mono(mono), float(f.const)))
        self.proof.fixed.append((self._renamed_mono(mono), float(step)))

    def _token_decays(self) -> None:
        groups: dict[Mono, dict[Aff, float]] = {}
        for (mono, pos), c in self.main.exp.sums:
            groups.setdefault(mono, {})[pos] = c
        for mono, ends in groups.items():
            ahead = int(not self.proof.delayed)
            up, down = Aff.var(self.n) + ahead, Aff.var(self.j) + ahead
            holders = set().union(*(self.space.vars(x) for _, idx in mono for x in idx), set())
            if holders & set(self.features) or (self.e is not None and self.e in holders):
                raise Refused("decay", "one decay per head", "a decay that differs by feature channel", Progress.DECAY)
            own = self.later and set(ends) == {up + 1, down}  # the row that reads has decayed by then
            if own:
                ends[up] = ends.pop(up + 1)
                self.proof.q_weights.append((self._renamed_mono(at_position(mono)), float(ends[up])))
            if self.later and set(ends) == {up + 1, down + 1}:  # of keys that come a token later than they decay
                mono = sub_mono(self.space, mono, {TAU: Aff.var(TAU) + 1})
                ends = {up: ends[up + 1], down: ends[down + 1]}
            if set(ends) != {up, down} or abs(ends[up] + ends[down]) > 1e-9:
                if set(ends) == {up}:
                    self._refuse_bounded_keys()
                shown = ", ".join(f"{c:+g} P({p})" for p, c in ends.items())
                raise Refused("unit-diagonal", "prefix sums P(i+1) - P(j+1)", shown, Progress.DECAY)
            if holders & {self.n, self.j}:
                raise Refused("decay", "one decay per token", "a decay that depends on both positions", Progress.DECAY)
            if self.proof.delayed and self.proof.fixed:
                raise Refused("decay", "one decay", "a decay before a row reads, and one after it", Progress.DECAY)
            self.proof.tokens.append((self._renamed_mono(at_position(mono)), float(ends[up])))

    def _refuse_bounded_keys(self) -> None:
        """Of ``exp(G_i)`` alone: a bound on ``exp(G_j)``, which is not looked into, is why the keys have none."""
        for leaf in sorted(self.engine.leaves.data(leaf for leaf, _ in (*self.proof.k, *self.proof.v))):
            kind = self.engine.leaves[leaf].kind
            if isinstance(kind, Opaque) and kind.label in BOUND:
                raise Refused(
                    "decay",
                    "a weight exp(G_i - G_j)",
                    f"exp(G_i) times keys with a factor that is bounded ({kind.label})",
                    Progress.DECAY,
                    "where a product of decays is at its bound, the weight of a key is no decay any more",
                )

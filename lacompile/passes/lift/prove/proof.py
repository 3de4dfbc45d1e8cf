"""A proved decayed attention, read off a normal form: which accesses are q, k, v, and what the decay is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import fx

from ...facts import Progress
from ..domain.affine import TAU, ZERO, Aff
from ..domain.exponent import Access, Mono
from ..domain.space import Space
from ..domain.term import Term
from ..interpret import Known

N_ROLE, D_ROLE, E_ROLE = 90, 91, 95  # positions, key features (91..94), value features; below 90: batch and heads


class Refused(Exception):
    """An obligation that does not hold; caught by the search and turned into a Refusal."""

    def __init__(self, obligation: str, expected: str, found: str, progress: Progress, hint: str = ""):
        super().__init__(found)
        self.obligation, self.expected, self.found = obligation, expected, found
        self.progress, self.hint = progress, hint


@dataclass
class Proof:
    """A decayed attention read off one value, its accesses over role variables."""

    known: Known
    roles: dict[int, Aff]  # batch-like roles first, then N_ROLE, the key features, E_ROLE
    batch_like: list[int]
    place: dict[int, int]  # role -> dimension of the target (features of keys have none)
    later: bool = False
    """Whether a position reads the sum up to the one before it: the attention's row i is read by row i + 1."""
    backwards: bool = False
    """Whether the last row of the operator's result is the first of the program's."""
    delayed: bool = False
    """Whether a row reads before it decays: ``tokens`` at a position are the operator's decay of the next one."""
    q: list[Access] = field(default_factory=list)
    k: list[Access] = field(default_factory=list)
    v: list[Access] = field(default_factory=list)
    q_weights: list[tuple[Mono, float]] = field(default_factory=list)
    k_weights: list[tuple[Mono, float]] = field(default_factory=list)
    outer: list[Access] = field(default_factory=list)
    outer_weights: list[tuple[Mono, float]] = field(default_factory=list)
    fixed: list[tuple[Mono, float]] = field(default_factory=list)
    tokens: list[tuple[Mono, float]] = field(default_factory=list)
    scale: float = 1.0
    key_scale: float = 1.0
    """What the keys are multiplied by, where an initial state is not: k / sqrt(D) v is added to S as it is."""
    first: Aff = ZERO
    """The position of the sum that is the operator's first: q, k and v may be parts of longer tensors."""
    state: list[Access] | None = None
    flattened: tuple[int, ...] = ()
    """The dimensions that are joined with the one behind them, one after the other, to have the program's value."""
    chunked: tuple[tuple[int, int, int], ...] = ()
    """The dimensions that number rows by chunk and place in it, and how many places there are, one pair split after
    another to have the program's value."""
    state_number: float = 1.0
    """What every entry of the initial state is, where it is a number: ``state`` is then empty."""
    overflowing: list[tuple[int, float]] = field(default_factory=list)
    """Leaves and multiples of which exp may overflow in a key's weight, and does so in the program."""
    residual: list[Term] = field(default_factory=list)
    shapes: dict[int, tuple[Aff, ...]] = field(default_factory=dict)
    looked_at: set[fx.Node] = field(default_factory=set)
    """Inputs whose values decided an obligation."""

    @property
    def size(self) -> tuple[Aff, int]:
        """The length, and the number of elements of the value as far as they are numbers."""
        sizes = [int(n.const) for n in self.known.value.shape if n.is_const]
        return self.roles[N_ROLE], math.prod(sizes)

    @property
    def length(self) -> Aff:
        return self.roles[N_ROLE]

    def lengths(self) -> list[Aff]:
        """Those of the tensors that q, k and v are read from, along their positions."""
        read = [(a[0], [n for n, i in enumerate(a[1]) if i.coef(N_ROLE)]) for a in (*self.q, *self.k, *self.v)]
        return [self.shapes[leaf][at[0]] for leaf, at in read if at]

    @property
    def leaves(self) -> set[int]:
        return {a[0] for a in (*self.q, *self.k, *self.v, *self.outer)}

    def head_roles(self, space: Space) -> tuple[list[int], list[int]]:
        """The batch-like roles that are heads, and the others: those a fixed decay depends on, else the innermost."""
        monos = [m for m, _ in (*self.fixed, *self.tokens)]
        used = {v for m in monos for _, idx in m for x in idx for v in space.vars(x)}
        if self.tokens:
            heads = self.batch_like[1:]
        else:
            heads = [r for r in self.batch_like if r in used] or self.batch_like[1:][-1:]
        return heads, [r for r in self.batch_like if r not in heads]

    @property
    def key_features(self) -> list[int]:
        return [r for r in self.roles if D_ROLE <= r < E_ROLE]


def at_position(mono: Mono) -> Mono:
    """The summand of a prefix sum at position i: the running position becomes the position role."""

    def at(a: Aff) -> Aff:
        c = a.coef(TAU)
        return a.without(TAU) + Aff.var(N_ROLE) * c if c else a

    return tuple((leaf, tuple(at(x) for x in idx)) for leaf, idx in mono)


def unbounded() -> Refused:
    """A weight of the keys that overflows where the program may not."""
    return Refused(
        "bounded-weights",
        "a weight of the keys that is finite by itself",
        "an exponential gate that a factor of the row, such as a running maximum, may keep finite",
        Progress.DECAY,
        "apart, the exponential of the gate may overflow where the stabilised one does not",
    )

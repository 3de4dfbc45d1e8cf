"""What a rewrite takes for granted of the graph's inputs: numbers that were looked at, and bases that are positive."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from ...facts import Assumption, Expr, Progress, values_of
from ...graph.schedule import Schedule
from ...names import readable_name
from ..domain.kinds import Opaque, Symbol
from ..interpret import Interpreter
from ..prove.proof import Proof, Refused
from .doubles import Doubles

aten = torch.ops.aten


class Assumptions:
    """Of the matches in one graph."""

    def __init__(self, schedule: Schedule, interpreter: Interpreter):
        self.schedule, self.interpreter, self.engine = schedule, interpreter, interpreter.engine
        self.doubles = Doubles(interpreter)

    def region(self, node: fx.Node, read: set[fx.Node]) -> set[fx.Node]:
        """What ``node`` is computed from behind the values that its replacement reads."""
        return self.schedule.ancestors(node, read, self._same_form)

    def of(self, p: Proof, read: set[fx.Node], region: set[fx.Node]) -> tuple[Assumption, ...]:
        """What a proved attention rests on, whose recipe reads these values and whose target this region computes.

        Raises:
            Refused: the decay has a base of which nothing can be assumed, or a value that is read is a rounded one.
        """
        return (*self._by_value(read, region, p.looked_at), *self._positive(p))

    def of_state(self, node: fx.Node, state: Expr, p: Proof) -> tuple[Assumption, ...]:
        """What the final state of a proved attention rests on beside the attention: factors that it alone reads.

        Raises:
            Refused: a value that is read is a rounded one.
        """
        read = {v.node for v in values_of(state)}
        return tuple(self._by_value(read, self.region(node, read), p.looked_at))

    def _same_form(self, copy: fx.Node, original: fx.Node) -> bool:
        """Whether a proof that went through the copy rests on nothing but what one through the original does."""
        known = self.interpreter.known
        return copy in known and original in known and known[copy].value == known[original].value

    def _by_value(self, read: set[fx.Node], region: set[fx.Node], looked_at: set[fx.Node]) -> Iterable[Assumption]:
        """Inputs that the normal form of this region, or the proof about it, knows the numbers of."""
        region = region.union(*self._beside(read, region))
        looked_at = looked_at.union(*(self.engine.relied.get(at, ()) for at in region))
        inputs = {n for n in region if n.op == "placeholder"}
        return self._of_numbers(read | inputs, looked_at)

    def _beside(self, read: set[fx.Node], region: set[fx.Node]) -> Iterable[set[fx.Node]]:
        """What makes values that are read the same as those that they are read in place of."""
        for one, other in self.doubles.among(read, region):
            if self.doubles.rounds_more(one, other):
                raise Refused(
                    "emission",
                    "a value of the traced graph",
                    "a factor that the program holds elsewhere, but rounded on its way",
                    Progress.RECIPE,
                )
            yield one | other

    def _of_numbers(self, read: Iterable[fx.Node], looked_at: Iterable[fx.Node]) -> Iterable[Assumption]:
        statics = self.interpreter.statics
        return () if statics is None else statics.assumptions(sorted(read), sorted(looked_at))

    # ----------------------------------------------------------------------------------------------- positive bases

    def _positive(self, p: Proof) -> Iterable[Assumption]:
        """log(x) in a weight is right only where x > 0."""
        leaves = self.engine.leaves
        others = [m for m, _ in (*p.fixed, *p.q_weights, *p.k_weights, *p.outer_weights)]
        others += [m for t in p.residual for m, _ in t.exp.lin]
        # The operator takes a decay of nothing: the state begins anew. As a factor elsewhere it might be a divisor.
        resets = {m[0][0] for m, c in p.tokens if len(m) == 1 and c > 0 and self._is_reset(m[0][0])}
        resets -= {leaf for mono in others for leaf, _ in mono}
        seen: set[int] = set()

        def visit(leaf: int) -> Iterable[Assumption]:
            kind, children = leaves[leaf].kind, leaves.made_of(leaf)
            if leaf in seen or not isinstance(kind, Symbol):
                return
            seen.add(leaf)
            if kind.op is aten.log.default and children:
                base = leaves[children[0]]
                yield from self._of_numbers((), base.rests_on)
                if base.interval[0] <= 0:
                    if leaf in resets:
                        return
                    yield from (_positive_base(leaves[n].kind) for n in leaves.positive_with(children[0]))
                    yield from (self._share(n) for n in leaves.shares_with(children[0]))
            for c in children:
                yield from visit(c)

        for mono in (*(m for m, _ in p.tokens), *others):
            for leaf, _ in mono:
                yield from visit(leaf)

    def _share(self, leaf: int) -> Assumption:
        """That an input, or what a cast makes of it, lies between 0 and 1."""
        kind = self.engine.leaves[leaf].kind
        if isinstance(kind, Symbol) and kind.op is aten._to_copy.default:
            return self._share(kind.args[0].leaf)
        if not isinstance(kind, Opaque) or kind.node is None or kind.node.op != "placeholder":
            raise Refused(
                "decay", "a positive base of the decay", "a mixture by shares that are not known", Progress.ADDENDS
            )
        return Assumption(kind.node, "share", f"0 <= {readable_name(kind.node)} <= 1 (it mixes decays)", _all_shares)

    def _is_reset(self, leaf: int) -> bool:
        kind = self.engine.leaves[leaf].kind
        return isinstance(kind, Symbol) and kind.op is aten.log.default and self.engine.leaves.truth(kind.args[0].leaf)


def _positive_base(kind: object) -> Assumption:
    """That an input is positive; of anything else nothing is known before the call."""
    if not isinstance(kind, Opaque) or kind.node is None or kind.node.op != "placeholder":
        raise Refused(
            "decay",
            "a positive base of the decay",
            "a computed base whose sign is not known",
            Progress.ADDENDS,
            "write the decay as exp of a log-decay, or bound it with sigmoid",
        )
    return Assumption(
        kind.node, "positive", f"{readable_name(kind.node)} > 0 (it is the base of a power)", _all_positive
    )


def _all_shares(tensor: torch.Tensor) -> bool:
    return bool(((tensor >= 0) & (tensor <= 1)).all())


def _all_positive(tensor: torch.Tensor) -> bool:
    """A weight is the exponential of sums of their logarithms, and nothing where a format has no number for it."""
    computed_in = torch.float64 if tensor.dtype is torch.float64 else torch.float32
    return bool((tensor >= torch.finfo(computed_in).tiny).all())

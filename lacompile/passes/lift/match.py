"""The search for decayed attentions among the values of a graph: each proved, and built at its earliest value."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import fx

from ..facts import DecayedAttention, Expr, Match, Progress, Refusal, attentions_of, values_of
from ..graph.schedule import Schedule
from .domain.affine import Aff
from .domain.term import value
from .interpret import Interpreter, Known
from .prove.causes import Causes
from .prove.fragments import HINT as CHUNKS
from .prove.fragments import is_fragment, is_part
from .prove.obligations import explain_missing, prove
from .prove.proof import Proof, Refused
from .prove.roles import sequence_index
from .prove.step import prove_step
from .prove.unrolled import state_alone, unrolled, weighed_apart
from .recipes.builder import Builder, Proved
from .recipes.holders import Holders
from .recipes.segments import prove_segments
from .recipes.states import final_states, looks_like_state
from .recipes.sums import prove_sum

MAX_STEPS_BACK = 24


def search(schedule: Schedule, interpreter: Interpreter, held: Holders) -> tuple[list[Match], list[Refusal]]:
    """Every decayed attention among the values that something opaque consumes, and the reasons for the others."""
    found = Search(interpreter, Builder(schedule, interpreter, held))
    for node in interpreter.demanded:
        if node not in found.done:
            found.look_at(interpreter.known[node])
    found.tell_elementwise()
    found.tell_unrolled()
    found.add_states_and_row_sums()
    matches = [replace(m, fitted=_fitted(schedule, interpreter, m)) for m in found.matches]
    inside = _inside(schedule, matches)
    return matches, sorted((r for r in found.refusals if r.node not in inside), key=lambda r: -r.progress)


@dataclass
class Walk:
    """What was met on the way back from one value that something opaque consumes."""

    elements: int
    """Of that value."""
    found: bool = False
    follows: bool = False
    """Whether the value is computed from an attention that was found before."""
    in_chunks: bool = False
    """Whether parts of a sum over chunks were met, each of which would be an attention by itself."""
    refused: list[Known] = field(default_factory=list)
    sums: list[Known] = field(default_factory=list)
    """Those refused as they are several sums."""
    best: Refusal | None = None
    """That which came nearest to an attention."""

    def refuse(self, known: Known, r: Refused) -> bool:
        """Notes that this value is none; whether what it is computed from may be: of a view, a cast, a factor."""
        self.refused.append(known)
        if r.obligation == "single-term":
            self.sums.append(known)
        refusal, size = _refusal(known.node, r), known.tensor.numel()
        if self.best is None or (refusal.progress > self.best.progress and size >= self.elements):
            self.best = refusal
        return r.progress > Progress.NO_SUM or size == self.elements

    def reason(self) -> Refusal | None:
        """What there is to say of the value; nothing where what it is computed from is an attention."""
        if self.best is None or self.found or (self.follows and self.best.progress > Progress.NAMED):
            return None
        if not self.in_chunks:
            return self.best
        return replace(self.best, hint=f"{self.best.hint}; {CHUNKS}" if self.best.hint else CHUNKS)


class Search:
    """What was found so far among the values of one graph."""

    def __init__(self, interpreter: Interpreter, builder: Builder) -> None:
        self.interpreter, self.engine, self.builder = interpreter, interpreter.engine, builder
        self.matches: list[Match] = []
        self.refusals: list[Refusal] = []
        self.done: set[fx.Node] = set()  # the targets of matches
        self._proofs: list[Proved] = []  # behind the matches
        self._causes = Causes(interpreter.engine)
        self._explained: set[int] = set()
        # what can be judged only when all attentions are known:
        self._states: list[Known] = []
        self._elementwise: list[Known] = []
        self._row_sums: list[Known] = []

    def look_at(self, known: Known) -> None:
        """One value that something opaque consumes, and those behind it."""
        if not self.engine.contracts(known.value):
            data = any(t.accs for c in known.value.cases for t in c.terms)
            (self._elementwise if data else self._row_sums).append(known)
        elif not looks_like_state(self.engine, known):
            self._walk_back(known, [known.node])
        elif steps := _steps_behind(self.interpreter, known.node):
            self._walk_back(known, steps)
        else:
            self._look_at_state(known)

    def _look_at_state(self, known: Known) -> None:
        self._states.append(known)
        if all(len(t.accs) < 2 for c in known.value.cases for t in c.terms):
            self._elementwise.append(known)
            return
        try:
            explain_missing(self.engine, known.value.terms, self._explained)
        except Refused as r:
            self._tell(known, _refusal(known.node, r))
        else:
            self._tell(known, None)

    def _walk_back(self, known: Known, begin: list[fx.Node]) -> None:
        """Takes the attentions behind a value, from these nodes on, or tells why there are none."""
        walk = self._attentions_behind(known, begin)
        if not walk.found:
            walk.found = self._take_several_sums(walk)
        if (reason := walk.reason()) is not None:
            self._tell(known, reason)

    def _attentions_behind(self, known: Known, begin: list[fx.Node]) -> Walk:
        walk, frontier, seen = Walk(known.tensor.numel()), list(begin), set[fx.Node]()
        while frontier and len(walk.refused) < MAX_STEPS_BACK:
            at = frontier.pop(0)
            walk.follows |= at in self.done
            if at in seen or at in self.done:
                continue
            seen.add(at)
            behind = self.interpreter.known.get(at)
            if behind is None or not self.engine.contracts(behind.value):
                continue
            try:
                proof = prove(self.engine, behind, self._explained)
                if self._is_part_of_refused(walk, proof):
                    walk.in_chunks = True
                    continue
                if any(n != proof.length for n in proof.lengths()) and self._take_several_sums(walk):
                    walk.found = True  # of sequences packed into one tensor this is one
                    break
                attention, replacement = self.builder.build(proof)
            except Refused as r:
                if walk.refuse(behind, r) or len(seen) == 1:
                    frontier += self.interpreter.sources(at)
                continue
            proof, attention, replacement = _closest(self.interpreter, self.builder, proof, attention, replacement)
            if proof.known.node in self.done:
                walk.follows = True
                continue
            self._take(proof.known, replacement, [(proof, attention)])
            walk.found = True  # and on to what is joined with it: one attention for each head
        return walk

    def _is_part_of_refused(self, walk: Walk, proof: Proof) -> bool:
        """Whether an attention is a chunk of a value that was refused on the way to it."""
        if walk.best is not None and walk.best.progress > Progress.NAMED and is_part(self.engine.space, proof):
            return True
        return is_fragment(self.engine, walk.refused, proof)

    def _take_several_sums(self, walk: Walk) -> bool:
        """Takes a value of several sums, if these are attentions that are added up, or that lie side by side."""
        for known in walk.sums:
            found = prove_sum(self.builder, known) or (None if walk.follows else prove_segments(self.builder, known))
            if found is not None:
                proofs, replacement = found
                self._take(known, replacement, proofs)
                return True
        return False

    def _take(self, known: Known, replacement: Expr, proofs: list[Proved]) -> None:
        self.matches.append(Match(known.node, replacement, attentions_of(replacement), known.after))
        self._proofs += proofs
        self.done.add(known.node)

    # ------------------------------------------------------------------------------- when all attentions are known

    def tell_elementwise(self) -> None:
        """Recurrences without a product; the normaliser's state of an attention that was found is none of its own."""
        data = self.engine.leaves.data
        rewritten = data(leaf for proof, _ in self._proofs for leaf in proof.leaves)
        for known in self._elementwise:
            if not rewritten & data(leaf for c in known.value.cases for t in c.terms for leaf in t.signature):
                self._tell(known, None)

    def tell_unrolled(self) -> None:
        """Where nothing was found or told of any value: whether all of them together are a loop, or one is its end."""
        if self.matches or self.refusals:
            return
        told = next(((s, r) for s in self._states if (r := self._causes.of_state(s.value.terms)) is not None), None)
        demanded = [self.interpreter.known[n] for n in self.interpreter.demanded]
        told = told or unrolled(self.engine, demanded) or weighed_apart(self.engine, demanded)
        told = told or next(((s, state_alone()) for s in self._states if self.engine.accumulates(s.value)), None)
        if told is not None:
            self.refusals.append(_refusal(told[0].node, told[1]))

    def add_states_and_row_sums(self) -> None:
        """The last states of attentions that were found, and the row sums beside them."""
        self.matches += final_states(self.builder, self._states, self._proofs)
        for known in self._row_sums if self.matches else ():
            if (found := _row_sum(self.interpreter, self.builder, known)) is not None:
                self.matches.append(found)

    def _tell(self, known: Known, best: Refusal | None) -> None:
        """Why this value, which is no attention, is none: its cause, told once for all values with its factors, or
        else the obligation that was found to fail.
        """
        near = best is not None and best.progress > Progress.NO_SUM
        for case in known.value.cases:
            if (cause := self._causes.of(case.terms, near)) is not None:
                self.refusals += [] if self._causes.told(case.terms) else [_refusal(known.node, cause)]
                return
        if best is not None and near:
            self.refusals.append(best)


def _row_sum(interpreter: Interpreter, builder: Builder, known: Known) -> Match | None:
    """The row sums of a decay's square, by which it is normalised: an attention of ones, that needs no square.

    No factor says where its index counts from: the normal form may count positions, or distances.
    """
    t = known.value.one
    if t is None or (found := sequence_index(interpreter.engine, t)) is None:
        return None
    j, i = found
    for counted in (t, t.sub(interpreter.engine.space, {j: Aff.var(i) - Aff.var(j)})):
        try:
            proof = prove(interpreter.engine, replace(known, value=value(known.value.shape, [counted])))
            attention, replacement = builder.build(proof)
        except Refused:
            continue
        if attention.formulation == "parallel":
            return Match(known.node, replacement, attentions_of(replacement), known.after)
    return None


def _fitted(schedule: Schedule, interpreter: Interpreter, m: Match) -> tuple[fx.Node, ...]:
    """The numbers that the normal form of this target was read off."""
    region = schedule.ancestors(m.target, {v.node for v in values_of(m.replacement)}) if interpreter.fitted else ()
    return tuple(n for n in interpreter.fitted if n in region)


def _inside(schedule: Schedule, matches: list[Match]) -> set[fx.Node]:
    """The values that nothing but the matches was computed from: what they are alone is no longer asked.

    The rewrite leaves nothing of these, nor of some that are written into place; but readings are compared before it.
    """
    found: set[fx.Node] = set()
    for m in matches:
        region = schedule.ancestors(m.target, {v.node for v in values_of(m.replacement)})
        found |= {n for n in region if n is not m.target and n.users.keys() <= region}
    return found


def _refusal(node: fx.Node, r: Refused) -> Refusal:
    return Refusal("match", r.obligation, node, r.expected, r.found, r.hint, r.progress)


def _steps_behind(interpreter: Interpreter, node: fx.Node) -> list[fx.Node]:
    """The decode steps that a value without positions is a view of, or a row-wise function; one for each head."""
    work, seen, steps = [node], set(), []
    while work and len(seen) < MAX_STEPS_BACK:
        at = work.pop(0)
        known = interpreter.known.get(at)
        if at in seen or known is None or not interpreter.engine.contracts(known.value) or not known.value.single:
            continue
        seen.add(at)
        if prove_step(interpreter.engine, known, known.value.terms) is not None:
            steps.append(at)
        else:
            work += interpreter.sources(at)
    return steps


def _closest(
    interpreter: Interpreter, builder: Builder, proof: Proof, attention: DecayedAttention, replacement: Expr
) -> tuple[Proof, DecayedAttention, Expr]:
    """The same attention at the earliest value that is it: before views, row factors and residuals.

    What it reads of a state that it starts from is none of these. Of several parts that are read of one, as the sums
    beside which a column of ones counts, it is the whole.
    """
    work = _tensors_behind(interpreter, proof.known.node)
    seen: set[fx.Node] = set()
    while work and len(seen) < MAX_STEPS_BACK:
        at = work.pop(0)
        known = interpreter.known.get(at)
        if at in seen or known is None or not interpreter.engine.contracts(known.value):
            continue
        seen.add(at)
        try:
            earlier = prove(interpreter.engine, known)
            of_one = earlier.size == proof.size and earlier.leaves <= proof.leaves
            same = of_one and (earlier.state is None) == (proof.state is None)
            if not same and not (_in_parts(interpreter, at) and builder.schedule.effects.alias(at, proof.known.node)):
                continue
            found, expr = builder.build(earlier)
        except Refused:
            continue
        proof, attention, replacement = earlier, found, expr
        work = _tensors_behind(interpreter, at)
    return proof, attention, replacement


def _tensors_behind(interpreter: Interpreter, node: fx.Node) -> list[fx.Node]:
    """What a node is computed from; of one result of several, what they are parts of."""
    return [n for x in node.all_input_nodes for n in ([x] if x in interpreter.known else x.all_input_nodes)]


def _in_parts(interpreter: Interpreter, node: fx.Node) -> bool:
    """Whether several nodes read it, or several of its parts."""
    return any(len(n.users) > 1 for n in (node, *(u for u in node.users if u not in interpreter.known)))

"""The search for decayed attentions among the values of a graph: each proved, and built at its earliest value."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from ..facts import DecayedAttention, Expr, Match, Refusal, attentions_of, values_of
from ..schedule import Schedule
from .domain.affine import Aff
from .domain.term import value
from .interpret import Fact, Interpreter
from .prove.causes import Causes
from .prove.fragments import HINT as CHUNKS
from .prove.fragments import is_fragment, is_part
from .prove.obligations import explain_missing, prove
from .prove.proof import Proof, Refused
from .prove.roles import sequence_index
from .prove.step import prove_step
from .prove.unrolled import unrolled
from .recipes.builder import Builder
from .recipes.holders import Holders
from .recipes.segments import prove_segments
from .recipes.states import final_states, looks_like_state
from .recipes.sums import prove_sum

MAX_STEPS_BACK = 24
EXPLAINED = 1  # progress of a refusal that names a tensor of the program, and not what became of the normal form


def search(schedule: Schedule, interpreter: Interpreter, held: Holders) -> tuple[list[Match], list[Refusal]]:
    """Every decayed attention among the values that something opaque consumes, and the reasons for the others."""
    builder = Builder(schedule, interpreter, held)
    matches: list[Match] = []
    refusals: list[Refusal] = []
    proofs: list[tuple[Proof, DecayedAttention]] = []
    done: set[fx.Node] = set()
    states: list[Fact] = []
    explained: set[int] = set()
    causes = Causes(interpreter.engine)
    elementwise: list[Fact] = []
    row_sums: list[Fact] = []
    for node in interpreter.demanded:
        fact = interpreter.facts[node]
        if node in done:
            continue
        if not interpreter.engine.contracts(fact.value):
            (elementwise if any(t.accs for c in fact.value.cases for t in c.terms) else row_sums).append(fact)
            continue
        best: Refusal | None = None
        found = False
        steps: list[fx.Node] = []
        if looks_like_state(interpreter.engine, fact):
            steps = _steps_behind(interpreter, node)
            if not steps:
                states.append(fact)
                if all(len(t.accs) < 2 for c in fact.value.cases for t in c.terms):
                    elementwise.append(fact)
                    continue
                try:
                    explain_missing(interpreter.engine, fact.value.terms, explained)
                except Refused as r:
                    best = _refusal(node, r)
                refusals += _told(causes, fact, best)
                continue
        frontier, seen, whole = steps or [node], set(), fact.tensor.numel()
        follows = False  # whether it is computed from an attention that was found
        missed = 0  # how often the value at hand was none
        sums: list[Fact] = []  # values of several sums, if none behind them is an attention
        refused: list[Fact] = []
        in_chunks = False
        while frontier and missed < MAX_STEPS_BACK:
            at = frontier.pop(0)
            follows |= at in done
            if at in seen or at in done:
                continue
            seen.add(at)
            fact = interpreter.facts.get(at)
            if fact is None or not interpreter.engine.contracts(fact.value):
                continue
            try:
                proof = prove(interpreter.engine, fact, explained)
                part = best is not None and best.progress >= 2 and is_part(interpreter.engine.space, proof)
                if part or is_fragment(interpreter.engine, refused, proof):
                    in_chunks = True
                    continue
                attention, replacement = builder.build(proof)
            except Refused as r:
                missed += 1
                refused.append(fact)
                if r.obligation == "single-term":
                    sums.append(fact)
                refusal = _refusal(at, r)
                size = fact.tensor.numel()
                if best is None or (refusal.progress > best.progress and size >= whole):
                    best = refusal
                if r.progress or len(seen) == 1 or size == whole:  # a view, a cast, a factor
                    frontier += interpreter.sources(at)
                continue
            proof, attention, replacement = _closest(interpreter, builder, proof, attention, replacement)
            at = proof.fact.node
            if at in done:
                follows = True
                continue
            matches.append(Match(at, replacement, attentions_of(replacement), proof.fact.after))
            proofs.append((proof, attention))
            done.add(at)  # and on to what is joined with it: one attention for each head
            found = True
        for fact in () if found else sums:
            several = prove_sum(builder, fact) or (None if follows else prove_segments(builder, fact))
            if several is not None:
                found, (summed, replacement) = True, several
                matches.append(Match(fact.node, replacement, attentions_of(replacement), fact.after))
                proofs += summed
                done.add(fact.node)
                break
        if best is not None and in_chunks:
            best = replace(best, hint=f"{best.hint}; {CHUNKS}" if best.hint else CHUNKS)
        if best is not None and not found and not (follows and best.progress > EXPLAINED):
            refusals += _told(causes, interpreter.facts[node], best)
    data = interpreter.engine.leaves.data
    rewritten = data(leaf for proof, _ in proofs for leaf in proof.leaves)
    for fact in elementwise:  # the normaliser's state of an attention that was found is no recurrence of its own
        if not rewritten & data(leaf for c in fact.value.cases for t in c.terms for leaf in t.signature):
            refusals += _told(causes, fact, None)
    if not matches and not refusals:
        told = unrolled(interpreter.engine, (interpreter.facts[n] for n in interpreter.demanded))
        refusals += [_refusal(told[0].node, told[1])] if told is not None else []
    matches += final_states(builder, states, proofs)
    matches += [m for fact in row_sums if matches and (m := _row_sum(interpreter, builder, fact)) is not None]
    matches = [replace(m, fitted=_fitted(schedule, interpreter, m)) for m in matches]
    inside = _inside(schedule, matches)
    return matches, sorted((r for r in refusals if r.node not in inside), key=lambda r: -r.progress)


def _row_sum(interpreter: Interpreter, builder: Builder, fact: Fact) -> Match | None:
    """The row sums of a decay's square, by which it is normalised: an attention of ones, that needs no square.

    No factor says where its index counts from: the normal form may count positions, or distances.
    """
    t = fact.value.one
    if t is None or (found := sequence_index(interpreter.engine, t)) is None:
        return None
    j, i = found
    for counted in (t, t.sub(interpreter.engine.space, {j: Aff.var(i) - Aff.var(j)})):
        try:
            proof = prove(interpreter.engine, replace(fact, value=value(fact.value.shape, [counted])))
            attention, replacement = builder.build(proof)
        except Refused:
            continue
        if attention.formulation == "parallel":
            return Match(fact.node, replacement, attentions_of(replacement), fact.after)
    return None


def _fitted(schedule: Schedule, interpreter: Interpreter, m: Match) -> tuple[fx.Node, ...]:
    """The numbers that the normal form of this target was read off."""
    region = schedule.ancestors(m.target, {v.node for v in values_of(m.replacement)}) if interpreter.fitted else ()
    return tuple(n for n in interpreter.fitted if n in region)


def _inside(schedule: Schedule, matches: list[Match]) -> set[fx.Node]:
    """The values that nothing but the matches was computed from: what they are alone is no longer asked."""
    found: set[fx.Node] = set()
    for m in matches:
        region = schedule.ancestors(m.target, {v.node for v in values_of(m.replacement)})
        found |= {n for n in region if n is not m.target and n.users.keys() <= region}
    return found


def _refusal(node: fx.Node, r: Refused) -> Refusal:
    return Refusal("match", r.obligation, node, r.expected, r.found, r.hint, r.progress)


def _told(causes: Causes, fact: Fact, best: Refusal | None) -> list[Refusal]:
    """Why this value, which is no attention, is none: its cause, told once for all values with its factors, or else
    the obligation that was found to fail.
    """
    near = best is not None and best.progress > 0
    for case in fact.value.cases:
        if (cause := causes.of(case.terms, near)) is not None:
            return [] if causes.told(case.terms) else [_refusal(fact.node, cause)]
    return [best] if best is not None and near else []


def _steps_behind(interpreter: Interpreter, node: fx.Node) -> list[fx.Node]:
    """The decode steps that a value without positions is a view of, or a row-wise function; one for each head."""
    work, seen, steps = [node], set(), []
    while work and len(seen) < MAX_STEPS_BACK:
        at = work.pop(0)
        fact = interpreter.facts.get(at)
        if at in seen or fact is None or not interpreter.engine.contracts(fact.value) or not fact.value.single:
            continue
        seen.add(at)
        if prove_step(interpreter.engine, fact, fact.value.terms) is not None:
            steps.append(at)
        else:
            work += interpreter.sources(at)
    return steps


def _closest(
    interpreter: Interpreter, builder: Builder, proof: Proof, attention: DecayedAttention, replacement: Expr
) -> tuple[Proof, DecayedAttention, Expr]:
    """The same attention at the earliest value that is it: before views, row factors and residuals.

    Of several parts that are read of one, as the sums beside which a column of ones counts, it is the whole.
    """
    work = _tensors_behind(interpreter, proof.fact.node)
    seen: set[fx.Node] = set()
    while work and len(seen) < MAX_STEPS_BACK:
        at = work.pop(0)
        fact = interpreter.facts.get(at)
        if at in seen or fact is None or not interpreter.engine.contracts(fact.value):
            continue
        seen.add(at)
        try:
            earlier = prove(interpreter.engine, fact)
            same = earlier.size == proof.size and earlier.leaves <= proof.leaves
            if not same and not (_in_parts(interpreter, at) and builder.schedule.effects.alias(at, proof.fact.node)):
                continue
            found, expr = builder.build(earlier)
        except Refused:
            continue
        proof, attention, replacement = earlier, found, expr
        work = _tensors_behind(interpreter, at)
    return proof, attention, replacement


def _tensors_behind(interpreter: Interpreter, node: fx.Node) -> list[fx.Node]:
    """What a node is computed from; of one result of several, what they are parts of."""
    return [n for x in node.all_input_nodes for n in ([x] if x in interpreter.facts else x.all_input_nodes)]


def _in_parts(interpreter: Interpreter, node: fx.Node) -> bool:
    """Whether several nodes read it, or several of its parts."""
    return any(len(n.users) > 1 for n in (node, *(u for u in node.users if u not in interpreter.facts)))

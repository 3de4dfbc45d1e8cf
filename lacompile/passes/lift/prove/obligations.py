"""Which values are decayed attentions: the obligations of docs/matching/proof.md, checked on the normal form.

Every obligation that fails is a :class:`~lacompile.passes.facts.Refusal` naming it. Their ids, in the order checked:

    one-case       the value is one sum, not a piecewise mask
    causal-range   one sequence index j, running over 0 <= j <= i and nothing else
    whole-features feature indices are summed in full
    separable      no leaf holds both i and j, none both kinds of feature
    decay          the weight is exp(G_i - G_j) with G from head- or token-wise scalars
    unit-diagonal  the prefix sums of the weight end at the row and at the key
    single-term    nothing else is added, but an initial state and a residual without a sum
    recurrence     keys and values are not computed from the state (found where another fails, see causes.py)
    bounded-weights  a weight of the keys does not overflow where the program's own weight is finite
    emission       every factor can be read off a value of the graph
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from ...facts import Progress
from ...names import readable_name
from ..domain.affine import ONE, Aff
from ..domain.exponent import Access
from ..domain.kinds import WITHOUT_GRADIENTS, Opaque, Symbol, Table
from ..domain.prefix import counted_from
from ..domain.term import Term
from ..engine import Engine, GiveUp
from ..interpret import Known
from .addends import Addends
from .backwards import from_the_end
from .chunked import joined
from .features import factors_apart
from .flattened import apart
from .proof import Proof, Refused
from .roles import sequence_index
from .step import prove_step


def prove(engine: Engine, known: Known, explained: set[int] | None = None, *, queries: bool = True) -> Proof:
    """The decayed attention that this value is; without ``queries`` also a decayed sum, whose queries and keys are 1.

    Raises:
        Refused: an obligation does not hold.
    """
    if not known.value.single:
        raise Refused("one-case", "one sum", f"{len(known.value.cases)} disjoint regions", Progress.NO_SUM)
    terms = [_sizes_as_numbers(engine, _from_their_starts(engine, t)) for t in known.value.terms]
    if not any(sequence_index(engine, t) for t in terms) and (step := prove_step(engine, known, terms)) is not None:
        return step
    main = _main_term(engine, terms, set() if explained is None else explained)
    positions = sequence_index(engine, main)
    assert positions is not None
    split = [factors_apart(engine, t, known.value.shape, positions) for t in terms]
    terms, main = split, split[terms.index(main)]
    if (rows := joined(engine, known, main)) is not None:
        inner = prove(engine, rows[0], explained, queries=queries)
        return replace(inner, chunked=(*inner.chunked, rows[1]))
    if (turned := from_the_end(engine, known, main)) is not None:
        inner = prove(engine, turned[0], explained, queries=queries)
        return replace(inner, backwards=turned[1])
    proving = Addends(engine, known, main)
    proving.check_ranges()
    proving.assign_roles()
    if proving.e is None and (split := apart(engine, known, main, proving.n)) is not None:
        inner = prove(engine, split[0], explained, queries=queries)
        return replace(inner, flattened=(*inner.flattened, split[1]))
    proving.sort_factors()
    proving.sort_weights()
    proving.check_decays()
    if queries:
        proving.check_operands()
    proving.check_finite()
    for t in terms:
        if t is not main:
            proving.other_term(t)
    return proving.proof


def _from_their_starts(engine: Engine, t: Term) -> Term:
    """Indices count from where their ranges begin, if how far these reach does not depend on it: over a window of
    constant length, k[.., 48 h + d], or over the rows of one sequence among those of all, k[n b + j].
    """
    for v in sorted(t.bound(engine.space)):
        ends = engine.bounds(v, t.guards).ends
        if ends is None or ends[0].is_const:
            continue
        low, high = ends
        if engine.space.is_size(high - low):
            t = t.sub(engine.space, {v: Aff.var(v) + low})
        elif not engine.space.is_size(low) and engine.space.vars(high - low).isdisjoint(engine.space.vars(low)):
            moved = counted_from(engine.space, t, low, [v])
            if all(_from_zero_on(engine, pos, low) for (_, pos), _ in moved.exp.sums):
                t = moved
    return t


def _from_zero_on(engine: Engine, pos: Aff, low: Aff) -> bool:
    """Whether a position counted from ``low`` is never before it, and holds nothing more that ``low`` depends on."""
    apart = engine.space.vars(pos).isdisjoint(engine.space.vars(low))
    return apart and pos.const >= 0 and all(c > 0 for _, c in pos.terms)


def _sizes_as_numbers(engine: Engine, t: Term) -> Term:
    """A size that a sum is multiplied by is one number for all of it, like a coefficient, and no position."""
    size = None if t.poly.is_const else engine.symints.get(t.poly)
    with suppress(GiveUp):
        return t if size is None else t.but(poly=ONE, accs=tuple(sorted((*t.accs, engine.scalar(size)))))
    return t


def _main_term(engine: Engine, terms: Sequence[Term], explained: set[int]) -> Term:
    """The term with a sum over earlier positions; ``explained`` collects culprits that need no second word."""
    found = [t for t in terms if sequence_index(engine, t) is not None]
    if len(found) == 1:
        return found[0]
    if found and _detached_apart(engine, terms):
        raise Refused(
            "single-term",
            "one sum over j <= i",
            f"{len(found)} sums, of which some are detached from what others are made of",
            Progress.MERGE,
            "no gradient flows through a detached state, and one does through the tokens added since",
        )
    if found:
        alike = len({t.signature for t in found}) < len(found)
        raise Refused(
            "single-term",
            "one sum over j <= i",
            f"{len(found)} sums that do not merge",
            Progress.MERGE,
            "pieces of a loop merge only if their weights agree exactly at the borders"
            if alike
            else "no two of them have the same factors, as where a query, a key or a value is a sum itself",
        )
    explain_missing(engine, terms, explained)
    raise Refused("causal-range", "a sum over j <= i", "no sum whose range ends at a position", Progress.NO_SUM)


def _detached_apart(engine: Engine, terms: Sequence[Term]) -> bool:
    """Whether a sum holds a tensor detached that another one holds as it is, as where a loop detaches its state."""
    held = [set(t.signature) for t in terms]
    apart = ({n for leaf in mine if _is_detached(engine, leaf) for n in engine.leaves.made_of(leaf)} for mine in held)
    return any(inner & others - mine for mine, inner in zip(held, apart, strict=True) for others in held)


def _is_detached(engine: Engine, leaf: int) -> bool:
    kind = engine.leaves[leaf].kind
    return isinstance(kind, Symbol) and kind.op is torch.ops.aten.detach.default


def explain_missing(engine: Engine, terms: Sequence[Term], explained: set[int]) -> None:
    """Weights over earlier positions that the lift could not look into: W[.., i, j] times v[.., j, e].

    Each such tensor is explained once: what follows it in the program holds it too.
    """
    for t in terms:
        held = [(a, engine.space.vars_of(a[1])) for a in (*t.accs, *(a for mono, _ in t.exp.lin for a in mono))]
        for v in sorted(t.bound(engine.space)):
            holders = [(a, mine) for a, mine in held if v in mine]
            for (leaf, idx), mine in holders if len(holders) > 1 else ():
                sizes = engine.leaf_shapes[leaf]
                summed = [n for n, i in enumerate(idx) if i == Aff.var(v)]
                square = [
                    n
                    for n, i in enumerate(idx)
                    if n not in summed and i.terms and summed and sizes[n] == sizes[summed[0]]
                ]
                beside = [
                    (a, theirs) for a, theirs in holders if a[0] != leaf and not engine.projects_by(a, (leaf, idx))
                ]
                features = {x for _, theirs in beside for x in theirs if x >= 0} - mine
                if not square or not features or _given(engine, leaf) or leaf in explained:
                    continue
                explained.add(leaf)
                rows = {x for n in square for x, _ in idx[n].terms}
                label = _label(engine, leaf, [a for a, theirs in holders if rows <= theirs]).lstrip("_")
                hints = {
                    "softmax": "softmax and other functions of the scores are not decayed linear attention",
                    WITHOUT_GRADIENTS: "from what requires one: compute it of x.detach() outside of no_grad() instead",
                }
                raise Refused(
                    "separable",
                    "weights exp(G_i - G_j) that are visible in the graph",
                    f"a tensor that holds both positions ({label})",
                    Progress.NAMED,
                    next((h for part, h in hints.items() if part in label), "of what computes it no more is known"),
                )


def _label(engine: Engine, leaf: int, weights: Sequence[Access]) -> str:
    """What a tensor over pairs of positions is called; of scores that are known, what they are weighted by is meant."""
    kind = engine.leaves[leaf].kind
    if isinstance(kind, Opaque) and kind.reading is not None:
        kind = next((engine.leaves[w].kind for w, _ in weights if w != leaf), kind)
    if not isinstance(kind, Opaque):
        return "a function"
    return readable_name(kind.node) if kind.node is not None and kind.node.op == "placeholder" else kind.label


def _given(engine: Engine, leaf: int) -> bool:
    """Numbers, an input, or something made of these or of parameters alone: no function of the scores."""
    kind = engine.leaves[leaf].kind
    if isinstance(kind, Opaque):
        return engine.of_parameters(leaf) or (kind.node is not None and kind.node.op == "placeholder")
    made_of = engine.leaves.made_of(leaf)
    return isinstance(kind, Table) or (bool(made_of) and all(_given(engine, x) for x in made_of))

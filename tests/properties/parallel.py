"""The quadratic form: all pairs of positions at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .decays import Decay, causal, distances, positions, weights
from .fact import Fact
from .source import T, Writer

Written = tuple[T, T | None]


@dataclass(frozen=True)
class Form:
    """A formulation: which facts it can compute, and how it is written."""

    fits: Callable[[Fact], bool]
    write: Callable[[Writer, Fact, T, T, T, Decay, T | None], Written]


def scaled(w: Writer, fact: Fact, t: T) -> T:
    """``t`` times the scale of the scores."""
    s = fact.scale
    if s == 1:
        return t
    return w.let(t.name.rstrip("_0123456789"), w.pick([f"{t} * {s!r}", f"{s!r} * {t}", f"{t} / {1 / s!r}"]), t.dims)


def pairs(w: Writer, fact: Fact, q: T, k: T, v: T, decay: Decay, state: T | None) -> Written:
    n = w.pick([str(fact.length), f"{q}.shape[{q.at('n')}]"])
    where = w.pick(["q", "scores", "out"])
    if where == "q" or state is not None:
        q, where = scaled(w, fact, q), "q"
    final = last_state(w, decay, k, v, state, n) if fact.final else None
    k, v = k.like("n", "m"), v.like("n", "m")
    keep = w.union(q, v).replace("m", "").replace("d", "")
    if where == "scores" or w.pick.flip():
        scores = w.contract(q, k, w.union(q, k).replace("d", ""), "scores")
        if where == "scores":
            scores = scaled(w, fact, scores)
        out = _weighted(w, scores, v, keep, decay, n)
    elif decay.held is not None and not decay.per_token and w.pick.flip(4):
        out = _split_exponentials(w, q, k, v, keep, decay, n)
    else:
        out = w.product([q, k, weights(w, decay, n, "n", "m"), v], keep, "out")
    if state is not None:
        inter = w.contract(_from_start(w, decay, q, n), state, keep, "before")
        out = w.add(out, inter, "out")
    return (scaled(w, fact, out) if where == "out" else out), final


def _from_start(w: Writer, decay: Decay, q: T, n: str) -> T:
    """Queries times exp(G_i)."""
    if decay.held is None:
        return q
    if decay.per_token:
        g = decay.log()
        return w.times(q, w.let("decayed", f"{g}.cumsum({g.at('n')}).exp()", g.dims), "q")
    i = positions(w, n, "n")
    return w.times(q, decay.power(w.let("steps", w.pick([f"{i} + 1", f"1 + {i}"]), "n")), "q")


def last_state(w: Writer, decay: Decay, k: T, v: T, state: T | None, n: str) -> T:
    """The state after the last position: every key by what is left of it."""
    keep = w.union(k, v).replace("n", "")
    whole = None
    if decay.per_token:
        g = decay.log()
        run = w.let("run", f"{g}.cumsum({g.at('n')})", g.dims)
        total = w.let("total", w.part(run, "n", "-1"), g.dims.replace("n", ""))
        k = w.times(k, w.let("left", f"({w.spread(total, run.dims)} - {run}).exp()", run.dims), "k")
        whole = w.let("whole", f"{total}.exp()", total.dims) if state else None
    elif decay.held is not None:
        i = positions(w, n, "n")
        k = w.times(k, decay.power(w.let("steps", w.pick([f"{n} - 1 - {i}", f"({n} - 1) - {i}"]), "n")), "k")
        whole = decay.power(T(n, number=True)) if state else None
    final = w.contract(k, v, keep, "final")
    if state is None:
        return final
    return w.add(final, state if whole is None else w.times(state, whole, "old"), "final")


def _weighted(w: Writer, scores: T, v: T, keep: str, decay: Decay, n: str) -> T:
    if decay.held is None and w.pick.flip():
        tail = scores.dims.replace("n", "").replace("m", "") + "nm"
        scores = w.to(scores, tail)
        style = w.pick(["tril", "fill", "fill_", "times", "rows"])
        if style == "fill_":
            scores = w.let("scores", f"{scores}.clone()", tail)
            w.line(f"{scores}.masked_fill_(~{causal(w, distances(w, n, 'n', 'm'), n)}, 0)")
        elif style == "rows":
            scores = w.let("scores", f"{scores}.clone()", tail)
            w.line(f"for row in range({n}):")
            w.line(f"    {scores}[..., row, row + 1 :] = 0")
        else:
            d = distances(w, n, "n", "m")
            text = {"tril": f"{scores}.tril()", "times": f"{scores} * {causal(w, d, n)}"}.get(
                style, f"{scores}.masked_fill({d} < 0, 0.0)"
            )
            scores = w.let("scores", text, tail)
    else:
        scores = w.times(scores, weights(w, decay, n, "n", "m"), "scores")
    return w.contract(scores, v, keep, "out")


def _split_exponentials(w: Writer, q: T, k: T, v: T, keep: str, decay: Decay, n: str) -> T:
    """exp(g i) on the queries, exp(-g j) on the keys, and a mask."""
    i = positions(w, n, "n")
    q = w.times(q, decay.power(i), "q")
    k = w.times(k, decay.power(w.let("back", f"-{i}", "m")), "k")
    scores = w.contract(q, k, w.union(q, k).replace("d", ""), "scores")
    scores = w.to(scores, scores.dims.replace("n", "").replace("m", "") + "nm")
    scores = w.let("scores", w.pick([f"{scores}.tril()", f"torch.tril({scores})"]), scores.dims)
    return w.contract(scores, v, keep, "out")


FORM = Form(lambda f: True, pairs)

"""All chunks at once: a dimension of chunks, pairs inside each, and a recurrence over their states."""

from __future__ import annotations

from dataclasses import replace

from .decays import Decay, positions, weights
from .fact import Fact
from .parallel import Form, Written, scaled
from .source import T, Writer, stem


def chunked(w: Writer, fact: Fact, q: T, k: T, v: T, decay: Decay, state: T | None) -> Written:
    size = w.pick([4, 2, 3, 5])
    ragged = fact.length % size
    pad = (-fact.length) % size
    count = (fact.length + pad) // size
    w.sizes |= {"c": str(count), "r": str(size)}
    q = scaled(w, fact, q)
    if ragged:
        q, k, v = (_padded(w, x, pad) for x in (q, k, v))
        if decay.per_token:
            decay = replace(decay, held=_padded(w, decay.log(), pad), is_log=True)
    qc, kc, vc = (_split(w, x, count, size) for x in (q, k, v))
    last = fact.length - (count - 1) * size  # tokens of the last chunk
    if decay.per_token:
        g = _split(w, decay.log(), count, size)
        run = w.let("run", f"{g}.cumsum({g.at('r')})", g.dims)
        total = w.let("total", w.part(run, "r", "-1"), run.dims.replace("r", ""))
        qd: T | None = w.let("q_decay", f"{run}.exp()", run.dims)
        kd: T | None = w.let("k_decay", f"({w.spread(total, run.dims)} - {run}).exp()", run.dims)
        weight = weights(w, replace(decay, held=g.like("r", "n"), is_log=True), str(size), "r", "s")
    else:
        total = qd = kd = None
        weight = weights(w, decay, str(size), "r", "s")
        if decay.held is not None:
            i = positions(w, str(size), "r")
            qd = decay.power(w.let("steps", f"{i} + 1", "r"))
            kd = decay.power(w.let("steps", f"{size - 1} - {i}", "r"))
    inner = _inner(w, qc, kc, vc, weight)
    states = w.contract(w.times(kc, kd, "kd") if kd else kc, vc, w.union(kc, vc).replace("r", ""), "states")
    before, final = _between(w, fact, states, decay, total, size, count, last, state)
    inter = w.contract(w.times(qc, qd, "qd") if qd else qc, before, w.union(qc, vc).replace("d", ""), "inter")
    return _joined(w, fact, w.add(inner, inter, "out"), count, size, bool(ragged)), final


def _padded(w: Writer, t: T, pad: int) -> T:
    behind = len(t.dims) - 1 - t.at("n")
    zeros = ", ".join(str(pad) if x == "n" else f"{t}.shape[{n}]" for n, x in enumerate(t.dims))
    text = w.pick(
        [
            f"F.pad({t}, ({'0, 0, ' * behind}0, {pad}))",
            f"torch.cat([{t}, {t}.new_zeros({zeros})], {t.at('n')})",
        ]
    )
    return w.let(stem(t), text, t.dims)


def _split(w: Writer, t: T, count: int, size: int) -> T:
    at = t.at("n")
    sizes = [f"{t}.shape[{n}]" for n in range(len(t.dims))]
    sizes[at : at + 1] = [str(count), str(size)]
    text = w.pick(
        [
            f"{t}.unflatten({at}, ({count}, {size}))",
            f"{t}.reshape({', '.join(sizes)})",
            f"{t}.unflatten({at}, (-1, {size}))",
        ]
    )
    made = w.let(stem(t) + "c", text, t.dims.replace("n", "cr"))
    if w.pick.flip(4):
        made = w.to(made, made.dims.replace("c", "").replace("r", "cr") if made.dims[-2:] != "cr" else made.dims)
    return made


def _joined(w: Writer, fact: Fact, o: T, count: int, size: int, ragged: bool) -> T:
    lead = o.dims.replace("c", "").replace("r", "").replace("e", "")
    shape = w.pick([lead + "cre", lead[0] + "cr" + lead[1:] + "e"])
    o = w.to(o, shape)
    at = o.at("c")
    sizes = [w.sizes[x] for x in o.dims]
    sizes[at : at + 2] = [str(count * size)]
    dims = o.dims.replace("cr", "n")
    o = w.let("out", w.pick([f"{o}.flatten({at}, {at + 1})", f"{o}.reshape({', '.join(sizes)})"]), dims)
    return w.let("out", w.part(o, "n", f": {fact.length}"), dims) if ragged else o


def _inner(w: Writer, qc: T, kc: T, vc: T, weight: T) -> T:
    keys, values = kc.like("r", "s"), vc.like("r", "s")
    keep = w.union(qc, vc).replace("d", "")
    if w.pick.flip(3):
        return w.product([qc, keys, weight, values], keep, "inner")
    scores = w.contract(qc, keys, w.union(qc, keys).replace("d", ""), "scores")
    return w.contract(w.times(scores, weight, "scores"), values, keep, "inner")


# ------------------------------------------------------------------------------------------------- between the chunks


def _between(
    w: Writer, fact: Fact, states: T, decay: Decay, total: T | None, size: int, count: int, last: int, state: T | None
) -> tuple[T, T | None]:
    """The state before each chunk, and the one after the last.

    A padded tail decays by nothing where the decay per token is padded with zeros; a fixed decay goes on, so a program
    with a ragged tail and a final state carries it in a loop.
    """
    styles = ["loop"]
    if total is not None or last == size or not fact.final:
        styles.append("matrix")
        if decay.held is None:
            styles.append("sum")
    style = w.pick(styles)
    if style == "loop":
        return _by_loop(w, fact, states, decay, total, size, count, last, state)
    if style == "sum":
        return _by_sum(w, fact, states, state)
    return _by_matrix(w, fact, states, decay, total, size, count, state)


def _by_loop(
    w: Writer, fact: Fact, states: T, decay: Decay, total: T | None, size: int, count: int, last: int, state: T | None
) -> tuple[T, T]:
    dims = states.dims.replace("c", "")
    current = w.let("state", state.name, state.dims) if state else w.zeros(dims, states)
    current = w.to(current, dims)
    current = w.let("carried", current.name, dims)
    block = decay.power(T(str(size), number=True)) if total is None and decay.held is not None else None
    name = w.fresh("before")
    w.line(f"{name} = []")
    w.line(f"for c in range({count}):")
    w.indent(1)
    w.line(f"{name}.append({current})")
    if total is not None:
        at = w.select(total, "c", "c", "total")
        block = w.let("block", f"{at}.exp()", at.dims)
    kept = w.times(current, block, "kept") if block else current
    new = w.add(kept, w.select(states, "c", "c", "update"), "new")
    w.line(f"{current} = {w.ordered(new, dims)}")
    w.indent(-1)
    at = w.pick([len(dims) - 2, 1])
    before = w.let("before", f"torch.stack({name}, {at})", dims[:at] + "c" + dims[at:])
    if fact.final and block is not None and total is None and last != size:
        # what the padding decayed too much
        current = w.times(current, decay.power(T(str(last - size), number=True)), "final")
    return before, current


def _by_sum(w: Writer, fact: Fact, states: T, state: T | None) -> tuple[T, T | None]:
    """Without a decay: a running sum, less the chunk's own."""
    at = states.at("c")
    run = w.let("run", f"{states}.cumsum({at})", states.dims)
    final = w.let("final", w.part(run, "c", "-1"), run.dims.replace("c", "")) if fact.final else None
    before = w.let("before", f"{run} - {states}", run.dims)
    if state is not None:
        before = w.let("before", f"{before} + {w.spread(state, before.dims)}", before.dims)
        final = w.add(final, state, "final") if final else None
    return before, final


def _by_matrix(
    w: Writer, fact: Fact, states: T, decay: Decay, total: T | None, size: int, count: int, state: T | None
) -> tuple[T, T | None]:
    """A matrix of decays between chunks, with a row for the state after the last and a column for the initial one."""
    dims = states.dims
    at = states.at("c")
    first = w.let("first", f"{w.spread(w.to(state, dims.replace('c', '')), dims)}", dims) if state else None
    if first is None or "None" not in first.name:
        zero = f"torch.zeros_like({w.part(states, 'c', ':1')})"
        text = zero if first is None else first.name
        states = w.let("states", f"torch.cat([{text}, {states}], {at})", dims)
    steps = str(count + 1)
    if total is not None:
        lead = total.dims.replace("c", "")
        t = w.to(total, lead + "c")
        t = w.let("total", f"F.pad({t}, (1, 0))", t.dims)
        chunks = replace(decay, held=t.like("c", "n"), is_log=True)
        weight = weights(w, chunks, steps, "c", "z")
    elif decay.held is None:
        weight = weights(w, decay, steps, "c", "z")
    else:
        slow = replace(decay, held=decay.power(T(str(size), number=True)), is_log=False)
        weight = weights(w, slow, steps, "c", "z")
    made = w.contract(weight, states.like("c", "z"), w.union(weight, states).replace("z", ""), "states")
    before = w.let("before", w.part(made, "c", ":-1"), made.dims)
    return before, (w.let("final", w.part(made, "c", "-1"), made.dims.replace("c", "")) if fact.final else None)


FORM = Form(lambda f: True, chunked)

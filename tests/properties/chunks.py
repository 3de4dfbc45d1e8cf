"""The loop over chunks: pairs inside each, a state between them."""

from __future__ import annotations

from dataclasses import replace

from .decays import Decay, positions, weights
from .fact import Fact
from .parallel import Form, Written, scaled
from .source import T, Writer, stem


def loop(w: Writer, fact: Fact, q: T, k: T, v: T, decay: Decay, state: T | None) -> Written:
    n, size = fact.length, w.pick([4, 3, 2, 5])
    where = w.pick(["q", "out"])
    q = scaled(w, fact, q) if where == "q" else q
    features = w.union(q, v).replace("n", "")
    if state is None:
        state = w.zeros("".join(x for x in w.pick((features, features[:-2] + features[:-3:-1]))), q)
    lead = features[:-2]
    shape = w.pick([lead + "ne", *([lead[0] + "n" + lead[1:] + "e"] if lead else [])])
    out = _container(w, shape, v)
    steps = _Steps(w, decay, size)
    current = w.let("state", state.name if not w.pick.flip(4) else f"{state}.float()", state.dims)
    qc, kc, vc, gc, m = _open(w, n, size, q, k, v, decay)
    qd, kd, block, weight = steps.of_chunk(gc, m)
    inter = w.contract(w.times(qc, qd, "qd") if qd else qc, current, w.union(qc, vc).replace("d", ""), "inter")
    inner = _inner(w, qc, kc, vc, weight)
    o = w.add(inner, inter, "o")
    o = scaled(w, fact, o) if where == "out" else o
    o = w.to(o, shape.replace("n", "r"))
    if isinstance(out, T):
        w.line(f"{w.part(out, 'n', f'start : start + {m}')} = {o}")
    else:
        w.line(f"{out}.append({o})")
    update = w.contract(w.times(kc, kd, "kd") if kd else kc, vc, w.union(kc, vc).replace("r", ""), "update")
    kept = w.times(current, block, "kept") if block else current
    new = w.add(kept, update, "new")
    w.line(f"{current} = {w.ordered(new, current.dims)}")
    if "running start" in w.sizes:
        w.line(f"start += {m}")
    w.indent(-1)
    if not isinstance(out, T):
        out = w.let("out", f"torch.cat({out}, {shape.index('n')})", shape)
    return out, current


def _container(w: Writer, shape: str, v: T) -> T | str:
    """A list for the pieces, or a tensor that they are written into."""
    if w.pick.flip(3):
        sizes = ", ".join(w.sizes[x] for x in shape)
        made = [f"torch.empty({sizes})", f"torch.zeros({sizes})", f"{v}.new_empty({sizes})"]
        if v.dims == shape:
            made.append(f"torch.empty_like({v})")
        return w.let("out", w.pick(made), shape)
    name = w.fresh("outs")
    w.line(f"{name} = []")
    return name


def _open(w: Writer, n: int, size: int, q: T, k: T, v: T, decay: Decay) -> tuple[T, T, T, T | None, str]:
    """The head of the loop, and the chunks: dimensions n become r."""
    ts = [q, k, v] + ([decay.held] if decay.per_token and decay.held else [])
    names = [w.fresh(stem(t).replace("self.", "") + "c") for t in ts]
    style = w.pick(["slice", "count", "split", "narrow"])
    if style == "split":
        parts = ", ".join(f"{t}.split({size}, {t.at('n')})" for t in ts)
        w.line("start = 0")
        w.line(f"for {', '.join(names)} in zip({parts}):")
        w.indent(1)
        m = w.let("m", f"{names[0]}.shape[{q.at('n')}]", number=True).name
        made = [T(x, t.dims.replace("n", "r")) for x, t in zip(names, ts, strict=True)]
        w.sizes["running start"] = m
    else:
        if style == "count":
            w.line(f"for c in range({-(-n // size)}):")
            w.indent(1)
            w.line(f"start = c * {size}")
        else:
            w.line(f"for start in range(0, {n}, {size}):")
            w.indent(1)
        m = w.let("m", f"min({size}, {n} - start)", number=True).name
        made = []
        for name, t in zip(names, ts, strict=True):
            text = (
                f"{t}.narrow({t.at('n')}, start, {m})" if style == "narrow" else w.part(t, "n", f"start : start + {m}")
            )
            w.line(f"{name} = {text}")
            made.append(T(name, t.dims.replace("n", "r")))
    return made[0], made[1], made[2], made[3] if len(made) > 3 else None, m


def _inner(w: Writer, qc: T, kc: T, vc: T, weight: T) -> T:
    keys, values = kc.like("r", "s"), vc.like("r", "s")
    keep = w.union(qc, vc).replace("d", "")
    if w.pick.flip(3):
        return w.product([qc, keys, weight, values], keep, "inner")
    scores = w.contract(qc, keys, w.union(qc, keys).replace("d", ""), "scores")
    return w.contract(w.times(scores, weight, "scores"), values, keep, "inner")


class _Steps:
    """The decays of a chunk: of its queries since its start, of its keys to its end, and of the whole."""

    def __init__(self, w: Writer, decay: Decay, size: int):
        self.w, self.decay, self.size = w, decay, size
        self.early = w.pick.flip(3) and not decay.per_token
        if self.early:
            self.made = self._fixed(str(size))

    def of_chunk(self, gc: T | None, m: str) -> tuple[T | None, T | None, T | None, T]:
        w = self.w
        if gc is not None:
            return self._per_token(gc, m)
        if not self.early:
            return self._fixed(m)
        qd, kd, block, weight = self.made
        cut = w.let("weight", f"{weight}[..., :{m}, :{m}]", weight.dims)
        if qd is None or kd is None or block is None:
            return None, None, None, cut
        # The last chunk may be short: its queries start at the start, its keys end at the end.
        qd = w.let("q_decay", w.part(qd, "r", f": {m}"), qd.dims)
        kd = w.let("k_decay", w.part(kd, "r", f"{self.size} - {m} :"), kd.dims)
        return qd, kd, self.decay.power(T(m, number=True)), cut

    def _fixed(self, m: str) -> tuple[T | None, T | None, T | None, T]:
        w, decay = self.w, self.decay
        weight = weights(w, decay, m, "r", "s")
        if decay.held is None:
            return None, None, None, weight
        i = positions(w, m, "r")
        qd = decay.power(w.let("steps", f"{i} + 1", "r"))
        kd = decay.power(w.let("steps", w.pick([f"{m} - 1 - {i}", f"{m} - (1 + {i})", f"{i}.flip(0)"]), "r"))
        return qd, kd, decay.power(T(m, number=True)), weight

    def _per_token(self, gc: T, m: str) -> tuple[T, T, T, T]:
        w = self.w
        decay = replace(self.decay, held=gc)
        weight = weights(w, replace(decay, held=decay.held.like("r", "n")), m, "r", "s")
        g = decay.log()
        run = w.let("run", f"{g}.cumsum({g.at('r')})", g.dims)
        total = w.let("total", w.part(run, "r", "-1"), g.dims.replace("r", ""))
        qd = w.let("q_decay", w.pick([f"{run}.exp()", f"torch.exp({run})"]), run.dims)
        kd = w.let("k_decay", f"torch.exp({w.spread(total, run.dims)} - {run})", run.dims)
        return qd, kd, w.let("block", f"{total}.exp()", total.dims), weight


FORM = Form(lambda f: True, loop)

"""The recurrence, token by token, and running sums of outer products."""

from __future__ import annotations

from .chunks import _container
from .decays import Decay, positions
from .fact import Fact
from .parallel import Form, Written, scaled
from .source import T, Writer, stem


def loop(w: Writer, fact: Fact, q: T, k: T, v: T, decay: Decay, state: T | None) -> Written:
    where = w.pick(["q", "out", "token"])
    q = scaled(w, fact, q) if where == "q" else q
    features = w.union(q, v).replace("n", "")
    lead = features[:-2]
    if state is None:
        state = w.zeros(w.pick((features, lead + "ed")), q)
    out = _container(w, w.pick([lead + "ne", *([lead[0] + "n" + lead[1:] + "e"] if lead else [])]), v)
    current = w.let("state", state.name, state.dims)
    early = decay.factor() if not decay.per_token and decay.held is not None and w.pick.flip() else None
    qt, kt, vt, gt = _open(w, fact, q, k, v, decay)
    gamma = early
    if gamma is None and decay.held is not None:
        at = Decay(w, gt or decay.held, decay.is_log, False, decay.negative)
        gamma = at.factor()
    update = w.contract(kt, vt, w.union(kt, vt), "update")
    if w.pick.flip(4):
        # the output first: q (gamma S + k v) = (gamma q) S + (q k) v
        late = w.times(qt, gamma, "qt") if gamma else qt
        old = w.contract(late, current, w.union(late, current).replace("d", ""), "old")
        score = w.contract(qt, kt, w.union(qt, kt).replace("d", ""), "score")
        o = w.add(old, w.times(score, vt, "now"), "o")
        new = w.add(w.times(current, gamma, "kept") if gamma else current, update, "new")
        w.line(f"{current} = {w.ordered(new, current.dims)}")
    else:
        new = w.add(w.times(current, gamma, "kept") if gamma else current, update, "new")
        w.line(f"{current} = {w.ordered(new, current.dims)}")
        o = w.contract(qt, current, w.union(qt, current).replace("d", ""), "o")
    o = scaled(w, fact, o) if where == "token" else o
    shape = out.dims if isinstance(out, T) else o.dims
    if isinstance(out, T):
        w.line(f"{w.part(out, 'n', 't')} = {w.ordered(o, shape.replace('n', ''))}")
        w.indent(-1)
    else:
        w.line(f"{out}.append({o})")
        w.indent(-1)
        at = w.pick([len(o.dims) - 1, 1])
        shape = o.dims[:at] + "n" + o.dims[at:]
        style = w.pick([f"torch.stack({out}, {at})", f"torch.cat([x.unsqueeze({at}) for x in {out}], {at})"])
        out = w.let("out", style, shape)
    return (scaled(w, fact, out) if where == "out" else out), current


def _open(w: Writer, fact: Fact, q: T, k: T, v: T, decay: Decay) -> tuple[T, T, T, T | None]:
    ts = [q, k, v] + ([decay.held] if decay.per_token and decay.held else [])
    names = [w.fresh(stem(t) + "t") for t in ts]
    if w.pick.flip(3):
        parts = ", ".join(f"{t}.unbind({t.at('n')})" for t in ts)
        w.line(f"for t, ({', '.join(names)}) in enumerate(zip({parts})):")
        w.indent(1)
    else:
        w.line(f"for t in range({fact.length}):")
        w.indent(1)
        for name, t in zip(names, ts, strict=True):
            w.line(f"{name} = {w.part(t, 'n', 't')}")
    made = [T(name, t.dims.replace("n", "")) for name, t in zip(names, ts, strict=True)]
    return made[0], made[1], made[2], made[3] if len(made) > 3 else None


def running(w: Writer, fact: Fact, q: T, k: T, v: T, decay: Decay, state: T | None) -> Written:
    """exp(G_i) q_i times the running sum of exp(-G_j) k_j v_j."""
    q = scaled(w, fact, q)
    if decay.per_token:
        g = decay.log()
        run = w.let("run", f"{g}.cumsum({g.at('n')})", g.dims)
        q = w.times(q, w.let("grown", f"{run}.exp()", run.dims), "q")
        k = w.times(k, w.let("back", f"(-{run}).exp()", run.dims), "k")
    elif decay.held is not None:
        i = positions(w, str(fact.length), "n")
        q = w.times(q, decay.power(i), "q")
        k = w.times(k, decay.power(w.let("back", f"-{i}", "n")), "k")
    kv = w.contract(k, v, w.union(k, v), "kv")
    total = w.let("kv", w.pick([f"{kv}.cumsum({kv.at('n')})", f"torch.cumsum({kv}, dim={kv.at('n')})"]), kv.dims)
    return w.contract(q, total, w.union(q, v).replace("d", ""), "out"), None


LOOP = Form(lambda f: True, loop)
RUNNING = Form(lambda f: not f.initial and not f.final, running)

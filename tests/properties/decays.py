"""Where a decay comes from, and how weights are made of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .fact import Fact
from .source import T, Writer


@dataclass(frozen=True)
class Decay:
    """A decay as the program holds it: its logarithm, or the factor itself.

    Fixed decays have the dimension h, or none inside a loop over heads; decays per token have n too.
    """

    w: Writer
    held: T | None  # None: un-decayed
    is_log: bool
    per_token: bool
    negative: bool  # whether the sign of the logarithm shows in the program
    learned: bool = True  # a gradient flows into it

    def log(self) -> T:
        """The logarithm, converted where the factor is held."""
        assert self.held is not None
        if self.is_log:
            return self.held
        text = (
            f"math.log({self.held})"
            if self.held.number
            else self.w.pick([f"{self.held}.log()", f"torch.log({self.held})"])
        )
        return self.w.let("rate", text, self.held.dims, self.held.number)

    def factor(self) -> T:
        assert self.held is not None
        if not self.is_log:
            return self.held
        text = (
            f"math.exp({self.held})"
            if self.held.number
            else self.w.pick([f"{self.held}.exp()", f"torch.exp({self.held})"])
        )
        return self.w.let("gamma", text, self.held.dims, self.held.number)

    def of_head(self, index: str) -> Decay:
        """The decay of one head, inside a loop over heads."""
        if self.held is None or "h" not in self.held.dims:
            return self
        at = self.held.at("h")
        text = f"{self.held}[{', '.join([':'] * at + [index])}]"
        return replace(self, held=self.w.let("rate" if self.is_log else "gamma", text, self.held.dims.replace("h", "")))

    def converted(self) -> Decay:
        """The same decay held the other way now and then, so that what follows starts from there."""
        if self.held is None or self.w.pick.flip(4):
            return self
        if self.w.pick.flip():
            return replace(self, held=self.log(), is_log=True)
        return replace(self, held=self.factor(), is_log=False)

    # --------------------------------------------------------------------------------------------------------- powers

    def power(self, x: T) -> T:
        """``exp(x * log decay)`` of a fixed decay, for positions ``x`` or a number of steps."""
        assert self.held is not None and not self.per_token
        w = self.w
        if not self.is_log or w.pick.flip(4):
            base = self.factor()
            left, right = w.spread(base, base.dims + x.dims), w.spread(x, base.dims + x.dims)
            styles = [f"{left} ** {right}"]
            if not (base.number and x.number):
                styles.append(f"torch.pow({left}, {right})")
            return w.let("power", w.pick(styles), base.dims + x.dims, base.number and x.number)
        rate = self.log()
        if rate.number and x.number:
            return w.let("power", f"math.exp({rate} * {x})", "", True)
        exponent = w.times(rate, x, "exponent")
        if w.pick.flip(6):
            return w.let("power", f"torch.exp2({exponent} * {1 / math.log(2)!r})", exponent.dims)
        return w.let("power", w.pick([f"torch.exp({exponent})", f"{exponent}.exp()"]), exponent.dims)


def given(w: Writer, fact: Fact) -> Decay:
    """The lines that get hold of the decay, before the formulation starts."""
    if fact.per_token:
        return _tokens(w, fact)
    if fact.decay == "none":
        return Decay(w, None, True, False, True, False)
    values = list(fact.values)
    form = fact.form
    if fact.decay == "number":
        held = w.let("decay", repr(values[0]), "", True)
    elif fact.decay == "list":
        held = w.let("decay", w.pick([f"torch.tensor({values})", f"q.new_tensor({values})"]), "h")
    elif fact.decay == "buffer":
        w.init.append(f'self.register_buffer("decay", torch.tensor({values}))')
        held = T("self.decay", "h")
    else:
        held = T("decay", "h")
    if fact.decay == "learned":
        text = {"slope": "F.softplus(decay)", "log": "-torch.exp(decay)", "gamma": "torch.sigmoid(decay)"}[form]
        if form == "log" and w.pick.flip(3):
            text = "-decay.exp()"
        held = w.let({"slope": "slope", "log": "rate", "gamma": "gamma"}[form], text, "h")
    if form == "slope":
        held = w.let("rate", f"-{held}", held.dims, held.number)
    return Decay(w, held, form != "gamma", False, fact.decay != "input", fact.decay == "learned")


def _tokens(w: Writer, fact: Fact) -> Decay:
    dims = w.sizes["gate dims"]
    gate = T("gate", dims)
    if fact.decay == "logsigmoid":
        held = w.let("g", w.pick(["F.logsigmoid(gate)", "torch.sigmoid(gate).log()", "-F.softplus(-gate)"]), dims)
    elif fact.decay == "softplus":
        held = w.let("g", "-F.softplus(gate)", dims)
    elif fact.decay == "dt":
        dt = w.let("dt", "F.softplus(gate)", dims)
        rate = w.let("rate", w.pick(["-torch.exp(rate)", "-rate.exp()"]), "h")
        held = w.times(rate, dt, "g")
    elif fact.decay == "sigmoid":
        return Decay(w, w.let("gamma", "torch.sigmoid(gate)", dims), False, True, True)
    else:
        held = gate
    return Decay(w, held, True, True, fact.decay != "given")


# ------------------------------------------------------------------------------------------------------------- weights


def positions(w: Writer, n: str, dim: str) -> T:
    """0, 1, ..., n - 1."""
    return w.let(
        "i",
        w.pick([f"torch.arange({n})", f"torch.arange({n}, dtype=torch.float32)", f"torch.ones({n}).cumsum(0) - 1"]),
        dim,
    )


def distances(w: Writer, n: str, row: str, col: str) -> T:
    i = positions(w, n, row)
    j = i.like(row, col)
    dims = row + col
    text = w.pick(
        [
            f"{i}[:, None] - {j}[None, :]",
            f"{i}.unsqueeze(-1) - {j}",
            f"-({j}[None] - {i}[:, None])",
            f"{i}.view(-1, 1) - {j}.view(1, -1)",
            f"torch.sub({i}[:, None], {j})",
        ]
    )
    return w.let("distance", text, dims)


def causal(w: Writer, d: T, n: str) -> str:
    """A condition that holds where a query may see a key."""
    return w.pick(
        [
            f"({d} >= 0)",
            f"({d} > -1)",
            f"torch.ones({n}, {n}, dtype=torch.bool).tril()",
            f"(~torch.ones({n}, {n}, dtype=torch.bool).triu(1))",
            f"(torch.ones({n}, {n}).tril() == 1)",
            f"torch.logical_not({d} < 0)",
            f"torch.tril(torch.ones({n}, {n})).bool()",
        ]
    )


def weights(w: Writer, decay: Decay, n: str, row: str, col: str) -> T:
    """exp(G_row - G_col) on and below the diagonal, 0 above."""
    d = distances(w, n, row, col)
    if decay.held is None:
        return mask(w, d, n)
    if decay.per_token or w.pick.flip(6):
        return _masked(w, decay, _run_differences(w, decay, n, row, col), d, n)
    return _of_distance(w, decay, d, n)


def mask(w: Writer, d: T, n: str) -> T:
    text = w.pick(
        [
            f"{causal(w, d, n)}.float()",
            f"torch.ones({n}, {n}).tril()",
            f"torch.where({causal(w, d, n)}, 1.0, 0.0)",
            f"torch.ones({n}, {n}).masked_fill({d} < 0, 0)",
            f"1.0 * {causal(w, d, n)}",
        ]
    )
    return w.let("weight", text, d.dims)


def _run_differences(w: Writer, decay: Decay, n: str, row: str, col: str) -> T:
    """G_row - G_col from a running sum of the log-decays."""
    g = decay.log()
    if not decay.per_token:
        if g.number:
            g = w.let("g", w.pick([f"torch.full(({n},), {g})", f"{g} * torch.ones({n})"]), row)
        else:
            g = w.let(
                "g",
                f"{g}[..., None].expand({', '.join(['-1'] * len(g.dims))}{', ' if g.dims else ''}{n})",
                g.dims + row,
            )
    if row not in g.dims:
        g = g.like("n", row)
    if w.pick.flip(4) and decay.per_token:
        return _segment_sums(w, g, n, row, col)
    at = g.at(row)
    run = w.let("run", w.pick([f"{g}.cumsum({at})", f"torch.cumsum({g}, dim={at - len(g.dims)})"]), g.dims)
    dims = g.dims.replace(row, "") + row + col
    return w.let("difference", f"{w.spread(run, dims)} - {w.spread(run.like(row, col), dims)}", dims)


def _segment_sums(w: Writer, g: T, n: str, row: str, col: str) -> T:
    """Sums over each segment col < t <= row, as the Mamba-2 paper's reference does: a masked running sum."""
    dims = g.dims.replace(row, "") + row
    g = w.to(g, dims)
    seg = w.let("segment", f"{g}[..., None].expand(*{g}.shape, {n})", dims + col)
    below = w.pick(
        [f"torch.ones({n}, {n}, dtype=torch.bool).tril(-1)", f"torch.tril(torch.ones({n}, {n}), diagonal=-1).bool()"]
    )
    seg = w.let("segment", f"{seg}.masked_fill(~{below}, 0)", seg.dims)
    return w.let("segment", f"{seg}.cumsum(-2)", seg.dims)


INF = 'float("inf")'


def _masked(w: Writer, decay: Decay, x: T, d: T, n: str) -> T:
    """exp(x) where the distance is not negative, 0 elsewhere."""
    tail = d.dims
    x = w.to(x, x.dims.replace(tail[0], "").replace(tail[1], "") + tail)
    ok = causal(w, d, n)
    style = w.pick(
        ["where", "tril", "fill", "times", "triu", "tril twice", "fill_", "times_", "boolean", "rows", "build",
         "log where", "log boolean", "clone", "where inside"]
    )  # fmt: skip
    if style == "where":
        return w.let(
            "weight",
            w.pick([f"torch.where({ok}, {x}.exp(), 0.0)", f"torch.where({d} < 0, 0.0, torch.exp({x}))"]),
            x.dims,
        )
    if style == "tril":
        return w.let("weight", w.pick([f"{x}.exp().tril()", f"torch.tril(torch.exp({x}))"]), x.dims)
    if style == "fill":
        return w.let("weight", f"{x}.masked_fill(~{ok}, -{INF}).exp()", x.dims)
    if style == "times":
        return w.let("weight", f"torch.exp({x}) * {ok}", x.dims)
    if style == "triu":
        return w.let("weight", f"torch.exp({x} + torch.full(({n}, {n}), -{INF}).triu(1))", x.dims)
    if style == "tril twice":
        return w.let("weight", f"{x}.tril().exp().tril()", x.dims)
    if style == "log where":
        return w.let("weight", f"torch.where({ok}, {x}, -{INF}).exp()", x.dims)
    if style == "where inside":
        return w.let("weight", f"torch.where({ok}, {x}, 0.0).exp() * {ok}", x.dims)
    if style in ("log boolean", "clone"):
        y = w.let("exponent", f"{x}.clone()", x.dims)
        w.line(f"{y}[..., ~{ok}] = -{INF}" if style == "log boolean" else f"{y}.masked_fill_(~{ok}, -{INF})")
        return w.let("weight", f"{y}.exp()", x.dims)
    if style == "build":
        y = w.let("weight", w.pick([f"torch.zeros_like({x})", f"torch.zeros({x}.shape)"]), x.dims)
        w.line(f"for row in range({n}):")
        w.line(f"    {y}[..., row, : row + 1] = {x}[..., row, : row + 1].exp()")
        return y
    # autograd needs the result of exp as it was
    y = w.let("weight", f"{x}.exp(){'.clone()' if decay.learned else ''}", x.dims)
    if style == "fill_":
        w.line(f"{y}.masked_fill_({d} < 0, 0)")
    elif style == "times_":
        w.line(w.pick([f"{y} *= {ok}", f"{y}.mul_({ok})"]))
    elif style == "boolean":
        w.line(f"{y}[..., {d} < 0] = 0")
    else:
        w.line(f"for row in range({n}):")
        w.line(f"    {y}[..., row, row + 1 :] = 0")
    return y


def _of_distance(w: Writer, decay: Decay, d: T, n: str) -> T:
    """Powers of a fixed decay, by the distance."""
    style = w.pick(["masked", "masked", "clamp", "abs", "relu", "infinite", "rows"])
    if style == "masked":
        if not decay.is_log or w.pick.flip(4):
            return _cut(w, decay.power(d), d, n)
        return _masked(w, decay, w.times(decay.log(), d, "exponent"), d, n)
    if style == "infinite" and decay.negative and not decay.learned:  # a gradient would be inf times 0
        far = w.let("far", f"{d}.float().masked_fill(~{causal(w, d, n)}, {INF})", d.dims)
        return w.let(
            "weight", f"torch.nan_to_num(torch.exp({w.times(decay.log(), far, 'exponent')}))", decay.held.dims + d.dims
        )
    if style == "rows":
        return _by_rows(w, decay, d, n)
    text = {
        "clamp": w.pick([f"{d}.clamp(min=0)", f"torch.clamp({d}, min=0)", f"torch.clamp_min({d}, 0)"]),
        "abs": f"{d}.abs()",
        "relu": f"torch.relu({d})",
        "infinite": f"torch.maximum({d}, torch.zeros_like({d}))",
    }[style]
    return _cut(w, decay.power(w.let("steps", text, d.dims)), d, n)


def _cut(w: Writer, x: T, d: T, n: str) -> T:
    """``x`` on and below the diagonal."""
    return w.let(
        "weight",
        w.pick(
            [
                f"torch.where({causal(w, d, n)}, {x}, 0.0)",
                f"{x}.tril()",
                f"{x} * {causal(w, d, n)}",
                f"{x}.masked_fill({d} < 0, 0.0)",
                f"{x} * torch.ones({n}, {n}).tril()",
                f"torch.tril({x})",
            ]
        ),
        x.dims,
    )


def _by_rows(w: Writer, decay: Decay, d: T, n: str) -> T:
    """Each row of the matrix of weights written into zeros."""
    dims = decay.held.dims + d.dims
    first = f"{decay.held}.shape[0], " if decay.held.dims else ""
    y = w.let("weight", f"torch.zeros({first}{n}, {n})", dims)
    w.line(f"for row in range({n}):")
    w.indent(1)
    steps = w.let("steps", w.pick(["torch.arange(row, -1, -1)", "row - torch.arange(row + 1)"]), d.dims[1])
    w.line(f"{y}[..., row, : row + 1] = {decay.power(steps)}")
    w.indent(-1)
    return y

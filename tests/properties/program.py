"""A program from a seed: the fact, the lines that compute it, and how its inputs and outputs lie in memory."""

from __future__ import annotations

import linecache
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import batched, chunks, decays, parallel, tokens
from .choices import Choices
from .decays import Decay
from .fact import Fact, draw
from .source import T, Writer

HEADER = "import math\n\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n\n"


FORMS = {
    "parallel": parallel.FORM,
    "chunk loop": chunks.FORM,
    "batched chunks": batched.FORM,
    "token loop": tokens.LOOP,
    "running sum": tokens.RUNNING,
}
CANONICAL = {"q": "bhnd", "k": "bhnd", "v": "bhnd", "decay": "h", "gate": "bhn", "rate": "h", "state": "bhde"}


@dataclass(frozen=True)
class Program:
    """Source of a module, and what it is called with.

    Attributes:
        layouts: name of an input -> its dimensions, in which (hd) is one flattened dimension.
        outputs: the dimensions of each output.
        rewrites: how many rewrites are right.
        turned: whether it reads the sequence from its end, and turns what comes out.
    """

    fact: Fact
    source: str
    layouts: dict[str, str]
    outputs: tuple[str, ...]
    rewrites: tuple[int, ...]
    record: tuple[int, ...]
    kind: str
    turned: bool = False

    def build(self, source: str | None = None) -> nn.Module:
        module = compiled(source or self.source)
        return Turned(module, tuple(self.layouts.values()), self.outputs) if self.turned else module

    def lay_out(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """The arguments, in the layouts of the program, from inputs in those of the fact."""
        return [laid_out(inputs[name], CANONICAL[name], dims) for name, dims in self.layouts.items()]

    def reference(self) -> list[Tensor]:
        """The outputs by definition, in fp64."""
        inputs = self.fact.inputs()
        if self.turned:
            inputs = {name: turned(x, CANONICAL[name]) for name, x in inputs.items()}
        o, state = self.fact.reference(inputs)
        o = turned(o, "bhne") if self.turned else o
        canonical = {"n": (o, "bhne"), "d": (state, "bhde")}
        return [laid_out(*canonical["n" if "n" in dims else "d"], dims) for dims in self.outputs]


class Turned(nn.Module):
    """A module between inputs and outputs that are turned along the sequence, given the dimensions of each."""

    def __init__(self, inner: nn.Module, inputs: Sequence[str], outputs: Sequence[str]):
        super().__init__()
        self.inner, self.inputs, self.outputs = inner, inputs, outputs

    def forward(self, *args: Tensor) -> Tensor | tuple[Tensor, ...]:
        out = self.inner(*map(turned, args, self.inputs))
        return tuple(map(turned, out, self.outputs)) if isinstance(out, tuple) else turned(out, self.outputs[0])


def turned(x: Tensor, dims: str) -> Tensor:
    """``x`` from its last position to its first; what has none as it is."""
    return x.flip(re.sub(r"\(..\)", "x", dims).index("n")) if "n" in dims else x


def laid_out(x: Tensor, have: str, want: str) -> Tensor:
    """``x`` in another order of dimensions; what stands in parentheses becomes one."""
    flat = want.replace("(", "").replace(")", "")
    have = have if set(flat) == set(have) else have[:-1] + flat[-1]
    x = x.permute([have.index(d) for d in flat])
    if "(" in want:
        at = want.index("(")
        x = x.flatten(at, at + 1)
    return x.contiguous()


def compiled(source: str) -> nn.Module:
    """The module that a source defines; its lines show in tracebacks."""
    name = f"<program {hash(source)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    scope = {"math": math, "torch": torch, "F": F, "nn": nn}
    exec(compile(source, name, "exec"), scope)
    return scope["Program"]()


def write(seed: int, record: Sequence[int] | None = None) -> Program:
    """The program of a seed, or of a record of decisions."""
    pick = Choices(seed, record)
    fact = draw(pick, seed)
    w = Writer(pick)
    w.sizes |= {"b": str(fact.batch), "h": str(fact.heads), "n": str(fact.length), "d": str(fact.dk), "e": str(fact.dv)}
    layouts, q, k, v = _inputs(w, fact)
    decay = decays.given(w, fact).converted()
    state = T("state", layouts["state"]) if fact.initial else None
    kind = pick([name for name, form in FORMS.items() if form.fits(fact)])
    heads = fact.heads if pick.flip(8) and fact.kv_heads == fact.heads <= 3 and not fact.final else 0
    if heads:
        o, final, kind = _per_head(w, fact, FORMS[kind], q, k, v, decay, state), None, f"{kind} per head"
    else:
        o, final = FORMS[kind].write(w, fact, q, k, v, decay, state)
    outputs = [_output(w, fact, o)]
    names = [w.lines.pop().removeprefix("return ")]
    if fact.final:
        assert final is not None
        final = w.to(final, pick(("bhde", "bhed")))
        outputs.append(final.dims)
        names.append(final.name)
    w.line(f"return {', '.join(names)}")
    source = "\n".join(
        [
            "class Program(nn.Module):",
            "    def __init__(self):",
            *(f"        {x}" for x in ("super().__init__()", *w.init)),
            "",
            f"    def forward(self, {', '.join(layouts)}):",
            *(f"        {x}" for x in w.lines),
            "",
        ]
    )
    rewrites = (1, fact.heads) if heads else (1,)
    return Program(fact, source, layouts, tuple(outputs), rewrites, tuple(pick.record), kind)


def _inputs(w: Writer, fact: Fact) -> tuple[dict[str, str], T, T, T]:
    """The layouts of the arguments, and the lines that give q, k and v a dimension for heads."""
    pick = w.pick
    layout = pick(("bhnd", "bnhd", "bn(hd)"))
    names = dict.fromkeys("qkv", layout)
    ts = []
    for x in "qkv":
        heads = fact.heads if x == "q" else fact.kv_heads
        t = T(x, layout.replace("(", "").replace(")", ""))
        if "(" in layout:
            size = fact.dv if x == "v" else fact.dk
            text = pick(
                [f"{x}.view({fact.batch}, {fact.length}, {heads}, {size})", f"{x}.unflatten(-1, ({heads}, -1))"]
            )
            t = w.let(x + "h", text, t.dims)
        if heads != fact.heads:
            t = _shared(w, t, fact.heads // heads)
        if x == "v":
            t = t.like("d", "e")
        if pick.flip(3):
            t = w.to(t, "bhn" + t.dims[-1])
        ts.append(t)
    layouts = dict(names)
    if fact.decay in ("input", "learned"):
        layouts["decay"] = "h"
    if fact.per_token:
        layouts["gate"] = pick(("bhn", "bnh"))
        w.sizes["gate dims"] = layouts["gate"]
    if fact.decay == "dt":
        layouts["rate"] = "h"
    if fact.initial:
        layouts["state"] = pick(("bhde", "bhed"))
    return layouts, *ts


def _shared(w: Writer, t: T, times: int) -> T:
    """Fewer heads of keys and values, each for several heads of queries."""
    at = t.at("h")
    rank = len(t.dims)
    texts = [f"{t}.repeat_interleave({times}, {at})"]
    spread = ", ".join([":"] * (at + 1) + ["None"])
    sizes = ", ".join(["-1"] * (at + 1) + [str(times)] + ["-1"] * (rank - at - 1))
    texts.append(f"{t}[{spread}].expand({sizes}).flatten({at}, {at + 1})")
    texts.append(f"torch.repeat_interleave({t}, {times}, dim={at})")
    return w.let(t.name, w.pick(texts), t.dims)


def _output(w: Writer, fact: Fact, o: T) -> str:
    """Lays out the result and leaves it in a last line ``return``; the dimensions it has."""
    layout = w.pick(("bhne", "bnhe", "bn(he)"))
    o = w.to(o, layout.replace("(", "").replace(")", ""))
    if "(" in layout:
        o = w.let("out", w.pick([f"{o}.flatten(2)", f"{o}.reshape({fact.batch}, {fact.length}, -1)"]), layout)
    w.line(f"return {o}")
    return layout


def _per_head(w: Writer, fact: Fact, form: parallel.Form, q: T, k: T, v: T, decay: Decay, state: T | None) -> T:
    """A loop over heads; what they compute is joined."""
    outs = w.let("outs", "[]")
    w.line(f"for h in range({fact.heads}):")
    w.indent(1)

    def of_head(t: T) -> T:
        at = t.at("h")
        text = w.pick([f"{t}[{', '.join([':'] * at + ['h'])}]", f"{t}.select({at}, h)"])
        return w.let(t.name + "_", text, t.dims.replace("h", ""))

    o, _ = form.write(w, fact, of_head(q), of_head(k), of_head(v), decay.of_head("h"), state and of_head(state))
    joined = w.pick(("bhne", "bnhe"))
    o = w.to(o, joined.replace("h", "") if joined == "bnhe" or w.pick.flip() else o.dims)
    w.line(f"{outs}.append({o})")
    w.indent(-1)
    at = joined.index("h")
    return w.let("out", f"torch.stack({outs}, {at})", o.dims[:at] + "h" + o.dims[at:])

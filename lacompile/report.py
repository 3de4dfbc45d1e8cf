"""What was rewritten, what nearly was, and why not: values that print, log and serialise."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx

from . import _compat
from .passes.facts import DecayedAttention, Match, Refusal

log = logging.getLogger("lacompile")


_INSTALLED = re.compile(r"[/\\](?:site|dist)-packages[/\\](\w+)")


def _package(cls: Any) -> str:
    """The package that a module's class is from; of a class, or of its name."""
    return str(getattr(cls, "__module__", cls)).partition(".")[0]


@dataclass(frozen=True)
class Source:
    """Where in the user's program: file, line, the code there, and the module it ran in."""

    file: str = ""
    line: int = 0
    code: str = ""
    module: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file else "unknown place"
        return f"{place} in {self.module}" if self.module else place

    @classmethod
    def of(cls, node: fx.Node | None) -> Source:
        """Read off the last frame of the node's stack trace that is in the program itself.

        That is neither PyTorch nor a library, such as einops, but one that a module of the model is from.
        """
        if node is None:
            return cls()
        module = ""
        stack = node.meta.get("nn_module_stack") or {}
        for path, _ in stack.values():
            module = re.sub(r"L\['self'\]\.?|L\['(\w+)'\]", r"\1", str(path)).strip(".")
        frames = re.findall(r'File "([^"]+)", line (\d+)[^\n]*\n\s*([^\n]*)', node.meta.get("stack_trace") or "")
        if not frames:
            return cls(module=module)
        frames = [f for f in frames if "/torch/" not in f[0]] or frames
        packages = {_package(cls) for _, cls in stack.values()}
        own = [f for f in frames if (found := _INSTALLED.search(f[0])) is None or found[1] in packages] or frames
        file, line, code = own[-1]
        return cls(file, int(line), code.strip(), module)


@dataclass(frozen=True)
class Rewrite:
    """One decayed attention that became the operator."""

    source: Source
    formulation: str
    length: str
    heads: str
    dk: int | str
    dv: int | str
    dtype: str
    decay: str
    decay_per_token: bool
    initial_state: bool
    final_state: bool
    assumptions: tuple[str, ...] = ()
    validation: str = ""

    @classmethod
    def of(cls, match: Match, fact: DecayedAttention, *, state: Match | None, validation: str) -> Rewrite:
        """What became of ``match``; ``state`` is that of the attention's final state, if it was found too."""
        assumed = dict.fromkeys(a.text for m in (match, state) if m is not None for a in m.assumed)
        return cls(
            source=Source.of(match.target),
            formulation=fact.formulation,
            length=str(fact.length),
            heads=str(fact.heads),
            dk=_size(fact.dk),
            dv=_size(fact.dv),
            dtype=str(fact.dtype).removeprefix("torch."),
            decay=fact.decay_source,
            decay_per_token=fact.decay_per_token,
            initial_state=fact.initial_state is not None,
            final_state=state is not None,
            assumptions=tuple(assumed),
            validation=validation,
        )

    def __str__(self) -> str:
        state = {(False, False): "", (True, False): ", state in", (False, True): ", state out"}.get(
            (self.initial_state, self.final_state), ", state in and out"
        )
        kind = "per token" if self.decay_per_token else "per head"
        return (
            f"{self.source}: {self.formulation} form, N={self.length} H={self.heads} Dk={self.dk} Dv={self.dv} "
            f"{self.dtype}, decay {kind} from {self.decay}{state}"
        )


@dataclass(frozen=True)
class NearMiss:
    """Something that looked like a decayed attention and stays as it was."""

    source: Source
    stage: str
    obligation: str
    node: str
    expected: str
    found: str
    hint: str = ""

    @classmethod
    def of(cls, refusal: Refusal) -> NearMiss:
        return cls(
            source=Source.of(refusal.node),
            stage=refusal.stage,
            obligation=refusal.obligation,
            node=refusal.node.name if refusal.node is not None else "",
            expected=refusal.expected,
            found=refusal.found,
            hint=refusal.hint,
        )

    def __str__(self) -> str:
        hint = f" ({self.hint})" if self.hint else ""
        return (
            f"{self.source}: not rewritten at {self.stage}/{self.obligation}: "
            f"expected {self.expected}, found {self.found}{hint}"
        )


@dataclass(frozen=True)
class Report:
    """What the backend did to one graph, or to all graphs of one call.

    ``nodes_before`` counts the nodes Dynamo captured, ``nodes_after`` those Inductor got; 0 where not counted.
    """

    rewrites: tuple[Rewrite, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    graphs: int = 1
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    nodes_before: int = 0
    nodes_after: int = 0

    def __add__(self, other: Report) -> Report:
        seconds = {k: self.seconds.get(k, 0) + other.seconds.get(k, 0) for k in {**self.seconds, **other.seconds}}
        return Report(
            self.rewrites + other.rewrites,
            self.near_misses + other.near_misses,
            self.graphs + other.graphs,
            seconds,
            tuple(dict.fromkeys(self.notes + other.notes)),
            self.nodes_before + other.nodes_before,
            self.nodes_after + other.nodes_after,
        )

    def __str__(self) -> str:
        lines = [
            f"rewrote {_count(len(self.rewrites), 'decayed attention')} in {_count(self.graphs, 'graph')}; "
            f"{_count(len(self.near_misses), 'near miss', 'near misses')}"
        ]
        for r in self.rewrites:
            lines.append(f"  + {r}")
            lines += [f"      assumed: {a}" for a in r.assumptions]
            lines += [f"      validated: {r.validation}"] if r.validation else []
        lines += [f"  - {m}" for m in self.near_misses]
        lines += [f"  note: {n}" for n in self.notes]
        if self.nodes_after != self.nodes_before:
            lines.append(f"  graph nodes: {self.nodes_before} -> {self.nodes_after}")
        if self.seconds:
            lines.append("  seconds: " + ", ".join(f"{k} {v:.3f}" for k, v in self.seconds.items()))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def _size(n: object) -> int | str:
    """A number, or the symbol of one that each run has anew."""
    return n if isinstance(n, int) else str(n)


def _count(n: int, one: str, many: str = "") -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


_last: Report | None = None


def publish(report: Report) -> None:
    """Keeps, counts, logs and traces a report."""
    global _last
    _last = report
    counters = _compat.counters()
    counters["graphs"] += report.graphs
    counters["rewrites"] += len(report.rewrites)
    counters["near_misses"] += len(report.near_misses)
    for r in report.rewrites:
        log.info("rewrote %s", r)
    for m in report.near_misses:
        log.debug("%s", m)
    for note in report.notes:
        log.info("%s", note)
    _compat.trace_artifact("lacompile_rewrites", report.to_json())


def last_report() -> Report | None:
    """The report of the last graph that the backend compiled; None before the first."""
    return _last


def clear() -> None:
    """Forgets the last report (torch._dynamo.reset does this)."""
    global _last
    _last = None

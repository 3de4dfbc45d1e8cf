"""``torch.compile(model, backend="lightning")``: analyse, decide, rewrite, hand over to Inductor, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from . import _compat, guards, ops, report
from .errors import LacompileError, NotRewritten
from .options import Options, check_mode
from .passes.capture import fake_mode_of
from .passes.facts import Analysis, DecayedAttention, Match, Refusal
from .passes.legality import illegal
from .passes.lift import analyse
from .passes.rewrite import rewrite
from .passes.validate import Validation, validate
from .report import NearMiss, Report, Rewrite

log = logging.getLogger("lacompile")


def lightning(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend function that Dynamo calls with each captured graph.

    Args:
        gm: the graph.
        example_inputs: its inputs.
        mode: as in torch.compile.
        options: those of :class:`lacompile.options.Options` and those of Inductor.

    Raises:
        UnknownOption, BadOptionValue, UnknownMode: a misspelt setting.
        NotRewritten: under ``options={"strict": True}``.
    """
    check_mode(mode)
    settings, inductor_options = Options.split(options)
    config_patches = {**_compat.mode_options(mode), **inductor_options}
    decision = decide(gm, example_inputs, settings)
    hand_over = _HandOver(config_patches)
    compiled = None
    if decision.rewritten is not None:
        try:
            compiled = hand_over(decision.rewritten, example_inputs)
        except Exception as error:
            decision = decision.without_rewrites("rewrite", f"{type(error).__name__}: {error}")
    if compiled is None:
        compiled = hand_over(gm, example_inputs)
    elif settings.buffers != "trust":
        again = _Again(gm, settings, hand_over, decision.rewritten, compiled)
        compiled = guards.guarded(
            compiled, lambda: hand_over(gm, example_inputs), decision.assumptions(gm), example_inputs, again
        )
    final = replace(decision.report, notes=decision.report.notes + tuple(hand_over.notes))
    report.publish(final)
    if settings.strict and (final.near_misses or not final.rewrites):
        raise NotRewritten(f"strict mode: {final}")
    return compiled


lightning.reset = report.clear  # type: ignore[attr-defined]


def analyse_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Report:
    """Everything up to the decision, nothing compiled: what :func:`lacompile.explain` shows."""
    return decide(gm, example_inputs, options).report


@dataclass(frozen=True)
class Decision:
    """What will be done to one graph."""

    rewritten: fx.GraphModule | None
    matches: tuple[Match, ...]
    report: Report

    def assumptions(self, gm: fx.GraphModule) -> list[tuple[int, Any]]:
        """Positions among the inputs, and what is assumed of the tensors there."""
        position = {n: i for i, n in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
        return [(position[a.node], a) for m in self.matches for f in m.facts for a in f.assumptions]

    def without_rewrites(self, stage: str, why: str) -> Decision:
        """The same graph left alone, the reason noted."""
        target = self.matches[0].target if self.matches else None
        miss = NearMiss.of(Refusal(stage, "internal-error", target, "a graph that compiles", why))
        near_misses = (*self.report.near_misses, miss)
        nodes = self.report.nodes_before
        return Decision(None, (), replace(self.report, rewrites=(), near_misses=near_misses, nodes_after=nodes))


def decide(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Decision:
    """Analysis, legality, capability, validation and rewrite; any fault of ours leaves the graph alone."""
    start = time.perf_counter()
    if _compat.functorch_active():
        return _left_alone("a functorch transform or forward-mode AD is active")
    with _compat.suppressed_guards(fake_mode_of(gm)):
        return _guardless(gm, example_inputs, options, start)


def _guardless(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, start: float) -> Decision:
    """:func:`decide`; what it asks of symbolic sizes must not specialise the compiled program."""
    found = analyse(gm, example_inputs, buffers=options.buffers)
    try:
        return _decide(gm, example_inputs, options, found, start)
    except LacompileError:
        raise
    except Exception as error:
        log.debug("the rewrite failed", exc_info=True)
        empty = Decision(None, found.matches, Report(seconds=dict(found.seconds)))
        return empty.without_rewrites("rewrite", f"{type(error).__name__}: {error}")


def _left_alone(why: str) -> Decision:
    return Decision(None, (), Report(notes=(f"left alone: {why}",)))


def _decide(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, found: Analysis, start: float
) -> Decision:
    refusals = list(found.refusals)
    kept: list[Match] = []
    validated: dict[int, Validation] = {}
    for match in found.matches:
        problem = illegal(gm, match, found.effects) or _unserved(match)
        if problem is None:
            outcome = validate(gm, match, example_inputs, _reference, options.validate, found.effects)
            if isinstance(outcome, Refusal):
                problem = outcome
            else:
                validated[id(match)] = outcome
        if problem is None:
            kept.append(match)
        else:
            refusals.append(problem)
    # A final state rides on its attention: without the output's rewrite it would run the whole operator again.
    primary = {id(f) for m in kept if not _is_state(m) for f in m.facts}
    kept = [m for m in kept if not _is_state(m) or all(id(f) in primary for f in m.facts)]
    rewritten = None
    if kept and not options.dry_run:
        rewritten = rewrite(gm, kept, torch.ops.lacompile.decayed_attention.default, found.effects)
    with_state = {id(f) for m in kept if _is_state(m) for f in m.facts}
    rewrites = tuple(
        Rewrite.of(m, f, final_state=id(f) in with_state, validation=str(validated[id(m)]))
        for m in kept
        if not _is_state(m)
        for f in m.facts
    )
    seconds = {**found.seconds, "total": time.perf_counter() - start}
    made = Report(
        rewrites,
        tuple(map(NearMiss.of, refusals)),
        seconds=seconds,
        nodes_before=len(gm.graph.nodes),
        nodes_after=len((rewritten or gm).graph.nodes),
    )
    return Decision(rewritten, tuple(kept), made)


def _is_state(match: Match) -> bool:
    """Whether the match is of a final state rather than of an output."""
    from .passes.facts import Attend, children

    def indices(expr: Any) -> set[int]:
        own = {expr.index} if isinstance(expr, Attend) else set()
        return own.union(*(indices(c) for c in children(expr))) if not isinstance(expr, Attend) else own

    return indices(match.replacement) == {1}


def _unserved(match: Match) -> Refusal | None:
    """A dtype, head size or device that no kernel serves."""
    from .kernels.select import refusal

    device = match.target.meta["example_value"].device.type
    for fact in match.facts:
        why = refusal(device_type=device, dtype=fact.dtype, dk=fact.dk, dv=fact.dv)
        if why is not None:
            return Refusal("select", "unsupported", match.target, "a kernel for this case", why, progress=9)
    return None


def _reference(fact: DecayedAttention, q: Any, k: Any, v: Any, log_decay: Any, state: Any) -> tuple[Any, Any]:
    """The operator's meaning in whatever dtype it is given, for validation."""
    from .kernels import cpu

    return cpu.forward(q, k, v, log_decay, fact.scale, state)


class _Again:
    """The same graph for inputs of other values; a rewrite that bakes no number is not compiled again."""

    def __init__(self, gm: fx.GraphModule, settings: Options, hand_over: _HandOver, rewritten: Any, compiled: Any):
        self.gm, self.settings, self.hand_over = gm, settings, hand_over
        self.known = {rewritten.code: compiled}
        self.symbolic = any(n.op == "placeholder" and _is_symbolic(n) for n in gm.graph.nodes)

    def __call__(self, args: Sequence[Any]) -> tuple[Callable[..., Any], list[tuple[int, Any]]] | None:
        decision = decide(self.gm, args, self.settings)
        if decision.rewritten is None:
            return None
        code = decision.rewritten.code
        if code not in self.known:
            if self.symbolic:  # sizes can only be compiled for while Dynamo traces
                return None
            self.known[code] = self.hand_over(decision.rewritten, args)
        report.publish(decision.report)
        return self.known[code], decision.assumptions(self.gm)


def _is_symbolic(node: fx.Node) -> bool:
    example = node.meta.get("example_value")
    sizes = example.shape if isinstance(example, torch.Tensor) else (example,)
    return any(isinstance(s, torch.SymInt) for s in sizes)


class _HandOver:
    """Inductor, or AOTAutograd alone where Inductor cannot compile."""

    def __init__(self, config_patches: dict[str, Any]):
        self.config_patches = config_patches
        self.notes: list[str] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        why = _compat.cpu_compiler_error() if _on_cpu(example_inputs) else None
        if why is not None:
            self.notes.append(f"Inductor cannot compile here ({why}); the graph runs uncompiled")
            return _compat.compile_without_inductor(gm, example_inputs)
        tag = ops.CACHE_TAG if _is_rewritten(gm) else ""
        return _compat.compile_with_inductor(gm, example_inputs, self.config_patches, tag)


def _is_rewritten(gm: fx.GraphModule) -> bool:
    return any(n.target is torch.ops.lacompile.decayed_attention.default for n in gm.graph.nodes)


def _on_cpu(example_inputs: Sequence[Any]) -> bool:
    return any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in example_inputs)


__all__ = ["analyse_graph", "decide", "lightning", "ops"]

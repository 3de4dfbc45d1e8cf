"""What will be done to one graph: the stages run in order, up to the rewritten graph and the report."""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from . import _compat, ops
from .errors import LacompileError
from .options import Options
from .passes.capture import fake_mode_of
from .passes.capture.effects import NOWHERE, Effects, overlap
from .passes.check.legality import settled
from .passes.check.lone_steps import lone_step
from .passes.check.row_sums import worthwhile
from .passes.check.validate import Validation, validate
from .passes.facts import Assumption, Attend, DecayedAttention, Expr, Match, Progress, Refusal, children
from .passes.graph.schedule import Schedule
from .passes.lift import Analysis, analyse
from .passes.loops import Reading, behind_loops
from .passes.rewrite.batch import batched
from .passes.rewrite.short_convs import short_convolutions
from .passes.rewrite.writer import rewrite
from .passes.vmaps import without_vmaps
from .report import NearMiss, Report, Rewrite

log = logging.getLogger("lacompile")


@dataclass(frozen=True)
class Decision:
    """What will be done to one graph.

    ``assumed`` are positions among its inputs, and what is assumed of the tensors there.
    """

    rewritten: fx.GraphModule | None
    report: Report
    assumed: tuple[tuple[int, Assumption], ...] = ()

    def without_rewrites(self, stage: str, why: str) -> Decision:
        """The same graph left alone, the reason noted."""
        miss = NearMiss.of(Refusal(stage, "internal-error", None, "a graph that compiles", why))
        near_misses = (*self.report.near_misses, miss)
        nodes = self.report.nodes_before
        return Decision(None, replace(self.report, rewrites=(), near_misses=near_misses, nodes_after=nodes))


def decide(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, *, may_guard: bool = True) -> Decision:
    """Analysis, legality, capability, validation and rewrite; any fault of ours leaves the graph alone.

    Where Dynamo has traced it before, and keeps no guard of ours any more, it ``may_guard`` nothing.
    """
    if _compat.functorch_active():
        return Decision(None, Report(notes=("left alone: a functorch transform or forward-mode AD is active",)))
    if _compat.functorch_inside(gm):
        unmapped = without_vmaps(gm)
        if unmapped is None:
            return Decision(None, Report(notes=("left alone: the program itself calls vmap, grad or forward-mode AD",)))
        gm = unmapped
    # what is asked of symbolic sizes must not specialise the compiled program
    mode = fake_mode_of(gm)
    start = time.perf_counter()
    with _asking_nothing(mode):
        gm, found = _found(gm, example_inputs, options, may_be_equal=may_guard)
    if found.matches and not options.dry_run:
        for a, b in found.equal:
            _compat.guard_equal(mode, a, b)
    with _asking_nothing(mode):
        return _decided(gm, example_inputs, options, found, start)


@contextmanager
def _asking_nothing(mode: Any) -> Iterator[None]:
    """Inside no guard is added, no symbol has a number or stays, and nothing is collected."""
    with (
        _compat.suppressed_guards(mode),
        _compat.forgotten_symbols(mode),
        _compat.no_number_for_a_symbol(mode),
        no_collection(),
    ):
        yield


@contextmanager
def no_collection() -> Iterator[None]:
    """Cycles are collected later: one look at all that PyTorch and Dynamo hold costs as much as hundreds of nodes."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _found(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, *, may_be_equal: bool) -> Reading:
    """The graph that is looked at, and what is found in it; sizes of several inputs ``may_be_equal`` or not."""

    def look(at: fx.GraphModule) -> Analysis:
        return analyse(at, example_inputs, buffers=options.buffers, may_be_equal=may_be_equal)

    return behind_loops(gm, look, look(gm))


def _decided(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, found: Analysis, start: float
) -> Decision:
    try:
        own = _own(gm, example_inputs, options, found, start)
        return _with_bodies(gm, own, _bodies(gm, example_inputs, options, found.schedule.effects))
    except LacompileError:
        raise
    except Exception as error:
        log.debug("the rewrite failed", exc_info=True)
        nodes = len(gm.graph.nodes)
        empty = Decision(None, Report(seconds=dict(found.seconds), nodes_before=nodes, nodes_after=nodes))
        return empty.without_rewrites("rewrite", f"{type(error).__name__}: {error}")


def _own(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, found: Analysis, start: float
) -> Decision:
    """The decision about the graph itself, without those that its operators call."""
    schedule = found.schedule
    real = {n: example_inputs[i] for n, i in schedule.inputs.items() if i < len(example_inputs)}
    refusals = list(found.refusals)
    kept: list[Match] = []
    validated: list[Validation] = []
    for match in found.matches:
        outcome = _checked(schedule, match, real, options)
        if isinstance(outcome, Refusal):
            refusals.append(outcome)
        else:
            kept.append(outcome[0])
            validated.append(outcome[1])
    worth = worthwhile(schedule, kept)
    # A final state rides on its attention: without the output's rewrite it would run the whole operator again.
    primary = {f for m in worth if not _is_state(m) for f in m.facts}
    worth = [m for m in worth if not _is_state(m) or all(f in primary for f in m.facts)]
    validated = [v for m, v in zip(kept, validated, strict=True) if m in worth]
    kept = batched(schedule, worth)
    rewritten, used = None, {f for m in kept for f in m.facts}
    notes: tuple[str, ...] = ()
    if kept and not options.dry_run:
        convolutions = list(short_convolutions(schedule))
        made = rewrite(schedule, [*kept, *convolutions], torch.ops.lacompile.decayed_attention.default)
        rewritten, used = made.gm, made.facts
        refusals = [r for r in refusals if r.node not in made.gone]  # of what is computed no more
        notes = tuple(f"short convolution written as a sum of shifted products: {m.target.name}" for m in convolutions)
    report = Report(
        tuple(_rewrites(kept, validated, used)),
        tuple(map(NearMiss.of, refusals)),
        seconds={**found.seconds, "total": time.perf_counter() - start},
        notes=notes,
        nodes_before=len(gm.graph.nodes),
        nodes_after=len((rewritten or gm).graph.nodes),
    )
    assumed = tuple((schedule.inputs[a.node], a) for m in kept for a in m.assumed)
    return Decision(rewritten, report, assumed)


def _checked(
    schedule: Schedule, match: Match, real: Mapping[fx.Node, Any], options: Options
) -> tuple[Match, Validation] | Refusal:
    """The match where it will be computed and how its validation came out, or why it is not taken."""
    placed = settled(schedule, match)
    if isinstance(placed, Refusal):
        return placed
    trained = (n for n, x in real.items() if isinstance(x, torch.nn.Parameter))
    problem = _unserved(match) or _unmet(match, real) or lone_step(schedule, match, trained)
    if problem is not None:
        return problem
    outcome = validate(schedule, placed, real, _reference, options.validate)
    return outcome if isinstance(outcome, Refusal) else (placed, outcome)


def _rewrites(kept: Sequence[Match], validated: Sequence[Validation], used: set[DecayedAttention]) -> Iterator[Rewrite]:
    """One for each operator that the rewritten graph runs; ``used`` are their facts."""
    states = {f: m for m in kept if _is_state(m) for f in m.facts}
    checks: dict[DecayedAttention, list[Validation]] = {}
    places: dict[DecayedAttention, Match] = {}
    for m, v in zip(kept, validated, strict=True):
        for f in m.facts:
            if not _is_state(m) and f in used:
                checks.setdefault(f, []).append(v)
                places.setdefault(f, m)
    for f, m in places.items():
        worst = max(checks[f], key=lambda v: (bool(v.skipped), v.forward_error))
        yield Rewrite.of(m, f, state=states.get(f), validation=str(worst))


# ---------------------------------------------------------------------------- graphs that an operator calls


def _bodies(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, effects: Effects
) -> Iterator[tuple[str, Decision]]:
    """Activation checkpointing hands its part of the program to an operator, as a graph of its own.

    Yields the name of each and the decision about it, whose ``assumed`` speaks of the inputs of ``gm``.
    """
    position = {n: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
    named = Counter(str(n.target) for n in gm.graph.find_nodes(op="get_attr"))
    written = NOWHERE

    def input_of(arg: Any) -> int | None:
        """What was written to is no longer the input whose values are known."""
        known = isinstance(arg, fx.Node) and not overlap(written, effects.lives.get(arg, NOWHERE))
        return position.get(arg) if known else None

    for node in gm.graph.nodes:
        written |= effects.writes.get(node, NOWHERE)
        for name, given in _called(node):
            body = getattr(gm, name)
            if named[name] > 1:
                continue
            given = given if given is not None else body.graph.find_nodes(op="placeholder")
            outer = [input_of(a) for a in given]
            inputs = [example_inputs[i] if i is not None else _number(a) for i, a in zip(outer, given, strict=True)]
            of_body, found = _found(body, inputs, options, may_be_equal=False)
            made = _decided(of_body, inputs, options, found, time.perf_counter())
            assumed = [(outer[i], a) for i, a in made.assumed]
            if any(i is None for i, _ in assumed):
                made = made.without_rewrites("rewrite", "an assumption about a value that is no input")
                assumed = []
            yield name, replace(made, assumed=tuple((i, a) for i, a in assumed if i is not None))


def _called(node: fx.Node) -> Iterator[tuple[str, Sequence[Any] | None]]:
    """The names of the graphs that an operator calls, and what it gives each; None where that is its own affair."""
    graphs = [str(a.target) for a in node.args[:2] if isinstance(a, fx.Node)]
    if node.target is torch.ops.higher_order.tag_activation_checkpoint:
        yield graphs[0], node.args[1:]
    elif node.target is torch.ops.higher_order.autograd_function_apply:
        yield graphs[0], node.args[2:]
        yield graphs[1], None


def _number(arg: Any) -> Any:
    """An argument that is a number, or a symbolic one; None for a tensor, whose values nobody knows yet."""
    example = arg.meta.get("example_value") if isinstance(arg, fx.Node) else arg
    return None if isinstance(example, torch.Tensor) else example


def _with_bodies(gm: fx.GraphModule, own: Decision, bodies: Iterator[tuple[str, Decision]]) -> Decision:
    out = own
    for name, made in bodies:
        rewritten = out.rewritten
        if made.rewritten is not None:
            rewritten = rewritten or _copy(gm)
            setattr(rewritten, name, made.rewritten)
        report = replace(out.report + made.report, graphs=out.report.graphs)
        out = Decision(rewritten, report, (*out.assumed, *made.assumed))
    return out


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph in a module of its own, so that an attribute can be another one."""
    copied = fx.GraphModule(gm, gm.graph)
    copied.meta = gm.meta
    return copied


# ------------------------------------------------------------------------------------------------------------- details


def _is_state(match: Match) -> bool:
    """Whether the match is of a final state rather than of an output."""

    def indices(expr: Expr) -> set[int]:
        own = {expr.index} if isinstance(expr, Attend) else set()
        return own.union(*(indices(c) for c in children(expr))) if not isinstance(expr, Attend) else own

    return indices(match.replacement) == {1}


def _unserved(match: Match) -> Refusal | None:
    """A dtype, head size or device that no kernel serves."""
    from .kernels.select import refusal

    device = match.target.meta["example_value"].device.type
    for fact in match.facts:
        # Of a symbolic head size nothing is asked: each call looks for what serves its own.
        dk, dv = (n if isinstance(n, int) else 1 for n in (fact.dk, fact.dv))
        why = refusal(device_type=device, dtype=fact.dtype, dk=dk, dv=dv)
        if why is not None:
            return Refusal(
                "select", "unsupported", match.target, "a kernel for this case", why, progress=Progress.KERNEL
            )
    return None


def _unmet(match: Match, inputs: Mapping[fx.Node, Any]) -> Refusal | None:
    """An assumption that does not hold of the inputs at hand, or that cannot be asked of them.

    Those on values were read off these very inputs.
    """
    for assumption in (a for a in match.assumed if a.kind in ("positive", "share")):
        real = inputs.get(assumption.node)
        if isinstance(real, torch.Tensor) and not _compat.is_fake(real) and assumption.holds(real.detach()):
            continue
        return Refusal(
            "match",
            "decay",
            match.target,
            assumption.text,
            "an input of which that is not known",
            progress=Progress.INPUTS,
        )
    return None


def _reference(fact: DecayedAttention, q: Any, k: Any, v: Any, log_decay: Any, state: Any) -> tuple[Any, Any]:
    """The operator itself, with its own derivative, in whatever dtype it is given: for validation."""
    return torch.ops.lacompile.decayed_attention.default(q, k, v, log_decay, fact.scale, state, True, "")


def is_rewritten(gm: fx.GraphModule) -> bool:
    """Whether a graph, or one that it calls, holds the fused operator."""
    op = torch.ops.lacompile.decayed_attention.default
    return any(n.target is op for m in gm.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes)


def code_of(gm: fx.GraphModule) -> str:
    """The code of a graph and of those that it calls."""
    return "\n".join(m.code for m in gm.modules() if isinstance(m, fx.GraphModule))


__all__ = ["Decision", "code_of", "decide", "is_rewritten", "ops"]

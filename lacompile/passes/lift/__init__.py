"""From a Dynamo graph to facts: every value's normal form, and the decayed attentions among them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..._compat import hint
from ..capture.effects import Effects
from ..capture.gradients import Gradients
from ..facts import Match, Refusal
from ..graph.schedule import Schedule
from .inputs.alike import Equal, alike, argument_sizes
from .interpret import Interpreter
from .match import search
from .nested import with_nested
from .recipes.holders import holders


@dataclass(frozen=True, eq=False)
class Analysis:
    """What the lift and the match found in one Dynamo graph, and the order and the effects of its nodes."""

    matches: tuple[Match, ...]
    refusals: tuple[Refusal, ...]
    seconds: dict[str, float]
    schedule: Schedule
    equal: tuple[Equal, ...] = ()
    """Sizes that were taken for one, of which that has to be guarded."""


def analyse(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, buffers: str = "check", may_be_equal: bool = True
) -> Analysis:
    """What decayed attentions a Dynamo graph holds. Never raises, never changes ``gm``.

    Args:
        gm: the graph as Dynamo hands it to a backend.
        example_inputs: its inputs; real tensors, whose values are read for buffers and masks only.
        buffers: "never" forbids reading the values of buffers.
        may_be_equal: whether sizes of several inputs may be taken for one, which is then in ``equal``.
    """
    start = time.perf_counter()
    try:
        interpreter = Interpreter(read_buffers=buffers != "never")
        interpreter.run(gm, example_inputs)
        lifted = time.perf_counter()
        assert interpreter.capture is not None
        schedule = Schedule(gm, interpreter.capture.effects, interpreter.capture.gradients)
        matches, refusals = search(schedule, interpreter, holders(interpreter))
        equal: tuple[Equal, ...] = ()
        best, chosen = interpreter, dict[str, Any]()
        lengths = _lengths(gm, example_inputs)
        for settings, settles in _other_readings(interpreter, gm, example_inputs, may_be_equal):
            missed = refusals or not matches or _parts(lengths, matches)
            if not missed and "turned_whole" not in settings:
                continue
            other = Interpreter(read_buffers=interpreter.read_buffers, **settings)
            other.run(gm, example_inputs)
            found, left = search(schedule, other, holders(other))
            these = _lengths(gm, example_inputs, other.equal)
            # Where a loop over chunks settles the length, what was found without it is chunks.
            chunks = settles and matches and _parts(lengths, matches) == sum(len(m.facts) for m in matches)
            if chunks or (found and _missing(these, found, left) < _missing(lengths, matches, refusals)):
                matches, refusals, equal, lengths = found, left, tuple(other.equal), these
                best, chosen = other, settings

        def look(cuts: frozenset[fx.Node]) -> tuple[Interpreter, list[Match], list[Refusal]]:
            again = Interpreter(read_buffers=interpreter.read_buffers, cuts=cuts, **chosen)
            again.run(gm, example_inputs)
            return again, *search(schedule, again, holders(again))

        matches, refusals = with_nested(schedule, best, (matches, refusals), look)
    except Exception as error:  # an analysis that fails must never break a compile: the graph stays as it was
        refusal = Refusal(
            "lift", "internal-error", None, "an analysis of the graph", f"{type(error).__name__}: {error}"
        )
        unknown = Effects()
        nothing = Schedule(gm, unknown, Gradients(unknown))
        return Analysis((), (refusal,), {"analysis": time.perf_counter() - start}, nothing)
    seconds = {"lift": lifted - start, "match": time.perf_counter() - lifted}
    return Analysis(tuple(matches), tuple(refusals), seconds, schedule, equal)


def _other_readings(
    first: Interpreter, gm: fx.GraphModule, example_inputs: Sequence[Any], may_be_equal: bool
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Where rounding leaves another reading of a buffer, inputs are turned or weighed, a sum over a part of a dimension
    is no decay, or sizes of several may be one.

    Each is what an interpreter is told for it, and whether that is the length that a loop over chunks has.
    """
    if first.statics is not None and (first.statics.ambiguous or _multiplied(first, first.statics.lines)):
        yield {"reading": 1}, False
    if first.engine.turned:
        yield {"turned_whole": True}, False
    if first.engine.weighed:
        yield {"weighed_whole": True}, False
    if first.engine.parts_weighed:
        yield {"parts_whole": True}, False
    inputs = gm.graph.find_nodes(op="placeholder")
    if may_be_equal and (equal := alike(inputs, example_inputs)):
        yield {"equal": equal}, False
        if first.engine.parts_weighed:
            yield {"equal": equal, "parts_whole": True}, False
    confined = first.engine.sizes.confined
    if may_be_equal and confined and (numbers := alike(inputs, example_inputs, confined)) != equal:
        yield {"equal": numbers}, True


def _multiplied(interpreter: Interpreter, leaves: set[int]) -> bool:
    """Whether data is multiplied by one of these as it stands, as by a weight and never by a slope."""
    values = (known.value for known in interpreter.known.values()) if leaves else ()
    signatures = (t.signature for v in values for c in v.cases for t in c.terms if len(t.accs) > 1)
    return any(not leaves.isdisjoint(signature) for signature in signatures)


def _missing(lengths: set[str], matches: Sequence[Match], refusals: Sequence[Refusal]) -> tuple[int, ...]:
    """What a reading leaves to be wished for: of two the one that is less is better."""
    rows = sum(hint(f.heads) * hint(f.length) for m in matches for f in m.facts)
    return not matches, _parts(lengths, matches), len(refusals), -rows, len(matches)


def _lengths(gm: fx.GraphModule, example_inputs: Sequence[Any], equal: Sequence[Equal] = ()) -> set[str]:
    """How long sequences may be: of each argument the longest dimension but features, and those that are no number.

    A chunk may be as long as a batch is large, or a matrix wide. Those that some are taken for are among them.
    """
    found: set[str] = set()
    for node, real in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False):
        if sizes := argument_sizes(node, real):
            sizes = sizes[:-1] if node.meta["example_value"].is_floating_point() else sizes
            longest = max((n for n in sizes if isinstance(n, int)), default=0)
            found |= {str(n) for n in sizes if not isinstance(n, int) or n == longest}
    return found | {str(number) for size, number in equal if str(size) in found}


def _parts(lengths: set[str], matches: Sequence[Match]) -> int:
    """How many attentions have no length of a sequence, and so may be parts of what a loop computes."""
    return sum(str(f.length) not in lengths for m in matches for f in m.facts)


__all__ = ["Analysis", "analyse"]

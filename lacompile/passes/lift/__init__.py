"""From a Dynamo graph to facts: every value's normal form, and the decayed attentions among them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..effects import Effects
from ..facts import Match, Refusal
from ..schedule import Schedule
from .holders import holders
from .interpret import Interpreter
from .match import search


@dataclass(frozen=True, eq=False)
class Analysis:
    """What the lift and the match found in one Dynamo graph, and the order and the effects of its nodes."""

    matches: tuple[Match, ...]
    refusals: tuple[Refusal, ...]
    seconds: dict[str, float]
    schedule: Schedule


def analyse(gm: fx.GraphModule, example_inputs: Sequence[Any], *, buffers: str = "check") -> Analysis:
    """What decayed attentions a Dynamo graph holds. Never raises, never changes ``gm``.

    Args:
        gm: the graph as Dynamo hands it to a backend.
        example_inputs: its inputs; real tensors, whose values are read for buffers and masks only.
        buffers: "never" forbids reading the values of buffers.
    """
    start = time.perf_counter()
    try:
        interpreter = Interpreter(read_buffers=buffers != "never")
        interpreter.run(gm, example_inputs)
        lifted = time.perf_counter()
        assert interpreter.capture is not None
        schedule = Schedule(gm, interpreter.capture.effects)
        matches, refusals = search(schedule, interpreter, holders(interpreter))
        if refusals and interpreter.statics is not None and interpreter.statics.ambiguous:
            other = Interpreter(reading=1)
            other.run(gm, example_inputs)
            found, left = search(schedule, other, holders(other))
            if len(left) < len(refusals):
                matches, refusals = found, left
    except Exception as error:  # an analysis that fails must never break a compile: the graph stays as it was
        refusal = Refusal(
            "lift", "internal-error", None, "an analysis of the graph", f"{type(error).__name__}: {error}"
        )
        return Analysis((), (refusal,), {"analysis": time.perf_counter() - start}, Schedule(gm, Effects()))
    seconds = {"lift": lifted - start, "match": time.perf_counter() - lifted}
    return Analysis(tuple(matches), tuple(refusals), seconds, schedule)


__all__ = ["Analysis", "analyse"]

"""One graph, read in as many ways as may show more, and what the best of them found."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..capture.effects import Effects
from ..capture.gradients import Gradients
from ..facts import Match, Refusal
from ..graph.schedule import Schedule
from .domain.choices import Choices, Equal
from .interpret import Interpreter
from .match import search
from .nested import with_nested
from .readings import lengths_of, missing, other_choices, parts
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
        return _analysed(gm, example_inputs, buffers != "never", may_be_equal, start)
    except Exception as error:  # an analysis that fails must never break a compile: the graph stays as it was
        refusal = Refusal(
            "lift", "internal-error", None, "an analysis of the graph", f"{type(error).__name__}: {error}"
        )
        unknown = Effects()
        nothing = Schedule(gm, unknown, Gradients(unknown))
        return Analysis((), (refusal,), {"analysis": time.perf_counter() - start}, nothing)


def _analysed(
    gm: fx.GraphModule, example_inputs: Sequence[Any], read_buffers: bool, may_be_equal: bool, start: float
) -> Analysis:
    best = Interpreter(read_buffers=read_buffers)
    best.run(gm, example_inputs)
    lifted = time.perf_counter()
    assert best.capture is not None
    schedule = Schedule(gm, best.capture.effects, best.capture.gradients)

    def read(
        choices: Choices, cuts: frozenset[fx.Node] = frozenset()
    ) -> tuple[Interpreter, list[Match], list[Refusal]]:
        again = Interpreter(read_buffers=read_buffers, choices=choices, cuts=cuts)
        again.run(gm, example_inputs)
        return again, *search(schedule, again, holders(again))

    matches, refusals = search(schedule, best, holders(best))
    lengths = lengths_of(gm, example_inputs)
    for choices, settles in other_choices(best, gm, example_inputs, may_be_equal):
        missed = refusals or not matches or parts(lengths, matches)
        if not missed and not choices.turned_whole:
            continue
        other, found, left = read(choices)
        these = lengths_of(gm, example_inputs, choices.equal)
        # Where a loop over chunks settles the length, what was found without it is chunks.
        chunks = settles and matches and parts(lengths, matches) == sum(len(m.facts) for m in matches)
        if chunks or (found and missing(these, found, left) < missing(lengths, matches, refusals)):
            best, matches, refusals, lengths = other, found, left, these
    chosen = best.choices
    matches, refusals = with_nested(schedule, best, (matches, refusals), lambda cuts: read(chosen, cuts))
    seconds = {"lift": lifted - start, "match": time.perf_counter() - lifted}
    return Analysis(tuple(matches), tuple(refusals), seconds, schedule, chosen.equal)

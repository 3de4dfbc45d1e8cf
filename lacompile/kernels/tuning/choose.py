"""Which of the candidates a kernel gets: what was measured for it, or the safe one.

``LACOMPILE_AUTOTUNE`` says what may be done to find out:

- ``off``: the safe candidate.
- ``cached`` (default): what this machine has stored, else what is shipped for this GPU, else the safe candidate.
  Nothing is ever measured.
- ``quick``: the same, but what neither knows is searched for, a few candidates within QUICK seconds, and stored.
- ``full``: everything is searched for among all candidates, within FULL seconds each, unless that is stored already.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Literal, cast, get_args

import torch

from ...errors import BadOptionValue
from . import table
from .identity import Identity
from .search import Progress, search
from .space import Config, Kind

Mode = Literal["off", "cached", "quick", "full"]
QUICK, FULL = 15.0, 120.0
"""Seconds for one kind of kernel."""
FEW = 3
"""Candidates of a quick search."""

_read: dict[tuple[Identity, bool], table.Table] = {}


def mode() -> Mode:
    """What the environment asks for.

    Raises:
        BadOptionValue: no such mode.
    """
    found = os.environ.get("LACOMPILE_AUTOTUNE", "cached").lower()
    if found not in get_args(Mode):
        raise BadOptionValue("LACOMPILE_AUTOTUNE", found, "one of " + ", ".join(map(repr, get_args(Mode))))
    return cast(Mode, found)


def forget() -> None:
    """Reads the files again."""
    _read.clear()


def _known(about: Identity, *, shipped: bool) -> table.Table:
    if (about, shipped) not in _read:
        path = table.shipped_path(about.gpu) if shipped else table.stored_path(about)
        _read[about, shipped] = table.read(path)
    return _read[about, shipped]


def place(
    kind: Kind,
    candidates: Sequence[Config],
    device: torch.device,
    identity: Callable[[torch.device], Identity],
    measure: Callable[[int], float | None],
) -> int:
    """The place of the tiles for this kind of kernel among its candidates.

    Args:
        kind: what the choice is remembered by.
        candidates: the safe one first.
        device: where the kernel is to run.
        identity: what is known holds for this alone.
        measure: milliseconds of a candidate by its place; None if it does not run or is wrong.
    """
    how = mode()
    if len(candidates) == 1 or how == "off" or device.type != "cuda":
        return 0
    about = identity(device)
    stored, shipped = (_known(about, shipped=s).get(str(kind)) for s in (False, True))
    usable = [stored if how != "full" or (stored and stored.complete) else None, shipped if how != "full" else None]
    for winner in usable:
        found = None if winner is None else winner.place(candidates)
        if found is not None:
            return found
    if how == "cached" or torch.cuda.is_current_stream_capturing():
        return 0
    count, budget = (min(FEW, len(candidates)), QUICK) if how == "quick" else (len(candidates), FULL)
    best = search(count, measure, budget, Progress(str(kind), count, budget))
    complete = len(best.milliseconds) == len(candidates)
    winner = table.Winner.of(candidates[best.place], best.milliseconds, complete)
    _known(about, shipped=False)[str(kind)] = winner
    table.store(about, kind, winner)
    return best.place

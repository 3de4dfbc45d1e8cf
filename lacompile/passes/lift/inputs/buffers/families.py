"""Buffers of one slope: those of a module that were made together, and the one among them that is the slope itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...domain.affine import Aff
from .fits import Fit, fit
from .slopes import Slopes, slope_of

SHORTEST_LINE = 4  # of two entries any two positive numbers are one, and of three a few


@dataclass
class Family:
    """Buffers made from one slope per head; ``place`` is the position of the first one among the inputs."""

    slopes: Slopes
    place: int
    members: list[int]
    direct: list[tuple[int, str, np.ndarray]]

    def source(self) -> tuple[int, str] | None:
        """The buffer that is the slope itself, exactly enough to explain the others, and how to read it."""
        return next(((n, how) for n, how, values in self.direct if self.slopes.holds(values)), None)


def families(fits: dict[int, Fit], vectors: dict[int, torch.Tensor]) -> list[Family]:
    """Groups of buffers whose slopes meet; the keys are positions among the inputs, near ones are tried first."""
    out: list[Family] = []
    readings = [(n, how, values, slopes) for n, t in vectors.items() for how, values, slopes in slope_of(t)]
    for n, f in fits.items():
        if not f.constant and not _joined(out, n, f):
            out.append(Family(f.slopes, n, [n], []))
    for family in out:
        for n, how, values, slopes in sorted(readings, key=lambda r: abs(r[0] - family.place)):
            both = family.slopes.meet(slopes)
            if both is not None:
                family.slopes = both
                family.direct.append((n, how, values))
                break
    known = {n for family in out for n, _, _ in family.direct}
    tiny = [Family(slopes, n, [], [(n, how, values)]) for n, how, values, slopes in readings if n not in known]
    for n, f in fits.items():
        if f.constant and not _joined(out, n, f):
            _joined(tiny, n, f)
    return out + [g for g in tiny if g.members]


def block_decays(groups: Sequence[Family], vectors: dict[int, torch.Tensor]) -> dict[int, Fit]:
    """Vectors that decay by several steps of a family at once, as from chunk to chunk; they join it."""
    out: dict[int, Fit] = {}
    for n, vector in vectors.items():
        heads = tuple(d for d, size in enumerate(vector.shape) if size > 1)
        several = next((s for how, _, s in slope_of(vector) if how == "decay"), None)
        if several is None or any(n in {m for m, _, _ in g.direct} for g in groups):
            continue
        for family in sorted(groups, key=lambda g: abs(g.place - n)):
            if family.slopes.low.shape != several.low.shape or not family.slopes.middle.all():
                continue
            steps = round(float(np.median(several.middle / family.slopes.middle)))
            both = family.slopes.meet(Slopes(several.low / steps, several.high / steps)) if steps > 1 else None
            if both is not None:
                family.slopes = both
                family.members.append(n)
                out[n] = Fit(heads, (Aff.lit(steps),), (), both, log_space=False)
                break
    return out


def lines(groups: list[Family], vectors: dict[int, torch.Tensor], *, alone: bool) -> tuple[dict[int, Fit], list[int]]:
    """Vectors that decay from entry to entry, by the one slope of a family, which they join, or of none.

    ``alone``: each of these is a family. Such a vector may as well hold the slopes of heads.
    """
    out: dict[int, Fit] = {}
    left: list[int] = []
    known = {n for g in groups for n, _, _ in g.direct}
    for n, vector in vectors.items():
        found = fit(vector, line=True) if n not in known and vector.numel() >= SHORTEST_LINE else None
        if found is None or found.constant:
            continue
        if not _joined(groups, n, found):
            if not alone:
                left.append(n)
                continue
            groups.append(Family(found.slopes, n, [n], []))
        out[n] = found
    return out, left


def _joined(groups: list[Family], n: int, f: Fit) -> bool:
    """Whether one of the groups takes the buffer in; the nearest is asked first."""
    for family in sorted(groups, key=lambda g: abs(g.place - n)):
        both = family.slopes.meet(f.slopes)
        if both is not None:
            family.slopes, family.place = both, n
            family.members.append(n)
            return True
    return False

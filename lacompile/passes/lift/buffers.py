"""Precomputed decays: what the numbers of a buffer say, as a guarded exponential of its indices.

A mask or a decay factor that a module computed once is data to the graph. Its values are fitted, every entry, in fp64:

    value[h, r, c] = exp(-slope[h] * A(r, c))  on  low <= r - c <= high,  0 elsewhere        A integer-affine

or the logarithm of that. Rounding leaves not one slope per head that explains all entries but an interval: as wide as
the rounding of the entry (a checkpoint is often cast to bf16) and of the exponent it was computed from. Buffers of one
module were made from one slope, so their intervals must meet; the graph's own slope is used where it lies inside.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .affine import ONE, Aff

MAX_ENTRIES = 2**27
EXPONENT_ERROR = 2.0**-22  # of an exponent computed in fp32: its own rounding grows with its size
EXPONENT_ERROR_FP64 = 2.0**-51  # of one computed in fp64


@dataclass(frozen=True)
class Slopes:
    """For each head, the interval of slopes that explains what was seen."""

    low: np.ndarray
    high: np.ndarray

    def meet(self, other: Slopes) -> Slopes | None:
        """What explains both; None if some head has no such slope."""
        if self.low.shape != other.low.shape:
            return None
        both = Slopes(np.maximum(self.low, other.low), np.minimum(self.high, other.high))
        return both if (both.low <= both.high).all() else None

    def holds(self, values: np.ndarray) -> bool:
        return values.shape == self.low.shape and bool(((values >= self.low) & (values <= self.high)).all())

    @property
    def middle(self) -> np.ndarray:
        return (self.low + np.where(np.isinf(self.high), self.low, self.high)) / 2


@dataclass(frozen=True)
class Fit:
    """A buffer as a guarded exponential.

    ``constant``: every entry is one inside the same band of all heads and zero outside it, so it is a mask that only
    selects, or a decay by a slope too small for its format; then ``distances`` are all the readings that would explain
    it as the latter.
    """

    heads: tuple[int, ...]
    distances: tuple[Aff, ...]
    guards: tuple[Aff, ...]
    slopes: Slopes
    log_space: bool
    constant: bool = False

    @property
    def selects(self) -> bool:
        """Without a slope it still says something: where it is zero."""
        return self.constant and bool(self.guards)


def fit(tensor: torch.Tensor, error: float = EXPONENT_ERROR, *, square: bool = False) -> Fit | None:
    """The guarded exponential that explains every entry of ``tensor``, or None.

    Args:
        tensor: the numbers.
        error: how far an exponent may be off, relative to itself and to 1: the rounding of what it was computed in.
        square: only as a mask, which is zero for some pairs of positions out of as many rows as columns.
    """
    if tensor.numel() > MAX_ENTRIES or tensor.dim() > 6:
        return None
    dims = [d for d, n in enumerate(tensor.shape) if n > 1]
    pairs = list(_moving_dims(tensor.shape, dims)) if len(dims) > 1 else []
    if square:
        pairs = [p for p in pairs if len(p) == 2 and tensor.shape[p[0]] == tensor.shape[p[1]]]
    if not pairs or (kind := _kind(tensor)) is None:
        return None
    log_space = kind == "log"
    for moving in pairs:
        heads = tuple(d for d in dims if d not in moving)
        if max((tensor.shape[d] for d in heads), default=1) > 4096:
            continue
        found = _fit_moving(tensor, heads, moving, log_space, error)
        if found is not None and (found.guards or not square):
            return found
    return None


def selected(fit: Fit, like: torch.Tensor) -> torch.Tensor:
    """What a mask that only selects looks like in the shape, format and place of another tensor."""
    inside = torch.ones((), dtype=torch.bool, device=like.device)
    for guard in fit.guards:
        at = torch.full((), int(guard.const), device=like.device)
        for d, c in guard.terms:
            steps = torch.arange(like.shape[d], device=like.device) * int(c)
            at = at + steps.reshape([-1 if n == d else 1 for n in range(like.dim())])
        inside = inside & (at >= 0)
    made = torch.zeros(inside.shape, dtype=like.dtype, device=like.device)
    made = made.masked_fill(~inside, float("-inf")) if fit.log_space else made.masked_fill(inside, 1)
    return made.expand(like.shape)


def slope_of(tensor: torch.Tensor) -> Iterable[tuple[str, np.ndarray, Slopes]]:
    """The readings of a small vector as slopes: as it is, negated, or as decay factors, with the interval of each."""
    if not tensor.is_floating_point() or not 0 < tensor.numel() <= 4096:
        return
    x = tensor.detach().to("cpu", torch.float64).numpy().reshape([n for n in tensor.shape if n > 1])
    error = rounding(tensor.dtype) + EXPONENT_ERROR
    if (x > 0).all():
        yield "slope", x, Slopes(x * (1 - error), x * (1 + error))
    if (x < 0).all():
        yield "log decay", -x, Slopes(-x * (1 - error), -x * (1 + error))
    if ((x > 0) & (x < 1)).all():
        s = -np.log(x)
        yield "decay", s, Slopes(np.maximum(s - error, 0), s + error)


def rounding(dtype: torch.dtype) -> float:
    """How far a number of this format may be from what it was rounded from, relative to itself."""
    return float(torch.finfo(dtype).eps) / 2 if dtype.is_floating_point else 0.0


def _kind(tensor: torch.Tensor) -> str | None:
    """Cheap signs that a tensor is a weight (in [0, 1]) or its logarithm (at most 0)."""
    if tensor.dtype is torch.bool:
        return "weight"
    if tensor.is_complex():
        return None
    low, high = (float(x) for x in torch.aminmax(tensor.detach()))
    if low >= 0 and 0 < high <= 1:
        return "weight"
    return "log" if high == 0 and low < 0 and tensor.is_floating_point() else None


def _moving_dims(shape: Sequence[int], dims: Sequence[int]) -> Iterable[tuple[int, ...]]:
    """Which dimensions are positions: the last two of one length, then single ones, the longest first."""
    if shape[dims[-1]] == shape[dims[-2]]:
        yield (dims[-2], dims[-1])
    yield from ((d,) for d in sorted(dims, key=lambda d: -shape[d]))
    yield from (p for p in itertools.combinations(dims, 2) if p != (dims[-2], dims[-1]))
    if shape[dims[-1]] != shape[dims[-2]]:
        yield (dims[-2], dims[-1])


# ------------------------------------------------------------------------------------------------------- one partition


def _fit_moving(
    tensor: torch.Tensor, heads: tuple[int, ...], moving: tuple[int, ...], log_space: bool, error: float
) -> Fit | None:
    others = [d for d in range(tensor.dim()) if d not in heads and d not in moving]
    values = tensor.detach().to("cpu").permute(*heads, *moving, *others)
    values = values.reshape([tensor.shape[d] for d in (*heads, *moving)])
    flat = values.reshape(-1, *[tensor.shape[d] for d in moving])
    band = _band(flat, log_space) if len(moving) == 2 else None
    if len(moving) == 2 and band is None:
        return None
    if len(moving) == 1 and bool((_support(flat, log_space) == 0).any()) and not _may_underflow(flat):
        return None
    constant = bool(((flat == (0 if log_space else 1)) == _inside(flat, band)).all())
    readings: list[tuple[Aff, Slopes]] = []
    for coefs in _candidates(flat, moving, log_space, constant, band):
        ends = _intervals(flat, coefs, band, log_space, tensor.dtype, error)
        if ends is None:
            continue
        low, high = (x.reshape([tensor.shape[d] for d in heads]) for x in ends)
        distance = Aff.of(dict(zip(moving, coefs[1:], strict=True)), coefs[0])
        readings.append((distance, Slopes(low, high)))
        if not constant:
            break
    if not readings:
        size = [tensor.shape[d] for d in heads]
        never = Slopes(np.full(size, 1.0), np.full(size, -1.0))
        guards = _guards(moving, band, flat)
        return Fit(heads, (), guards, never, log_space, constant) if constant and guards else None
    slopes = readings[0][1]
    for _, other in readings[1:]:
        slopes = slopes.meet(other) or slopes
    return Fit(heads, tuple(r[0] for r in readings), _guards(moving, band, flat), slopes, log_space, constant)


def _support(flat: torch.Tensor, log_space: bool) -> torch.Tensor:
    return torch.isfinite(flat) if log_space else flat != 0


def _may_underflow(flat: torch.Tensor) -> bool:
    return flat.is_floating_point() and bool((flat[flat > 0] < 1e-20).any())


def _band(flat: torch.Tensor, log_space: bool) -> tuple[int, int] | None:
    """The smallest and largest r - c with a non-zero entry in any head; the whole range where nothing is zero."""
    support = _support(flat, log_space).any(0)
    rows, columns = support.nonzero(as_tuple=True)
    if not len(rows):
        return None
    distance = rows - columns
    return int(distance.min()), int(distance.max())


def _inside(flat: torch.Tensor, band: tuple[int, int] | None) -> torch.Tensor:
    """The entries with a distance in the band; all where there is none."""
    if band is None:
        return torch.ones(flat.shape[1:], dtype=torch.bool)
    rows, columns = (torch.arange(n) for n in flat.shape[1:])
    distance = rows[:, None] - columns[None, :]
    return (distance >= band[0]) & (distance <= band[1])


def _guards(moving: tuple[int, ...], band: tuple[int, int] | None, flat: torch.Tensor) -> tuple[Aff, ...]:
    if band is None:
        return ()
    difference = Aff.var(moving[0]) - Aff.var(moving[1])
    out = []
    if band[0] > -(flat.shape[2] - 1):
        out.append(difference - band[0])
    if band[1] < flat.shape[1] - 1:
        out.append(-difference + band[1])
    return tuple(out)


def _candidates(
    flat: torch.Tensor, moving: tuple[int, ...], log_space: bool, constant: bool, band: tuple[int, int] | None
) -> Iterable[tuple[int, ...]]:
    """Distances (constant, coefficients) worth trying.

    Positions counted from the start, to the end, and between each other come first: where rounding leaves a choice (a
    slope too small for the format) these are what a chunk's decays are. Else a least-squares line through the head
    whose logarithms reach furthest.
    """
    if band is not None:
        if not constant or band[0] >= 0:
            yield (0, 1, -1)
        if not constant or band[1] <= 0:
            yield (0, -1, 1)
    else:
        n = flat.shape[1]
        yield from ((1, 1), (n - 1, -1))
        if not constant:
            yield from ((0, 1), (n, -1))
    line = None if constant else _line(flat, log_space)
    if line is not None:
        yield line


def _line(flat: torch.Tensor, log_space: bool) -> tuple[int, ...] | None:
    support = _support(flat, log_space)
    logs = torch.where(support, -(flat.double() if log_space else flat.double().clamp(min=1e-300).log()), 0.0)
    if not log_space:
        logs = torch.where(flat > 1e-30, logs, 0.0)
    head = int(logs.flatten(1).amax(1).argmax())
    where = (logs[head] != 0).nonzero()
    if len(where) < 3:
        return None
    where = where[torch.linspace(0, len(where) - 1, min(len(where), 64)).long()]
    matrix = np.concatenate([np.ones((len(where), 1)), where.numpy()], 1).astype(float)
    target = logs[head][tuple(where.T)].numpy()
    solution, *_ = np.linalg.lstsq(matrix, target, rcond=None)
    steps = [abs(c) for c in solution[1:] if abs(c) > 1e-9 * abs(target).max()]
    if not steps:
        return None
    return tuple(round(float(c / min(steps))) for c in solution)


def _intervals(
    flat: torch.Tensor,
    coefs: tuple[int, ...],
    band: tuple[int, int] | None,
    log_space: bool,
    dtype: torch.dtype,
    error: float,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Per head the slopes that explain every entry; None if some head has none."""
    grid = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in flat.shape[1:]), indexing="ij")
    distance = sum((c * g for c, g in zip(coefs[1:], grid, strict=True)), np.full(grid[0].shape, float(coefs[0])))
    inside = np.ones(distance.shape, dtype=bool)
    if band is not None:
        difference = grid[0] - grid[1]
        inside = (difference >= band[0]) & (difference <= band[1])
    out = []
    for head in flat:
        ends = _head_interval(head.to(torch.float64).numpy(), distance, inside, log_space, dtype, error)
        if ends is None:
            return None
        out.append(ends)
    low, high = (np.array(x) for x in zip(*out, strict=True))
    return low, high


def _head_interval(
    values: np.ndarray, distance: np.ndarray, inside: np.ndarray, log_space: bool, dtype: torch.dtype, error: float
) -> tuple[float, float] | None:
    nothing = -math.inf if log_space else 0.0
    if (values[~inside] != nothing).any():
        return None
    kept, at = values[inside], distance[inside]
    whole = not dtype.is_floating_point
    if whole and not kept.all():
        return None
    relative = rounding(dtype)
    if log_space:
        if np.isinf(kept).any():
            return None
        exponent, slack = -kept, np.abs(kept) * (relative + error)
        lost = np.zeros(kept.shape, dtype=bool)
    else:
        smallest, step = (0.0, 0.0) if whole else _smallest(dtype)
        lost = kept < smallest  # only that it is tiny is known
        exponent = -np.log(np.where(lost, 1.0, kept))
        slack = np.log1p(np.maximum(relative, step / 2 / np.where(lost, 1.0, kept))) + error * (1 + exponent)
    low, high = 0.0, math.inf
    if lost.any():
        if (at[lost] <= 0).any():
            return None
        low = float((-math.log(smallest) / at[lost]).max()) * (1 - 1e-3) if smallest else math.inf
    exponent, slack, at = exponent[~lost], slack[~lost], at[~lost]
    if (np.abs(exponent[at == 0]) > slack[at == 0]).any():
        return None
    ahead = at != 0
    if ahead.any():
        first, second = ((exponent + s * slack)[ahead] / at[ahead] for s in (-1, 1))
        low = max(low, float(np.minimum(first, second).max()))
        high = min(high, float(np.maximum(first, second).min()))
    return (low, high) if low <= high else None


def _smallest(dtype: torch.dtype) -> tuple[float, float]:
    """Below which number an entry may be anything, and the steps that subnormal numbers go in.

    An operation may flush subnormal numbers to zero: none of them makes a difference to a sum, but for those of fp16,
    which are as large as 6e-5. Those a wider format is rounded to.
    """
    normal, eps = float(torch.finfo(dtype).smallest_normal), float(torch.finfo(dtype).eps)
    return 4 * (normal * eps if dtype is torch.float16 else normal), normal * eps


# ------------------------------------------------------------------------------------------------- buffers of one slope


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
    """Vectors that decay by several steps of a family at once, as from chunk to chunk; they join it.

    One number alone proves nothing: only vectors over several heads are read so.
    """
    out: dict[int, Fit] = {}
    for n, vector in vectors.items():
        heads = tuple(d for d, size in enumerate(vector.shape) if size > 1)
        several = next((s for how, _, s in slope_of(vector) if how == "decay"), None) if heads else None
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


def _joined(groups: list[Family], n: int, f: Fit) -> bool:
    """Whether one of the groups takes the buffer in; the nearest is asked first."""
    for family in sorted(groups, key=lambda g: abs(g.place - n)):
        both = family.slopes.meet(f.slopes)
        if both is not None:
            family.slopes, family.place = both, n
            family.members.append(n)
            return True
    return False


def head_index(fit: Fit) -> tuple[Aff, ...]:
    """The index of a table of slopes, one per head dimension of the buffer."""
    return tuple(Aff.var(d) for d in fit.heads)


def aligned(shape: Sequence[Aff], fit: Fit) -> tuple[Aff, ...] | None:
    """The index of a slope tensor of this shape at the buffer's heads; None if the head dimensions do not pair."""
    real = [d for d, n in enumerate(shape) if n != ONE]
    if len(real) != len(fit.heads):
        return None
    at = dict(zip(real, fit.heads, strict=True))
    return tuple(Aff.var(at[d]) if d in at else Aff() for d in range(len(shape)))

"""One buffer as a guarded exponential: which of its dimensions are positions, where it is zero, and its slopes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ...domain.affine import ONE, Aff
from ...transfer.exponentials import HIDES
from .entries import intervals
from .slopes import EXPONENT_ERROR, Slopes

MAX_ENTRIES = 2**27
MAX_HEADS = 1024
FAINT = 1e-10  # a weight behind which the next may be none


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
    outside: float = -math.inf
    """Of logarithms: what every entry outside the band is, a number so low that no weight is left."""
    numbers: tuple[float, float] | None = None
    """What every entry inside the band is, and outside, where a mask that only selects does so by two other numbers."""

    mirrored: bool = False
    """Whether every entry outside the band is the one that lies opposite the diagonal."""

    @property
    def selects(self) -> bool:
        """Without a slope it still says something: where it is zero."""
        return self.constant and bool(self.guards)

    @property
    def chosen(self) -> tuple[float, float]:
        """The numbers by which it selects, inside and outside."""
        return self.numbers or ((0.0, self.outside) if self.log_space else (1.0, 0.0))


def fit(tensor: torch.Tensor, error: float = EXPONENT_ERROR, *, square: bool = False, line: bool = False) -> Fit | None:
    """The guarded exponential that explains every entry of ``tensor``, or None.

    Args:
        tensor: the numbers.
        error: how far an exponent may be off, relative to itself and to 1: the rounding of what it was computed in.
        square: only as a mask, which is zero for some pairs of positions out of as many rows as columns.
        line: also if it has one dimension, that of positions.
    """
    if tensor.numel() > MAX_ENTRIES or tensor.dim() > 6:
        return None
    dims = [d for d, n in enumerate(tensor.shape) if n > 1]
    pairs = list(_moving_dims(tensor.shape, dims)) if len(dims) > 1 else [tuple(dims)] if line and dims else []
    if square:
        pairs = [p for p in pairs if len(p) == 2 and tensor.shape[p[0]] == tensor.shape[p[1]]]
    if not pairs:
        return None
    return _weights(tensor, dims, pairs, error, square) or _of_two_numbers(tensor, dims, pairs)


def _weights(
    tensor: torch.Tensor, dims: list[int], pairs: list[tuple[int, ...]], error: float, square: bool
) -> Fit | None:
    if (kind := _kind(tensor)) is None:
        return None
    log_space, outside = kind == "log", -math.inf
    if log_space and HIDES > (lowest := float(tensor.min())) > -math.inf and float(tensor.max()) <= 0:
        tensor, outside = tensor.masked_fill(tensor == lowest, -math.inf), lowest
    for moving in pairs:
        heads = tuple(d for d in dims if d not in moving)
        if max((tensor.shape[d] for d in heads), default=1) > MAX_HEADS:
            continue
        found = _fit_moving(tensor, heads, moving, log_space, error)
        if found is not None and (found.guards or not square):
            return replace(found, outside=outside)
    return None


def _of_two_numbers(tensor: torch.Tensor, dims: list[int], pairs: list[tuple[int, ...]]) -> Fit | None:
    """A mask of all pairs that tells a band from the rest by any two numbers, such as 1 and minus infinity."""
    tensor = tensor.detach()
    if not tensor.is_floating_point() or tensor[(slice(8),) * tensor.dim()].unique().numel() > 2:
        return None  # most tensors are not, which a corner shows
    low, high = torch.aminmax(tensor)
    above = tensor == high
    if low == high or not bool((above | (tensor == low)).all()):
        return None
    numbers = float(high), float(low)
    for moving in (p for p in pairs if len(p) == 2 and tensor.shape[p[0]] == tensor.shape[p[1]]):
        heads = tuple(d for d in dims if d not in moving)
        found = _fit_moving(above, heads, moving, False, EXPONENT_ERROR)
        if found is not None and found.selects:
            return Fit(heads, (), found.guards, _no_slopes(tensor, heads), False, True, numbers=numbers)
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
    number, outside = fit.chosen
    made = torch.full(inside.shape, outside, dtype=like.dtype, device=like.device)
    return made.masked_fill(inside, number).expand(like.shape)


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


def _kind(tensor: torch.Tensor) -> str | None:
    """Cheap signs that a tensor is a weight (in [0, 1]) or its logarithm (at most 0)."""
    if tensor.dtype is torch.bool:
        return "weight"
    if tensor.is_complex():
        return None
    low, high = (float(x) for x in torch.aminmax(tensor.detach()))
    if low >= 0 and 0 < high <= 1:
        return "weight"
    signed = high == -low and tensor.dim() > 1 and not tensor[..., 0, 0].any()  # ALiBi's, of all pairs of positions
    return "log" if (high == 0 or signed) and low < 0 and tensor.is_floating_point() else None


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
    if len(moving) == 2:
        found = (_fit_band(tensor, flat, heads, moving, band, log_space, error) for band in _bands(flat, log_space))
        return next((f for f in found if f is not None), None)
    if bool((_support(flat, log_space) == 0).any()) and not _may_underflow(flat):
        return None
    return _fit_band(tensor, flat, heads, moving, None, log_space, error)


def _fit_band(
    tensor: torch.Tensor,
    flat: torch.Tensor,
    heads: tuple[int, ...],
    moving: tuple[int, ...],
    band: tuple[int, int] | None,
    log_space: bool,
    error: float,
) -> Fit | None:
    """The entries ``flat``, heads first, of one or two dimensions of positions, given where they are zero."""
    inside = _inside(flat, band)
    constant = bool(((flat == (0 if log_space else 1)) == inside).all())
    readings: list[tuple[Aff, Slopes]] = []
    for coefs in _candidates(flat, log_space, constant, band):
        ends = intervals(flat, inside, coefs, log_space, error)
        if ends is None:
            continue
        low, high = (x.reshape([tensor.shape[d] for d in heads]) for x in ends)
        distance = Aff.of(dict(zip(moving, coefs[1:], strict=True)), coefs[0])
        readings.append((distance, Slopes(low, high)))
        if not constant:
            break
    if not readings:
        guards = _guards(moving, band, flat)
        return Fit(heads, (), guards, _no_slopes(tensor, heads), log_space, constant) if constant and guards else None
    slopes = readings[0][1]
    for _, other in readings[1:]:
        slopes = slopes.meet(other) or slopes
    return Fit(heads, tuple(r[0] for r in readings), _guards(moving, band, flat), slopes, log_space, constant)


def _no_slopes(tensor: torch.Tensor, heads: tuple[int, ...]) -> Slopes:
    """Those of what is no decay: they meet no others."""
    size = [tensor.shape[d] for d in heads]
    return Slopes(np.full(size, 1.0), np.full(size, -1.0))


def _support(flat: torch.Tensor, log_space: bool) -> torch.Tensor:
    return torch.isfinite(flat) if log_space else flat != 0


def _may_underflow(flat: torch.Tensor) -> bool:
    return flat.is_floating_point() and bool((flat[flat > 0] < 1e-20).any())


def _bands(flat: torch.Tensor, log_space: bool) -> Iterable[tuple[int, int]]:
    """The smallest and largest r - c with a non-zero entry in any head; the whole range where nothing is zero.

    What decays away may go on behind the last one: to there first.
    """
    rows, columns = _support(flat, log_space).any(0).nonzero(as_tuple=True)
    if not len(rows):
        return
    distance = rows - columns
    ends, furthest = (int(distance.min()), int(distance.max())), (1 - flat.shape[2], flat.shape[1] - 1)
    if flat.is_floating_point() and not log_space:
        faint = [float(flat.diagonal(-d, -2, -1).max()) < FAINT for d in ends]
        low, high = (far if is_faint else end for end, far, is_faint in zip(ends, furthest, faint, strict=True))
        if (low, high) != ends:
            yield low, high
    yield ends


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
    flat: torch.Tensor, log_space: bool, constant: bool, band: tuple[int, int] | None
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

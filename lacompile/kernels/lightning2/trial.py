"""How long a kernel takes with one of its candidate tiles: what a search for the fastest one measures.

A choice of tiles holds for every batch and length, so each is timed where there is work for every multiprocessor, once
over and several times, where there is not and the sequence is too short to be cut, and where few heads are cut into
segments. What counts is the geometric mean, in which a tenth more in one place weighs as much as a tenth less in
another.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..tuning.space import Kind
from . import launch, selfcheck

REGIMES = ((8, 64, 2048), (8, 16, 4096), (1, 64, 2048), (1, 16, 32768))
"""Batch, heads and length."""
MEASURED_MS, FEWEST, MOST = 15.0, 5, 50
CALLS = 3
"""How long each is timed for, in how many replays of how many calls."""


@contextmanager
def _forced(kind: Kind, place: int) -> Iterator[None]:
    launch.forced = kind, place
    try:
        yield
    finally:
        launch.forced = None


def _inputs(kind: Kind, dtype: torch.dtype, device: torch.device, batch: int, heads: int, length: int) -> list[Tensor]:
    """q, k, v, the output's gradient and log-decays, with tokens before heads in memory."""
    generator = torch.Generator(device).manual_seed(0)

    def made(columns: int) -> Tensor:
        shape = (batch, length, heads, columns)
        x = torch.randn(shape, generator=generator, device=device).to(dtype)
        if not kind.descriptors and launch.has_warp_group_products(device):
            x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape)  # not aligned: read by pointers
        return x.transpose(1, 2)

    decay = -(2.0 ** (-8 * torch.arange(1, heads + 1, device=device) / heads))
    if kind.per_token:
        decay = decay[None, :, None].expand(batch, heads, length).contiguous()
    return [made(kind.dk), made(kind.dk), made(kind.dv), made(kind.dv), decay]


def _call(kind: Kind, inputs: list[Tensor]) -> Callable[[], object]:
    from .backward import backward
    from .forward import forward

    q, k, v, do, decay = inputs
    if kind.use == "forward":
        return lambda: forward(q, k, v, decay, 1.0, None, False)
    return lambda: backward(do, None, q, k, v, decay, 1.0, None, kind.decay_gradient)


def _median(call: Callable[[], object]) -> float:
    """Milliseconds of a call on the device, as a replay of a CUDA graph: a short kernel does not wait for the host."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            call()

    def timed(replays: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
        for before, after in pairs:
            before.record()
            graph.replay()
            after.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / CALLS for before, after in pairs]

    once = min(timed(3))
    return statistics.median(timed(max(FEWEST, min(MOST, int(MEASURED_MS / max(CALLS * once, 1e-3))))))


def milliseconds(kind: Kind, dtype: torch.dtype, device: torch.device, place: int) -> float | None:
    """Of one candidate, the geometric mean over REGIMES; None if it does not run or fails the self-check."""
    found_wrong = [key for key, right in selfcheck.VERDICTS.items() if not right]
    times = []
    try:
        with torch.cuda.device(device), torch.no_grad(), _forced(kind, place):
            for regime in REGIMES:
                times.append(_median(_call(kind, _inputs(kind, dtype, device, *regime))))
    except Exception:  # too many registers, too much shared memory: what a compiler may refuse has many names
        return None
    if [key for key, right in selfcheck.VERDICTS.items() if not right] != found_wrong:
        return None
    return math.exp(statistics.fmean(map(math.log, times)))

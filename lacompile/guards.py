"""Buffers are not guarded by Dynamo: what a rewrite assumed about a tensor is checked before each call.

Layers of one class share one graph, so the same graph is called with the buffers of each. Where an assumption does not
hold of them the graph is analysed again, with their values: what comes out serves those buffers from then on.

A mask that is passed in is looked at in every call, all of it: it may be another one each time, as one that hides the
padding of a batch is, and whatever fills it need not count its writes. After a few different ones the original graph
serves all that are new. A CUDA graph that is being recorded gets the original operations, since nobody looks when it is
replayed.

A buffer is taken for unchanged if it is the same object at the same address, PyTorch has counted no write into it, and,
on the CPU, the entries of a fixed sample are what they were. The sample is for writes that PyTorch does not count
(through ``.data`` or memory shared with NumPy): all entries of a small tensor, every few of a large one. Two such
writes stay unseen: one that leaves the sample of a large tensor as it was, and any on a GPU, where looking would wait
for all the work in flight.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .passes.facts import Assumption, unchanged

log = logging.getLogger("lacompile")

Compiled = Callable[..., Any]
Assumed = Sequence[tuple[int, Assumption]]
"""Positions among the inputs, and what is assumed of the tensors there."""

MAX_VARIANTS = 64
MAX_PASSED = 4
"""Variants where something is assumed of an argument."""
MAX_KNOWN = 256
SMALL = 4096
"""Entries up to which all are compared."""
PER_DIMENSION = 8
"""Indices of each dimension that the sample of a larger tensor holds."""


def guarded(
    compiled: Compiled,
    fallback: Callable[[Sequence[Any]], Compiled],
    assumptions: Assumed,
    example_inputs: Sequence[Any],
    specialise: Callable[[Sequence[Any]], tuple[Compiled, Assumed] | None] | None = None,
    uncompiled: Compiled | None = None,
) -> Compiled:
    """``compiled`` while the assumptions hold, else what ``specialise`` makes of the new values, else the original.

    Args:
        compiled: the rewritten graph.
        fallback: compiles the original one, for the arguments of the call that first needs it.
        assumptions: of the rewritten graph.
        example_inputs: the tensors of which they are known to hold. They are not kept: the weights are among them.
        specialise: analyses the original graph again for other inputs; None where it cannot be rewritten for them.
        uncompiled: the original graph as it stands.
    """
    if not assumptions:
        return compiled
    variants = [_Variant(compiled, assumptions, example_inputs)]
    passed = any(a.kind == "argument" for _, a in assumptions)
    most = MAX_PASSED if passed else MAX_VARIANTS
    original: Compiled | None = None

    def call(*args: Any) -> Any:
        nonlocal original
        if passed and uncompiled is not None and recording():
            return uncompiled(*args)
        for variant in variants:
            if variant.holds(args):
                return (variant.compiled or original)(*args)  # type: ignore[misc]
        if specialise is not None and len(variants) < most:
            found = specialise(args)
            if found is not None and (variant := _Variant(*found, args)).holds(args):
                variants.append(variant)
                return found[0](*args)
        if original is None:
            original = fallback(args)
            broken = variants[0].broken(args)
            log.warning("no longer as assumed: %s; the original graph runs, not what was reported", broken)
        if specialise is not None and len(variants) < most:
            # These values are known to have no rewrite: no second analysis while they last.
            as_now = [(i, Assumption(a.node, a.kind, a.text, unchanged(args[i]))) for i, a in assumptions]
            variants.append(_Variant(None, as_now, args))
        return original(*args)

    call._boxed_call = False  # type: ignore[attr-defined]
    return call


def recording() -> bool:
    """Whether what runs now is recorded into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class _Variant:
    """One compiled graph and what it rests on; ``compiled`` is None for the original graph."""

    def __init__(self, compiled: Compiled | None, assumptions: Assumed, example_inputs: Sequence[Any]):
        self.compiled = compiled
        self.checks = [_Check(i, a, example_inputs[i]) for i, a in assumptions]

    def holds(self, args: Sequence[Any]) -> bool:
        return all(check(args) for check in self.checks)

    def broken(self, args: Sequence[Any]) -> str:
        return next(check.assumption.text for check in self.checks if not check(args))


@dataclass
class _Seen:
    """A tensor at one of its versions, and whether the assumption held of it then."""

    tensor: weakref.ref[torch.Tensor]
    address: int
    version: int
    held: bool
    sample: torch.Tensor | None

    @classmethod
    def of(cls, tensor: torch.Tensor, held: bool) -> _Seen:
        # What does not hold is not relied on: if it is out of date a rewrite is missed, and no value is wrong.
        look = held and tensor.device.type == "cpu"
        kept = sampled(tensor).clone() if look else None
        return cls(weakref.ref(tensor), tensor.data_ptr(), tensor._version, held, kept)

    def is_now(self, tensor: torch.Tensor) -> bool:
        if self.tensor() is not tensor or self.address != tensor.data_ptr() or self.version != tensor._version:
            return False
        return self.sample is None or torch.equal(sampled(tensor), self.sample)


def sampled(tensor: torch.Tensor) -> torch.Tensor:
    """A view of at most SMALL entries of a small tensor, else of PER_DIMENSION indices along each dimension."""
    tensor = tensor.detach()
    if tensor.numel() <= SMALL:
        return tensor
    return tensor[tuple(slice(None, None, -(-n // PER_DIMENSION)) for n in tensor.shape)]


class _Check:
    """Asks again only of a tensor that is new or has changed."""

    def __init__(self, position: int, assumption: Assumption, tensor: torch.Tensor):
        self.position, self.assumption = position, assumption
        self.known: dict[int, _Seen] = {}
        self._note(tensor, True)

    def __call__(self, args: Sequence[Any]) -> bool:
        tensor = args[self.position]
        if self._may_change_unseen(tensor):
            return self.assumption.holds(tensor.detach())
        seen = self.known.get(id(tensor))
        if seen is not None and seen.is_now(tensor):
            return seen.held
        held = self.assumption.holds(tensor.detach())
        self._note(tensor, held)
        return held

    def _may_change_unseen(self, tensor: torch.Tensor) -> bool:
        """An argument may be filled by whatever does not count its writes, and inference tensors have no count."""
        return self.assumption.kind == "argument" or tensor.is_inference()

    def _note(self, tensor: torch.Tensor, held: bool) -> None:
        if self._may_change_unseen(tensor):
            return
        if len(self.known) >= MAX_KNOWN:
            self.known.clear()
        self.known[id(tensor)] = _Seen.of(tensor, held)

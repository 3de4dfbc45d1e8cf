"""The values every stage speaks in: recipes, facts, matches and refusals.

A match *proves* a :class:`DecayedAttention`; a kernel *computes* one. Everything a rewrite puts into
a graph is described by an :data:`Expr`, a recipe over values that already exist in the Dynamo graph.
This module imports neither Triton nor anything of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

import torch
from torch import fx

# ----------------------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True, eq=False)
class Value:
    """A value of the Dynamo graph: what ``node`` holds right after it ran."""

    node: fx.Node


@dataclass(frozen=True, eq=False)
class Const:
    """A small tensor of known numbers (fp32 unless said otherwise), created on the device of ``like``."""

    values: Any  # nested tuples of float
    like: Expr
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, eq=False)
class Size:
    """The length of ``dim`` of a graph value, for shapes that are symbolic."""

    of: Value
    dim: int


@dataclass(frozen=True, eq=False)
class Call:
    """``op(*args, **kwargs)``; an argument is an Expr, a plain value, or a list of those."""

    op: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Attend:
    """Output ``index`` of the fused operator on ``fact``: 0 is o ``[B,H,N,Dv]``, 1 the final state ``[B,H,Dk,Dv]``.

    Two Attends of the same (identical) fact share one operator call.
    """

    fact: DecayedAttention
    index: Literal[0, 1]


Expr = Value | Const | Size | Call | Attend


def children(expr: Expr) -> Iterator[Expr]:
    """The recipes directly inside ``expr``."""

    def walk(arg: Any) -> Iterator[Expr]:
        if isinstance(arg, Value | Const | Size | Call | Attend):
            yield arg
        elif isinstance(arg, list | tuple):
            for item in arg:
                yield from walk(item)

    if isinstance(expr, Call):
        yield from walk(expr.args)
        yield from walk(list(expr.kwargs.values()))
    elif isinstance(expr, Attend):
        fact = expr.fact
        yield from (e for e in (fact.q, fact.k, fact.v, fact.log_decay, fact.initial_state) if e is not None)
    elif isinstance(expr, Const):
        yield expr.like
    elif isinstance(expr, Size):
        yield expr.of


def values_of(expr: Expr) -> Iterator[Value]:
    """Every graph value a recipe reads."""
    if isinstance(expr, Value):
        yield expr
    for child in children(expr):
        yield from values_of(child)


def attentions_of(expr: Expr) -> tuple[DecayedAttention, ...]:
    """The attentions that a recipe computes, each once; those that one is computed from after it."""
    own = (expr.fact,) if isinstance(expr, Attend) else ()
    return tuple(dict.fromkeys((*own, *(f for e in children(expr) for f in attentions_of(e)))))


# ------------------------------------------------------------------------------------------------------- assumptions


@dataclass(frozen=True)
class Assumption:
    """Something that is true of an input tensor now and is checked again before every call that relies on it.

    ``node`` is the placeholder of the Dynamo graph; ``holds(tensor)`` re-verifies the property on new values. The
    values of an ``argument`` may be others in every call, those of a module's buffer are expected to stay.
    """

    node: fx.Node
    kind: Literal["values", "argument", "positive", "share"]
    text: str
    holds: Callable[[torch.Tensor], bool] = field(compare=False)


def unchanged(tensor: torch.Tensor) -> Callable[[torch.Tensor], bool]:
    """Whether another tensor has the dtype, shape and values that this one has now."""
    seen = tensor.detach().clone()

    def holds(now: torch.Tensor) -> bool:
        return now.dtype == seen.dtype and now.shape == seen.shape and bool(torch.equal(now.to(seen.device), seen))

    return holds


# -------------------------------------------------------------------------------------------------------------- facts

Formulation = Literal["parallel", "chunkwise", "recurrent"]


@dataclass(frozen=True, eq=False)
class DecayedAttention:
    """One decayed causal linear attention.

    ``S_t = exp(g_t) S_{t-1} + k_t^T v_t``, ``o_t = scale * q_t S_t`` (arXiv 2401.04658, eq. 6-9), every
    field a recipe over the Dynamo graph.

    q, k: ``[B,Hq|Hk,N,Dk]``; v: ``[B,Hv,N,Dv]`` (fewer heads than H must divide it); log_decay: fp32 ``[H]`` or
    ``[B,H,N]``, natural log; initial_state: ``[B,H,Dk,Dv]`` or None. ``dtype`` is the dtype q, k, v are handed over
    in and o comes back in.
    """

    q: Expr
    k: Expr
    v: Expr
    log_decay: Expr
    scale: float
    initial_state: Expr | None
    batch: int | torch.SymInt
    heads: int | torch.SymInt
    length: int | torch.SymInt
    dk: int | torch.SymInt
    dv: int | torch.SymInt
    dtype: torch.dtype
    decay_per_token: bool
    formulation: Formulation
    decay_source: str
    proof: str = ""
    assumptions: tuple[Assumption, ...] = ()


@dataclass(frozen=True, eq=False)
class Match:
    """``target``'s value is, provably, ``replacement``.

    ``replacement`` has exactly the shape of ``target``; the rewrite makes its dtype equal. Uses of ``target`` at or
    before node ``after`` (a mutation of it) keep the old value; None means all uses are replaced. It is computed right
    behind node ``place``, or else behind ``after`` or the target; ``hoisted`` nodes are moved there first.
    ``assumptions`` are those under which the target is what the facts say; they have their own. ``fitted`` are tensors
    that the program makes of its own numbers, whose weights were read off these.
    """

    target: fx.Node
    replacement: Expr
    facts: tuple[DecayedAttention, ...]
    after: fx.Node | None = None
    place: fx.Node | None = None
    hoisted: tuple[fx.Node, ...] = ()
    assumptions: tuple[Assumption, ...] = ()
    fitted: tuple[fx.Node, ...] = ()

    @property
    def assumed(self) -> tuple[Assumption, ...]:
        """All that is taken for granted where the target is replaced."""
        return (*(a for f in self.facts for a in f.assumptions), *self.assumptions)

    @property
    def behind(self) -> fx.Node:
        """The node behind which the replacement is computed."""
        return self.place or self.after or self.target


# ------------------------------------------------------------------------------------------------------------ refusals


class Progress(IntEnum):
    """What an attempt had come to when it was refused; of several attempts the furthest one is told."""

    NO_SUM = 0  # nothing sums over earlier positions
    NAMED = 1  # there is a sum, and what the program does to it is named; no proof was begun
    MERGE = 2  # several sums, which should be one
    RANGE = 3  # the positions and features that are summed over
    FACTORS = 4  # each factor belongs to a query, a key, a value or a decay
    DECAY = 5  # the weights are a decay
    ADDENDS = 6  # what is added to the sum, and the signs of what the decay is made of
    INPUTS = 7  # what must be known of inputs
    RECIPE = 8  # operands for the operator
    KERNEL = 9  # an implementation that takes them
    REGION = 10  # the place in the graph
    NUMBERS = 11  # the comparison in fp64


@dataclass(frozen=True, eq=False)
class Refusal:
    """Why something that looked like a decayed attention stays as it was. A value, never an exception.

    ``stage``: lift, match, legality, validate, select or rewrite. ``obligation``: a short stable id such as
    ``causal-range`` (see docs/matching/proof.md). Near misses are told by ``progress``, the furthest one first.
    """

    stage: str
    obligation: str
    node: fx.Node | None
    expected: str
    found: str
    hint: str = ""
    progress: Progress = Progress.NO_SUM

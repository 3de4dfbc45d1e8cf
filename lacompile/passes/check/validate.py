"""Runs a matched region and its replacement on random fp64 inputs, gradients included. Not the proof: a check of it."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..facts import Attend, Call, Const, DecayedAttention, Expr, Match, Progress, Refusal, Size, Value, values_of
from ..graph.schedule import Schedule
from .region import Region, cuts, in_fp64_on_cpu, is_constant, plain, plain_int, region_of, rounded_weights, run

Reference = Callable[[DecayedAttention, Any, Any, Any, Any, Any], tuple[Any, Any]]

BUDGET_ELEMENTS = 1e8
BUDGET_FLOPS = 1e10
EXACT = 1e-7  # region and replacement compute the same sums in fp64
LOW_PRECISION = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class Validation:
    """How far the replacement was from the region, as ||difference|| / ||region||."""

    forward_error: float = 0.0
    gradient_error: float = 0.0
    seconds: float = 0.0
    skipped: str = ""

    def __str__(self) -> str:
        if self.skipped:
            return f"skipped: {self.skipped}"
        return f"fp64 difference {self.forward_error:.1e}, gradients {self.gradient_error:.1e}"


@dataclass(frozen=True)
class _Disagreement:
    """How far apart the two were, how far they may be, and on which inputs."""

    forward: float
    gradient: float
    tolerance: float
    inputs: Mapping[fx.Node, Any]

    def refusal(self, gm: fx.GraphModule, match: Match) -> Refusal:
        saved = _save(gm, match, self.inputs)
        return Refusal(
            "validate",
            "agreement",
            match.target,
            f"differences up to {self.tolerance:.0e}",
            f"output {self.forward:.1e}, gradients {self.gradient:.1e}; inputs saved to {saved}",
            "please report this: the proof was wrong",
            Progress.NUMBERS,
        )


def validate(
    schedule: Schedule, match: Match, real: Mapping[fx.Node, Any], reference: Reference, policy: str
) -> Validation | Refusal:
    """Compares on random inputs of the real shapes.

    Args:
        schedule: of the graph that the match was found in.
        real: the inputs at hand, by placeholder.
        policy: "off"; "budget" skips a region of more than about a second of work; "always".
    """
    if policy == "off":
        return Validation(skipped="turned off")
    found: Validation | _Disagreement | None = None
    for cut in cuts(schedule, match):
        region = region_of(schedule, match, cut)
        cost = _cost(region.nodes)
        if found is None and cost is not None and policy == "budget":
            return Validation(skipped=f"cost: {cost}")
        if found is not None and cost is not None:
            break
        try:
            found = _compare(schedule.gm, match, region, real, reference, near=found is not None)
        except Exception as error:
            if found is not None:
                break
            why = f"the comparison itself failed: {type(error).__name__}: {error}"
            return Refusal(
                "validate", "comparison", match.target, "a region that runs in fp64", why, progress=Progress.NUMBERS
            )
        # values that were made up one by one may be what no program computes: then the program computes them
        if isinstance(found, Validation) or match.place is not None:
            break
    assert found is not None
    return found.refusal(schedule.gm, match) if isinstance(found, _Disagreement) else found


def _cost(region: Sequence[fx.Node]) -> str | None:
    elements = flops = 0.0
    for node in region:
        example = node.meta.get("example_value")
        if not isinstance(example, Tensor):
            continue
        count = 1.0
        for s in example.shape:
            count *= plain_int(s)
        elements += count
        if getattr(node.target, "__name__", str(node.target)) in ("matmul", "bmm", "einsum", "mm", "baddbmm"):
            inner = [a.meta.get("example_value") for a in node.all_input_nodes]
            flops += (
                2 * count * max((plain_int(x.shape[-1]) for x in inner if isinstance(x, Tensor) and x.dim()), default=1)
            )
    if elements > BUDGET_ELEMENTS:
        return f"{elements:.1e} elements"
    return f"{flops:.1e} operations" if flops > BUDGET_FLOPS else None


# ------------------------------------------------------------------------------------------------------------ inputs


@dataclass(frozen=True)
class _Inputs:
    """What a region is run on.

    Attributes:
        real: the inputs at hand, by placeholder.
        decays: those that a decay is made of.
        by_value: those whose numbers the proof rests on.
        positive: those that the proof takes for positive.
        near: inputs of the graph are not made up, but somewhat other than they are.
        generator: of what is made up.
    """

    real: Mapping[fx.Node, Any]
    decays: set[fx.Node]
    by_value: set[fx.Node]
    positive: set[fx.Node]
    near: bool
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def of(self, node: fx.Node) -> Any:
        """A tensor on the CPU, in fp64 where it holds fractions; or a number."""
        example, given = node.meta["example_value"], self.real.get(node)
        if not isinstance(example, Tensor):
            value = example if given is None else given
            return plain(value)
        fractions = example.dtype.is_floating_point
        if isinstance(given, Tensor) and (node in self.decays or node in self.by_value or not fractions):
            return given.detach().cpu().to(torch.float64 if fractions else given.dtype)
        shape = [plain_int(s) for s in example.shape]
        if self.near and isinstance(given, Tensor):
            return given.detach().cpu().to(torch.float64) * (1 + 0.1 * self._normal(shape))
        if example.dtype is torch.bool:
            return torch.rand(shape, generator=self.generator) > 0.2
        if not fractions:
            return torch.randint(0, 3, shape, generator=self.generator).to(example.dtype)
        if node in self.decays:
            return torch.rand(shape, generator=self.generator, dtype=torch.float64) * 0.1 + 0.01
        return self._normal(shape).abs() + 0.01 if node in self.positive else self._normal(shape)

    def _normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------- the comparison


def _compare(
    gm: fx.GraphModule,
    match: Match,
    region: Region,
    real: Mapping[fx.Node, Any],
    reference: Reference,
    near: bool,
) -> Validation | _Disagreement:
    """``near`` as in :class:`_Inputs`."""
    start = time.perf_counter()
    by_value = region.first(a.node for a in match.assumed if a.kind != "positive")
    decays = region.first(v.node for f in match.facts for v in values_of(f.log_decay))
    positive = {a.node for a in match.assumed if a.kind == "positive"}
    made = _Inputs(real, decays, by_value, positive, near)
    env = {n: made.of(n) for n in region.inputs}
    # of a graph that an operator calls the inputs may be known to nobody: the region reads their shape and format alone
    unknown = {n: made.of(n) for n in region.nodes if n.op == "placeholder" and real.get(n) is None}
    real = {**real, **unknown}
    _tame_decays(match, region, env, decays, by_value, reference)
    leaves = {n: t for n, t in env.items() if isinstance(t, Tensor) and t.is_floating_point() and n not in by_value}
    inexact: set[fx.Node] = set()
    with _fp64_by_default(), _kept_apart():
        results = [
            _with_gradients(compute, env, leaves)
            for compute in (
                lambda e: run(gm, region, e, real, inexact)[match.target],
                lambda e: _Recipe(_operands(gm, region, e, real), reference)(match.replacement),
            )
        ]
    (want, want_grads), (got, got_grads) = results
    forward = _error(got, want)
    gradient = max(
        (
            _error(_or_zero(g, x), _or_zero(w, x))
            for g, w, x in zip(got_grads, want_grads, leaves.values(), strict=True)
        ),
        default=0.0,
    )
    read = {n.meta["example_value"].dtype for n in by_value}
    tolerance = max([EXACT, *(LOW_PRECISION[dtype] for dtype in read if dtype in LOW_PRECISION)])
    # what the program rounds once each is off by no more than that
    rounded = list(rounded_weights(region, inexact))
    if rounded:
        errors = sum(torch.finfo(dtype).eps / 2 for dtype in rounded)
        tolerance = max(tolerance, min(errors, max(LOW_PRECISION[dtype] for dtype in rounded)))
    # the rate of each step may be off by as much as its format rounds
    if match.fitted or any(map(_writes_fractions, region.nodes)):
        steps = max(plain_int(f.length) for f in match.facts)
        tolerance = max(tolerance, LOW_PRECISION[torch.float32], torch.finfo(torch.float32).eps * steps)
    says_something = not near or bool(want.any())
    if not (says_something and forward <= tolerance and gradient <= 10 * tolerance):
        return _Disagreement(forward, gradient, tolerance, env)
    return Validation(forward, gradient, time.perf_counter() - start)


def _writes_fractions(node: fx.Node) -> bool:
    """Whether a tensor is made of fractions, which the analysis takes as they are written and the region rounded."""
    return is_constant(node) and any(
        isinstance(x, float) and not x.is_integer() for x in tree_leaves((node.args, node.kwargs))
    )


def _operands(gm: fx.GraphModule, region: Region, env: dict[fx.Node, Any], real: Mapping[fx.Node, Any]) -> Any:
    """What the replacement reads."""
    return run(gm, region, env, real) if region.dependent else region.with_copies(env)


def _with_gradients(
    compute: Callable[[dict[fx.Node, Any]], Tensor], env: dict[fx.Node, Any], leaves: dict[fx.Node, Tensor]
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """The output, and the gradients of a random combination of its elements."""
    fresh = {n: t.clone().requires_grad_() for n, t in leaves.items()}
    # the region may write into its inputs, which may be the caller's; a product with one is no leaf of autograd
    others = {n: t.clone() if isinstance(t, Tensor) else t for n, t in env.items()}
    out = compute({**others, **{n: t * 1.0 for n, t in fresh.items()}}).to(torch.float64)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads: Sequence[Tensor | None] = [None] * len(fresh)
    if out.requires_grad:
        grads = torch.autograd.grad((out * weight).sum(), list(fresh.values()), allow_unused=True)
    return out.detach(), grads


def _kept_apart() -> contextlib.AbstractContextManager[object]:
    """What is saved for the gradients is a copy: backwards through a state that is overwritten is an error elsewhere.

    PyTorch's ``allow_mutation_on_saved_tensors`` misses a part of a tensor behind a write into another part.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.detach().clone(), lambda copy: copy)


@contextlib.contextmanager
def _fp64_by_default() -> Iterator[None]:
    """Tensors that the region makes itself are fp64 too."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def _or_zero(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    scale = float(want.norm())
    difference = float((got - want).norm())
    return difference / scale if scale else difference


def _tame_decays(
    match: Match,
    region: Region,
    env: dict[fx.Node, Any],
    decays: set[fx.Node],
    by_value: set[fx.Node],
    reference: Reference,
) -> None:
    """Made-up decay inputs take the sign that makes the log-decay negative, so that nothing overflows."""
    decays = {n for n in decays if n in env}  # others are computed from what is made up
    tensors = {n for n in decays if isinstance(env[n], Tensor) and env[n].is_floating_point()}
    made_up = [n for n in tensors if n.op != "placeholder" and n not in by_value]
    for fact in match.facts:
        if made_up and bool((_Recipe(region.with_copies(env), reference)(fact.log_decay) > 0).any()):
            for n in made_up:
                env[n] = -env[n]


class _Recipe:
    """Evaluates a recipe in fp64."""

    def __init__(self, env: dict[fx.Node, Any], reference: Reference):
        self.env, self.reference = env, reference
        self.made: dict[Expr | DecayedAttention, Any] = {}

    def __call__(self, expr: Expr) -> Any:
        if expr not in self.made:
            self.made[expr] = self._make(expr)
        return self.made[expr]

    def _make(self, expr: Expr) -> Any:
        if isinstance(expr, Value):
            return self.env[expr.node]
        if isinstance(expr, Const):
            return torch.tensor(expr.values, dtype=torch.float64)
        if isinstance(expr, Size):
            return self(expr.of).shape[expr.dim]
        if isinstance(expr, Attend):
            return self._attend(expr.fact)[expr.index]
        assert isinstance(expr, Call)
        return expr.op(*in_fp64_on_cpu(self._arguments(expr.args)), **in_fp64_on_cpu(self._arguments(expr.kwargs)))

    def _arguments(self, arg: Any) -> Any:
        if isinstance(arg, Value | Const | Size | Call | Attend):
            return self(arg)
        if isinstance(arg, dict):
            return {k: self._arguments(v) for k, v in arg.items()}
        return type(arg)(self._arguments(a) for a in arg) if isinstance(arg, list | tuple) else arg

    def _attend(self, fact: DecayedAttention) -> tuple[Any, Any]:
        if fact not in self.made:
            state = None if fact.initial_state is None else self(fact.initial_state)
            self.made[fact] = self.reference(
                fact, self(fact.q), self(fact.k), self(fact.v), self(fact.log_decay), state
            )
        return self.made[fact]


def _save(gm: fx.GraphModule, match: Match, env: Mapping[fx.Node, Any]) -> Path:
    """The graph and the inputs of a disagreement, for a bug report."""
    path = Path(tempfile.mkdtemp(prefix="lacompile-mismatch-"))
    (path / "graph.py").write_text(f"# target: {match.target.name}\n{gm.code}")
    torch.save({n.name: t for n, t in env.items()}, path / "inputs.pt")
    return path

"""What the analysis makes of a program, and whether it is right."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lacompile.backend import decide
from lacompile.options import Options
from lacompile.testing.budgets import check_error, relative_error
from lacompile.testing.fp64 import in_fp64

from .program import Program

EXACT = 1e-6  # relative; the twins that survey.py makes differ from their originals by more
NOTHING = 1e-12  # relative to the largest output or gradient: 0 but for rounding

# The proof must stand without validation, which would hide its faults here.
OPTIONS = Options.split({"validate": "off"})[0]


@dataclass(frozen=True)
class Run:
    """Outputs, and the gradients of one fixed combination of their elements."""

    outputs: list[Tensor]
    gradients: list[Tensor]

    @property
    def all(self) -> list[Tensor]:
        return [*self.outputs, *self.gradients]


@dataclass(frozen=True)
class Verdict:
    """``wrong`` says what differs where both are computed in fp64; ``rounding`` what is over the budget in fp32."""

    rewrites: int
    wrong: str
    rounding: str
    report: str


def run(module: nn.Module, program: Program, wrap: Any = None, exact: bool = False) -> Run:
    """The program as it is, in fp64, or through a compiler."""
    leaves = program.fact.inputs()
    if exact:
        module = module.double()
        leaves = {n: x.detach().double().requires_grad_(x.requires_grad) for n, x in leaves.items()}
    with in_fp64() if exact else contextlib.nullcontext():
        made = (wrap(module) if wrap else module)(*program.lay_out(leaves))
    outputs = list(made) if isinstance(made, tuple) else [made]
    return Run([x.detach() for x in outputs], _gradients(outputs, list(leaves.values())))


def _gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    terms = []
    for x in outputs:
        weight = torch.randn(x.shape, generator=generator).to(torch.bfloat16)
        if x.requires_grad:
            terms.append((x * weight.to(x.dtype)).sum(dtype=torch.float64))
    wanted = [x for x in leaves if x.requires_grad]
    if not terms:
        return [torch.zeros_like(x) for x in wanted]
    found = torch.autograd.grad(torch.stack(terms).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]


def differ(a: Run, b: Run, by: float) -> bool:
    """Whether some output or gradient of two fp64 runs differs by more than this, in relative terms."""
    if len(a.all) != len(b.all):
        return True
    return any(relative_error(x, y) > by for x, y in zip(a.all, b.all, strict=True))


def judge(source: str, program: Program, exact: Run | None = None) -> Verdict:
    """Lifts, rewrites and runs a program without compiling it, and compares with its own fp64 run."""
    reports = []
    exactly = False

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        decision = decide(gm, example_inputs, OPTIONS)
        reports.append(decision.report)
        # Interpreted, as Inductor does: the code that FX prints of pow(-0.0625, i) is -0.0625 ** i, of another sign.
        run_graph = torch.fx.Interpreter(decision.rewritten or gm).run

        def call(*inputs: Any) -> Any:
            if not exactly:
                return run_graph(*inputs)
            with in_fp64():
                return run_graph(*(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs))

        return call

    torch._dynamo.reset()
    exact = exact or run(program.build(source), program, exact=True)
    ours = program.build(source)
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    rounded = run(ours, program, lambda _: compiled)
    rewrites = sum(len(r.rewrites) for r in reports)
    report = "\n".join(map(str, reports))
    if not rewrites:
        return Verdict(0, "", "", report)
    exactly = True
    wrong = _difference(run(ours, program, lambda _: compiled), exact)
    return Verdict(rewrites, wrong, _compare(rounded, run(program.build(source), program), exact), report)


def _difference(ours: Run, exact: Run) -> str:
    """What the rewritten graph computes in fp64 and the program does not; gradients pass fp32 on their way."""
    if len(ours.all) != len(exact.all):
        return f"{len(ours.all)} outputs and gradients, where the program has {len(exact.all)}"
    largest = max((float(y.norm()) for y in exact.all), default=0.0)
    errors = [
        # A gradient of 0, that of k / |k| say, is what is left of two that cancel: rounding, as large as theirs is.
        float((x - y).norm()) / largest if x.shape == y.shape and y.norm() < NOTHING * largest else relative_error(x, y)
        for x, y in zip(ours.all, exact.all, strict=True)
    ]
    worst = max(errors, default=0.0)
    return f"relative errors {', '.join(f'{e:.1e}' for e in errors)}, both in fp64" if worst > EXACT else ""


def _compare(ours: Run, eager: Run, exact: Run) -> str:
    try:
        for kind, got, plain, want in (
            ("output", ours.outputs, eager.outputs, exact.outputs),
            ("gradient", ours.gradients, eager.gradients, exact.gradients),
        ):
            # One of eager's gradients of a few numbers may be exact by luck, not all of them.
            of_eager = max((relative_error(x, y) for x, y in zip(plain, want, strict=True)), default=0.0)
            for n, (x, y) in enumerate(zip(got, want, strict=True)):
                check_error(f"{kind} {n}", x, y, eager=of_eager, kind=kind)
    except AssertionError as wrong:
        return str(wrong)
    return ""

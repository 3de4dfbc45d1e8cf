"""Statements about a program: it is rewritten and computes the same, or it is left alone."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map

from ..backend import decide, lightning
from ..explaining import explain
from ..options import Options
from ..report import Report, last_report
from .budgets import BUDGETS, check_error, relative_error
from .fp64 import in_fp64


def assert_rewritten(
    fn: Callable[..., Any],
    *args: Any,
    count: int | None = 1,
    grads: bool = True,
    dtype: torch.dtype | None = None,
    options: dict[str, Any] | None = None,
    compiled: bool = True,
    dynamic: bool | None = None,
    after: Sequence[Any] | None = None,
) -> Report:
    """``fn(*args)``, compiled with the lightning backend, has ``count`` rewrites and computes what eager computes.

    Outputs, and the gradients of every argument and parameter that requires one, are compared with an eager run in
    fp64, within the budgets of :mod:`lacompile.testing.budgets`. Shapes and dtypes must be those of eager. Dynamo is
    reset first, so that no earlier compilation is found again. ``fn`` and ``args`` are copied and stay as they were.

    Args:
        fn: a function, or a module; a module's parameters are compared too. What a function reads from outside its
            arguments (a closure, a bound method's module) keeps its dtype, and its gradients are not compared.
        args: arguments of ``fn``, tensors in nested tuples, lists and dicts among them.
        count: the number of rewrites, summed over all graphs that Dynamo captures; with None any: what is rewritten is
            right, if anything is.
        grads: compare gradients. Then something must require one.
        dtype: whose budget to use; the lowest precision among the tensors given unless said otherwise.
        options: as in ``torch.compile(options=...)``.
        compiled: with False the rewritten graph runs as it is, without Inductor: the same statement, much faster.
        dynamic: as in ``torch.compile(dynamic=...)``.
        after: arguments of a call before. Dynamo then makes the sizes that differ symbolic, if the program lets it.

    Returns:
        The report, summed over all graphs.

    Raises:
        AssertionError: another number of rewrites, an output or a gradient that is too far off, another shape or dtype.
        ValueError: ``grads`` and nothing requires a gradient.
    """
    reports: list[Report] = []
    analysed = True

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if not analysed:
            return gm.forward
        if not compiled:
            decision = decide(gm, example_inputs, Options.split(options)[0])
            reports.append(decision.report)
            return (decision.rewritten or gm).forward
        made = lightning(gm, example_inputs, options=options)
        report = last_report()
        assert report is not None
        reports.append(report)
        return made

    def with_backend(f: Callable[..., Any]) -> Callable[..., Any]:
        nonlocal analysed
        made = torch.compile(f, backend=backend, dynamic=dynamic)
        if after is not None:
            analysed = False
            made(*_no_leaves(_copied(f, tuple(after), None)[1]))
            analysed = True
        return made

    torch._dynamo.reset()
    eager = _run(fn, args, grads, lambda f: f)
    ours = _run(fn, args, grads, with_backend)
    report = sum(reports[1:], reports[0]) if reports else Report(graphs=0)
    if count is not None and len(report.rewrites) != count:
        raise AssertionError(f"expected {count} rewrites, found {len(report.rewrites)}\n{report}")
    exact = _run(fn, args, grads, lambda f: f, dtype=torch.float64)
    _compare(ours, eager, exact, dtype or _lowest(fn, args))
    return report


def assert_refused(
    fn: Callable[..., Any], *args: Any, obligation: str | None = None, options: dict[str, Any] | None = None
) -> Report:
    """Nothing in ``fn(*args)`` is rewritten; with ``obligation``, a near miss says that this one failed.

    Nothing is compiled: the program runs once under :func:`lacompile.explain`, on copies of ``args``.

    Args:
        fn: a function or a module.
        args: its arguments.
        obligation: the id that a near miss must name, such as ``causal-range``.
        options: as in ``torch.compile(options=...)``.

    Returns:
        The report, summed over all graphs.

    Raises:
        AssertionError: something was rewritten, no graph was captured at all, or no near miss names the obligation.
    """
    torch._dynamo.reset()
    ours, own_args = _copied(fn, args, None)
    report = explain(ours, **(options or {}))(*own_args)
    if not report.graphs:
        raise AssertionError("Dynamo captured no graph, so nothing was analysed")
    if report.rewrites:
        raise AssertionError(f"expected no rewrite, found {len(report.rewrites)}\n{report}")
    if obligation is not None and obligation not in {miss.obligation for miss in report.near_misses}:
        raise AssertionError(f"expected a near miss for {obligation!r}, found none\n{report}")
    return report


# ------------------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class _Run:
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


def _run(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    grads: bool,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]],
    dtype: torch.dtype | None = None,
) -> _Run:
    """One run on copies, in ``dtype`` where one is given: seeded, and each output weighted alike in the loss."""
    ours, own_args = _copied(fn, args, dtype)
    leaves = {f"argument {name}": x for name, x in _tensors(own_args).items() if x.requires_grad}
    if isinstance(ours, nn.Module):
        leaves |= {f"parameter {name}": p for name, p in ours.named_parameters() if p.requires_grad}
    if grads and not leaves:
        raise ValueError("grads=True, but no argument or parameter requires a gradient; pass grads=False")
    precision = in_fp64() if dtype is torch.float64 else contextlib.nullcontext()
    with torch.set_grad_enabled(grads), precision:
        run = wrap(ours)
        torch.manual_seed(0)
        result = run(*_no_leaves(own_args))
    outputs = {f"output {name}".strip(): x for name, x in _tensors(result).items()}
    gradients: dict[str, Tensor | None] = {}
    if grads:
        loss = _loss(outputs)
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))
    return _Run({name: x.detach() for name, x in outputs.items()}, gradients)


def _no_leaves(args: Any) -> Any:
    """Arguments that are no leaves of autograd (a product with one is none): the program may write into them."""
    return tree_map(lambda x: x * 1 if isinstance(x, Tensor) and x.requires_grad else x, args)


def _copied(fn: Callable[..., Any], args: Any, dtype: torch.dtype | None) -> tuple[Callable[..., Any], Any]:
    """``fn`` and ``args`` of their own, floating tensors in ``dtype`` where one is given; tied arguments stay tied."""
    made: dict[int, Tensor] = {}

    def copied(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in made:
            new = x.detach().clone()
            new = new.to(dtype) if dtype is not None and new.is_floating_point() else new
            made[id(x)] = new.requires_grad_(x.requires_grad)
        return made[id(x)]

    if isinstance(fn, nn.Module):
        fn = copy.deepcopy(fn)
        fn = fn.to(dtype) if dtype is not None else fn
    return fn, tree_map(copied, args)


def _tensors(tree: Any) -> dict[str, Tensor]:
    """The tensors of a tree by their path."""
    found, _ = tree_flatten_with_path(tree)
    return {"".join(map(str, path)): x for path, x in found if isinstance(x, Tensor)}


def _loss(outputs: dict[str, Tensor]) -> Tensor:
    """A sum in which every element of every output has its own seeded weight, rounded alike in every run."""
    terms = []
    generator = torch.Generator().manual_seed(1)
    for x in outputs.values():
        if not x.is_floating_point():
            continue
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(torch.bfloat16)
        if x.requires_grad:
            terms.append((x * weight.to(x.device, x.dtype)).sum(dtype=torch.float64))
    if not terms:
        raise ValueError("grads=True, but no output depends on anything that requires a gradient; pass grads=False")
    return torch.stack(terms).sum()


# ---------------------------------------------------------------------------------------------------------- comparison


def _lowest(fn: Callable[..., Any], args: Any) -> torch.dtype:
    """The dtype with the largest budget among arguments, parameters and buffers."""
    tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    if isinstance(fn, nn.Module):
        tensors += [*fn.parameters(), *fn.buffers()]
    known = [x.dtype for x in tensors if x.dtype in BUDGETS]
    return max(known, key=lambda d: BUDGETS[d].output, default=torch.get_default_dtype())


def _compare(got: _Run, eager: _Run, exact: _Run, dtype: torch.dtype) -> None:
    if got.outputs.keys() != eager.outputs.keys():
        raise AssertionError(f"outputs {sorted(got.outputs)}, eager has {sorted(eager.outputs)}")
    for name, x in got.outputs.items():
        reference = eager.outputs[name]
        if (x.shape, x.dtype) != (reference.shape, reference.dtype):
            raise AssertionError(
                f"{name}: {tuple(x.shape)} {x.dtype}, eager has {tuple(reference.shape)} {reference.dtype}"
            )
        if not x.is_floating_point() and not torch.equal(x, reference):
            raise AssertionError(f"{name}: differs from eager")
    numbers = [n for n, x in got.outputs.items() if x.is_floating_point()]
    of_eager = max((relative_error(eager.outputs[n], exact.outputs[n]) for n in numbers), default=0.0)
    for name in numbers:
        check_error(name, got.outputs[name], exact.outputs[name], eager=of_eager, kind="output", dtype=dtype)
    pairs = {n: (e, x) for n, e in eager.gradients.items() if e is not None and (x := exact.gradients[n]) is not None}
    # A decay has as few entries as there are heads: one of eager's gradients is exact by luck, not all of them.
    of_eager = max((relative_error(e, x) for e, x in pairs.values()), default=0.0)
    for name, grad in got.gradients.items():
        if name not in pairs:
            if grad is not None and bool(grad.count_nonzero()):
                raise AssertionError(f"gradient of {name}: not zero, eager has none")
            continue
        ours = torch.zeros_like(pairs[name][0]) if grad is None else grad
        check_error(f"gradient of {name}", ours, pairs[name][1], eager=of_eager, kind="gradient", dtype=dtype)

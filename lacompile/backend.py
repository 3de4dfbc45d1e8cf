"""``torch.compile(model, backend="lightning")``: analyse, decide, rewrite, hand over to Inductor, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from . import _compat, ahead, guards, ops, report
from .decision import code_of, decide, is_rewritten
from .errors import NotRewritten
from .options import Options, check_mode


def lightning(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend function that Dynamo calls with each captured graph.

    Args:
        gm: the graph.
        example_inputs: its inputs.
        mode: as in torch.compile.
        options: those of :class:`lacompile.options.Options` and those of Inductor.

    Raises:
        UnknownOption, BadOptionValue, UnknownMode: a misspelt setting.
        NotRewritten: under ``options={"strict": True}``.
    """
    check_mode(mode)
    settings, inductor_options = Options.split(options)
    config_patches = {**_compat.mode_options(mode), **inductor_options}
    _compat.wake_compile_workers(example_inputs)
    decision = decide(gm, example_inputs, settings)
    hand_over = _HandOver(config_patches)
    compiled = None
    if decision.rewritten is not None:
        try:
            compiled = hand_over(decision.rewritten, example_inputs)
        except Exception as error:
            decision = decision.without_rewrites("rewrite", f"{type(error).__name__}: {error}")
    if compiled is None:
        compiled = hand_over(gm, example_inputs)
    else:
        again = _Again(gm, settings, hand_over, decision.rewritten, compiled)
        assumed = _to_check(decision.assumed, settings)
        compiled = guards.guarded(compiled, again.original, assumed, example_inputs, again, gm)
    final = replace(decision.report, notes=decision.report.notes + tuple(hand_over.notes))
    report.publish(final)
    if settings.strict and (final.near_misses or not final.rewrites):
        raise NotRewritten(f"strict mode: {final}")
    return compiled


lightning.reset = report.clear  # type: ignore[attr-defined]


class _Again:
    """The same graph for inputs of other values; a rewrite that bakes no number is not compiled again."""

    def __init__(self, gm: fx.GraphModule, settings: Options, hand_over: _HandOver, rewritten: Any, compiled: Any):
        self.gm, self.settings, self.hand_over = gm, settings, hand_over
        self.known = {code_of(rewritten): compiled}
        self.symbolic = any(n.op == "placeholder" and _is_symbolic(n) for n in gm.graph.nodes)

    def original(self, args: Sequence[Any]) -> Callable[..., Any]:
        """The graph as it was. For sizes that are symbolic Dynamo has to trace it again, since it is done with this."""
        if self.symbolic:
            return torch.compile(self.gm, backend=self.hand_over, dynamic=True)
        return self.hand_over(self.gm, args)

    def __call__(self, args: Sequence[Any]) -> tuple[Callable[..., Any], guards.Assumed] | None:
        decision = decide(self.gm, args, self.settings, may_guard=False)
        if decision.rewritten is None:
            return None
        code = code_of(decision.rewritten)
        if code not in self.known:
            if self.symbolic:  # sizes can only be compiled for while Dynamo traces
                return None
            self.known[code] = self.hand_over(decision.rewritten, args)
        report.publish(decision.report)
        return self.known[code], _to_check(decision.assumed, self.settings)


def _to_check(assumed: guards.Assumed, settings: Options) -> guards.Assumed:
    """What is looked at before each call: that buffers stay what they are may be trusted, and nothing else."""
    return [(i, a) for i, a in assumed if a.kind != "values" or settings.buffers != "trust"]


def _is_symbolic(node: fx.Node) -> bool:
    example = node.meta.get("example_value")
    sizes = example.shape if isinstance(example, torch.Tensor) else (example,)
    return any(isinstance(s, torch.SymInt) for s in sizes)


class _HandOver:
    """Inductor, or AOTAutograd alone where Inductor cannot compile."""

    def __init__(self, config_patches: dict[str, Any]):
        self.config_patches = config_patches
        self.notes: list[str] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        why = _compat.cpu_compiler_error() if _on_cpu(example_inputs) else None
        if why is not None:
            self.notes.append(f"Inductor cannot compile here ({why}); the graph runs uncompiled")
            return _compat.compile_without_inductor(gm, example_inputs)
        tag = ops.CACHE_TAG if is_rewritten(gm) else ""
        with ahead.kernels_compiled(gm):
            return _compat.compile_with_inductor(gm, example_inputs, self.config_patches, tag)


def _on_cpu(example_inputs: Sequence[Any]) -> bool:
    return any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in example_inputs)


__all__ = ["lightning"]

"""The one place for names that PyTorch does not promise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch.autograd import forward_ad


def suppressed_guards(fake_mode: Any) -> contextlib.AbstractContextManager[None]:
    """Shape questions asked inside add no guards to the traced program."""
    env = getattr(fake_mode, "shape_env", None)
    return contextlib.nullcontext() if env is None else env.suppress_guards()


class AnotherInEachCall(Exception):
    """A symbol of the traced program was asked for its number."""

    def __str__(self) -> str:
        return "a number that may be another one in the next call"


def forgotten_symbols(fake_mode: Any) -> contextlib.AbstractContextManager[Any]:
    """Symbols for what data says (``x.item()``) that are made inside are looked for in no result of the program."""
    env = getattr(fake_mode, "shape_env", None)
    return contextlib.nullcontext() if env is None else env.ignore_fresh_unbacked_symbols()


@contextlib.contextmanager
def no_number_for_a_symbol(fake_mode: Any, *, no_answer: bool = False) -> Iterator[None]:
    """A symbol has no number inside, where a guard that keeps it would not be added: it is an error to ask for one.

    With ``no_answer`` none to a question either. What Dynamo itself has settled is no symbol any more.
    """
    if not has_symbols(fake_mode):
        yield
        return
    from torch.fx.experimental.sym_node import SymNode

    def settled(ask: Callable[..., Any]) -> Callable[..., Any]:
        def answer(node: SymNode, *args: Any) -> Any:
            if node.expr.free_symbols and not _settled(node):
                raise AnotherInEachCall
            return ask(node, *args)

        return answer

    names = ("guard_int", "guard_float", *(("guard_bool",) if no_answer else ()))
    before = {name: getattr(SymNode, name) for name in names}
    try:
        for name, ask in before.items():
            setattr(SymNode, name, settled(ask))
        yield
    finally:
        for name, ask in before.items():
            setattr(SymNode, name, ask)


def _settled(node: Any) -> bool:
    """Whether the guards that Dynamo has installed leave one number, as of the chunks that a loop was traced for."""
    import sympy

    if node.hint is None or isinstance(node.hint, bool):
        return False
    return node.shape_env._maybe_evaluate_static(sympy.Eq(node.expr, node.hint)) is sympy.true


def symbolic_kernels(fake_mode: Any) -> contextlib.AbstractContextManager[Any]:
    """The kernels that take symbolic sizes, where the traced program has some."""
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher() if has_symbols(fake_mode) else contextlib.nullcontext()


@contextlib.contextmanager
def of_fakes(fake_mode: Any) -> Iterator[None]:
    """What is called inside with fake tensors makes one, as Dynamo would, and adds no guards to the traced program."""
    with fake_mode, suppressed_guards(fake_mode), symbolic_kernels(fake_mode), torch.no_grad():
        yield


def has_symbols(fake_mode: Any) -> bool:
    """Whether a size of the traced program is, or was, a symbol."""
    return bool(getattr(getattr(fake_mode, "shape_env", None), "var_to_range", None))


@contextlib.contextmanager
def numbers_on_the_cpu() -> Iterator[None]:
    """Numbers become a tensor of the CPU first, as they do on fake tensors, whatever device they are meant for."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def always_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are the same in every run of the traced program; no guard is added to find out."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a == b)


def must_stay_symbolic(env: Any, symbol: Any) -> bool:
    """Whether a user has marked a dimension of this size as dynamic, where a number for it would be an error."""
    for tracked in env.tracked_fakes or ():
        sizes = getattr(tracked.fake, "shape", ())
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", None) or ()
        for size, constraint in zip(sizes, constraints, strict=False):
            if constraint is not None and not getattr(constraint, "warn_only", False):
                if isinstance(size, torch.SymInt) and symbol in size.node.expr.free_symbols:
                    return True
    return False


def guard_equal(fake_mode: Any, a: Any, b: Any) -> None:
    """Dynamo traces the program again where a symbol of it is not this symbol or number any more."""
    import sympy

    fake_mode.shape_env.evaluate_expr(sympy.Eq(a, b))


def hint(size: Any) -> int:
    """A size as it is in the call that is being traced; 0 where that is not known."""
    return size if isinstance(size, int) else size.node.hint or 0


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape and no values."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def in_autocast() -> bool:
    """Whether an autocast is on, for whatever device."""
    return torch._C._is_any_autocast_enabled()


def fake_device(tensor: torch.Tensor) -> torch.device | None:
    """Where a tensor with a shape and no values pretends to be, without a dispatch; None for any other tensor."""
    return getattr(tensor, "fake_device", None)


def outside_modes() -> contextlib.AbstractContextManager[Any]:
    """Real arithmetic in the middle of a trace: no fake tensors, no dispatch mode."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def takes_no_number(op: Any, n: int) -> bool:
    """Whether argument ``n`` of an ATen operation must be a tensor: of ``mul``, say, it may be a number as well."""
    schema = getattr(op, "_schema", None)
    if schema is None or torch._C._should_allow_numbers_as_tensors(schema.name.removeprefix("aten::")):
        return False
    return n < len(schema.arguments) and isinstance(schema.arguments[n].type, torch.TensorType)


@cache
def inductor_option_names() -> frozenset[str]:
    """The configuration keys that ``torch.compile(options=...)`` takes for Inductor."""
    from torch._inductor import config

    return frozenset(config.get_config_copy())


def mode_options(mode: str | None, dynamic: bool = False) -> dict[str, Any]:
    """What a ``mode=`` means to Inductor."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode, dynamic)) if mode and mode != "default" else {}


def wake_compile_workers(example_inputs: Any) -> None:
    """Has Inductor's workers for GPU kernels start now, as it does itself, but beside an analysis and not after it.

    Until they are there it compiles kernels one after the other.
    """
    if any(isinstance(x, torch.Tensor) and x.device.type in ("cuda", "xpu") for x in example_inputs):
        from torch._inductor.async_compile import AsyncCompile

        wake = getattr(AsyncCompile, "wakeup", None)
        if wake is not None:
            wake()


def compile_with_inductor(gm: Any, example_inputs: Any, config_patches: dict[str, Any], cache_tag: str = "") -> Any:
    """Hands a graph to Inductor.

    ``cache_tag`` joins the key of the compile caches: they know an operator by its name, not by what it promises.
    """
    from torch._inductor.compile_fx import compile_fx

    config: Any = torch.compiler.config
    with config.patch(cache_key_tag=config.cache_key_tag + cache_tag) if cache_tag else contextlib.nullcontext():
        return compile_fx(gm, example_inputs, config_patches=config_patches or None)


def compile_without_inductor(gm: Any, example_inputs: Any) -> Any:
    """AOTAutograd only: derivatives and functionalisation, the kernels of eager mode.

    But for those, as of torch 2.13, whose kernel for the CPU has other strides than its fake one says it has.
    """
    from functorch.compile import min_cut_rematerialization_partition
    from torch._decomp import get_decompositions
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop

    aten = torch.ops.aten
    decomposed = [
        aten.log_sigmoid_forward, aten.log_sigmoid_backward, aten.elu_backward, aten.softplus_backward,
        aten.hardsigmoid_backward, aten.hardswish_backward, aten.hardtanh_backward, aten._log_softmax_backward_data,
        aten.native_layer_norm_backward,
    ]  # fmt: skip
    compile_ = aot_autograd(
        fw_compiler=boxed_nop,
        partition_fn=min_cut_rematerialization_partition,
        keep_inference_input_mutations=True,
        decompositions=get_decompositions(decomposed),
    )
    return compile_(gm, example_inputs)


@cache
def cpu_compiler_error() -> str | None:
    """Why Inductor cannot compile for the CPU here; None if it can."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def counters() -> Any:
    """Dynamo's counters of this package."""
    from torch._dynamo.utils import counters as all_counters

    return all_counters["lacompile"]


def trace_artifact(name: str, payload: str) -> None:
    """Adds an artifact to TORCH_TRACE, where that is on."""
    with contextlib.suppress(Exception):
        from torch._logging import trace_structured

        trace_structured("artifact", lambda: {"name": name, "encoding": "json"}, payload_fn=lambda: payload)


_ALLOW_REQUIRES_GRAD = torch._C._functorch.set_inplace_requires_grad_allowed  # type: ignore[attr-defined]
"""What Dynamo writes around a ``requires_grad_`` of the program, whether or not a transform is near."""


def functorch_inside(gm: Any) -> bool:
    """Whether a graph switches functorch transforms or forward-mode AD on and off: running it on fakes would too."""
    return any(is_functorch(n.target) and n.target is not _ALLOW_REQUIRES_GRAD for n in gm.graph.nodes)


def is_functorch(target: Any) -> bool:
    """Whether a function of a Dynamo graph is part of a functorch transform or of forward-mode AD."""
    prefixes = ("torch._functorch", "torch._C._functorch", "torch.autograd.forward_ad")
    return str(getattr(target, "__module__", "")).startswith(prefixes)


def changes_mode(target: Any) -> bool:
    """Whether a function of a Dynamo graph, given no tensor, switches something of the process on or off."""
    if target is _ALLOW_REQUIRES_GRAD:
        return True
    module = str(getattr(target, "__module__", ""))
    return module in ("torch._C", "torch._C._autograd", "torch.random") or module.startswith(
        ("torch.autograd", "torch.cuda")
    )


def functorch_active() -> bool:
    """Whether a functorch transform or forward-mode AD level is running."""
    transform = torch._C._functorch.peek_interpreter_stack()  # type: ignore[attr-defined]
    return transform is not None or forward_ad._current_level >= 0


def hidden_from_dynamo(function: Any) -> Any:
    """``function``, never traced from the inside, not even when it is called from a compiled program."""
    return torch._disable_dynamo(function)


def below_autograd() -> contextlib.AbstractContextManager[None]:
    """Calls inside do not record gradients: who calls has done that."""
    return torch._C._AutoDispatchBelowAutograd()


def after_autograd(keys: Any) -> Any:
    """Those of the dispatch keys that come after autograd."""
    return keys & torch._C._after_autograd_keyset


def want_gradient(args: Any) -> bool:
    """Whether gradients are recorded and one of the arguments wants one."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)

"""The compiled Triton kernels against fp64, on a GPU: ``pytest -m gpu``.

Each test fills unwritten memory with NaN. Reference and inputs are on the GPU; the reference is the quadratic form,
or for long sequences the chunked form, in fp64.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import sys
from typing import ClassVar

import pytest
import torch

from lacompile.kernels import cpu, reference
from lacompile.kernels.tuning import space
from lacompile.testing import budget, head_log_decay, qkv, relative_error, state, token_log_decay

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

B, H = 2, 3
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
DECAYS = pytest.mark.parametrize("per_token", [False, True], ids=["per-head", "per-token"])
HEAD_SIZES = [(d, d) for d in (16, 32, 48, 64, 80, 96, 112, 128, 192, 256)]
HEAD_SIZES += [(128, 64), (64, 128), (16, 256), (24, 20)]
LENGTHS = (1, 2, 63, 64, 65, 200, 513)


@pytest.fixture(params=["hopper", "descriptors", "pointers"])
def kernels(request, monkeypatch):
    """The kernels, with one of their bodies and ways to read tiles; ``hopper`` is what is chosen on such a device."""
    from lacompile.kernels import lightning2

    capability = torch.cuda.get_device_capability()
    if request.param == "hopper" and capability[0] != 9:
        pytest.skip("no such tensor cores")
    if request.param == "descriptors" and capability < (9, 0):
        pytest.skip("no tensor memory accelerator")
    monkeypatch.setattr(lightning2.launch, "TMA", request.param != "pointers")
    monkeypatch.setattr(lightning2.launch, "HOPPER", request.param == "hopper")
    lightning2.calls.forget()
    yield lightning2
    lightning2.calls.forget()


def set_plan(kernels, monkeypatch, plan):
    """Splits sequences by ``plan(length)``."""
    monkeypatch.setattr(kernels.launch, "plan", lambda length, *_, **__: kernels.launch.Segments(*plan(length)))
    kernels.calls.forget()


@contextlib.contextmanager
def poisoned():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def arguments(
    length, dk=64, dv=64, per_token=False, dtype=torch.bfloat16, states="initial final", batch=B, heads=H, **more
):
    """q, k, v, log_decay, scale, initial state, and the gradients of the output and of the final state."""
    q, k, v = qkv(batch, heads, length, dk, dv, dtype=dtype, device="cuda", **more)
    if per_token:
        log_decay = token_log_decay(batch, heads, length, device="cuda")
    else:
        log_decay = head_log_decay(heads, device="cuda")
    do = qkv(batch, heads, length, dk, dv, dtype=dtype, device="cuda", seed=7)[2]
    initial = state(batch, heads, dk, dv, device="cuda") if "initial" in states else None
    d_state = state(batch, heads, dk, dv, device="cuda", seed=8) if "final" in states else None
    return (q, k, v, log_decay, 0.5, initial), do, d_state


def exact(args, do, d_state):
    """Output, state and gradients in fp64; the initial state's gradient is empty where there is none."""
    args = [x.double() if isinstance(x, torch.Tensor) else x for x in args]
    if do.shape[2] > 1024:
        grads = cpu.backward(do.double(), None if d_state is None else d_state.double(), *args)
        out, last = cpu.forward(*args)
        return out, last, [*grads[:4], grads[4] if args[5] is not None else out.new_empty(0)]
    args = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in args]
    out, last = reference.quadratic(*args)
    loss = (out * do.double()).sum() + (0 if d_state is None else (last * d_state.double()).sum())
    leaves = [x for x in args if isinstance(x, torch.Tensor)]
    grads = list(torch.autograd.grad(loss, leaves))
    return out, last, grads + [out.new_empty(0)] * (5 - len(grads))


def row_error(got, want):
    """The largest error of a row against its size, or against a tenth of the usual one if it is smaller than that."""
    got, want = got.double().flatten(0, -2), want.double().flatten(0, -2)
    size = want.norm(dim=-1)
    return float(((got - want).norm(dim=-1) / size.clamp_min(0.1 * float(size.square().mean().sqrt()))).max())


def check(kernels, args, do, d_state, rows=True, narrow=""):
    """Forward and backward within the budgets of the dtype, as a whole and row by row. All faults are named at once."""
    with poisoned():
        out, last = kernels.forward(*args, narrow=narrow)
        grads = kernels.backward(do, d_state, *args, narrow=narrow)
    want_out, want_last, want_grads = exact(args, do, d_state)
    allowed = budget(args[0].dtype)
    found = [("o", out, want_out, allowed.output), ("state", last, want_last, allowed.output)]
    names = ("dq", "dk", "dv", "dg", "d_initial")
    found += [(n, g, w, allowed.gradient) for n, g, w in zip(names, grads, want_grads, strict=True)]
    faults = []
    for name, got, want, limit in found:
        if name == "dg" and got.dim() == 1:
            limit *= 4  # a sum over all tokens of terms of either sign, each within the budget
        error = relative_error(got, want)
        if not error <= limit:
            faults.append(f"{name}: relative error {error:.2e}, allowed {limit:.2e}")
        if rows and name in ("o", "dq", "dk", "dv") and got.numel():
            error = row_error(got, want)
            if not error <= 16 * limit:
                faults.append(f"{name}: relative error of a row {error:.2e}, allowed {16 * limit:.2e}")
    assert not faults, "; ".join(faults)


class TestEveryShape:
    @pytest.mark.parametrize("dk, dv", HEAD_SIZES)
    @DTYPES
    @DECAYS
    def test_head_sizes_and_lengths(self, kernels, dk, dv, dtype, per_token):
        for length in LENGTHS:
            check(kernels, *arguments(length, dk, dv, per_token, dtype))

    @pytest.mark.parametrize("states", ["", "initial", "final", "initial final"], ids=lambda s: s or "none")
    @pytest.mark.parametrize("size", [64, 128])
    @DTYPES
    @DECAYS
    def test_states(self, kernels, states, size, dtype, per_token):
        check(kernels, *arguments(150, size, size, per_token, dtype, states))

    @pytest.mark.parametrize(
        "groups", [{"k_heads": 1, "v_heads": 1}, {"q_heads": 2, "k_heads": 2}, {"v_heads": 2}], ids=str
    )
    @pytest.mark.parametrize("tokens_first", [False, True])
    @DECAYS
    def test_shared_heads(self, kernels, groups, tokens_first, per_token):
        check(kernels, *arguments(333, per_token=per_token, heads=4, tokens_first=tokens_first, **groups))


class TestEveryConfiguration:
    """What tuning may choose is right, whether it is the fastest or not."""

    CASES: ClassVar = [
        (size, n) for size in (64, 128, 256) for n in range(len(space.candidates(size, size, torch.bfloat16, True)))
    ]

    @pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
    def size(self, request, monkeypatch):
        from lacompile.kernels import lightning2

        if torch.cuda.get_device_capability()[0] != 9:
            pytest.skip("no such tensor cores")
        size, n = request.param
        monkeypatch.setattr(lightning2.launch, "place", lambda kind, found, *_: min(n, len(found) - 1))
        lightning2.calls.forget()
        yield size
        lightning2.calls.forget()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @DECAYS
    def test_against_the_reference(self, size, dtype, per_token):
        from lacompile.kernels import lightning2

        for length in (1, 64, 200, 1000):
            check(lightning2, *arguments(length, size, size, per_token, dtype, tokens_first=length > 64))
        check(lightning2, *arguments(5000, size, size - 24, per_token, dtype, batch=1, heads=2, k_heads=1))
        check(lightning2, *arguments(300, size - 16, size, per_token, dtype, states=""))

    def test_small_integers(self, size):
        from lacompile.kernels import lightning2

        TestExactness.check_integers(lightning2, size, torch.bfloat16)

    @DECAYS
    def test_many_programs_give_the_same_bits(self, size, per_token):
        """More programs than run at a time, so that their timing differs from run to run."""
        from lacompile.kernels import lightning2

        args, do, d_state = arguments(1100, size, size, per_token, batch=4, heads=64)
        first = (*lightning2.forward(*args), *lightning2.backward(do, d_state, *args))
        for _ in range(3):
            again = (*lightning2.forward(*args), *lightning2.backward(do, d_state, *args))
            assert all(torch.equal(a, b) for a, b in itertools.zip_longest(first, again))


class TestLongSequences:
    @pytest.mark.parametrize("size", [64, 128, 256])
    @pytest.mark.parametrize("length", [4096, 16384 + 37])
    @DECAYS
    def test_segments(self, kernels, size, length, per_token):
        tiles = space.portable(size, size, torch.bfloat16)
        assert kernels.launch.plan(length, 4, kernels.launch.Hardware(), tiles).count > 1
        check(kernels, *arguments(length, size, size, per_token, batch=1, heads=1))

    @DECAYS
    def test_segments_agree_with_one_segment(self, kernels, per_token, monkeypatch):
        args, do, d_state = arguments(8192, 128, 128, per_token, batch=1, heads=2)
        split = (*kernels.forward(*args), *kernels.backward(do, d_state, *args))
        set_plan(kernels, monkeypatch, lambda length: (length, 1))
        whole = (*kernels.forward(*args), *kernels.backward(do, d_state, *args))
        for n, (a, b) in enumerate(zip(split, whole, strict=True)):
            if n != 5 or per_token:
                assert relative_error(a, b) < 1e-2, n
        if not per_token:
            # One decay's gradient is a sum over all tokens that nearly cancels: judged by the size of its terms.
            each = args[3][None, :, None].expand(1, 2, 8192).contiguous()
            terms = kernels.backward(do, d_state, *args[:3], each, *args[4:])[3]
            assert ((split[5] - whole[5]).abs() < 1e-3 * terms.abs().sum((0, 2))).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_slow_decay_over_a_long_sequence(self, kernels, dtype):
        args, do, d_state = arguments(32768, 128, 128, dtype=dtype, states="", batch=1, heads=2)
        args = (*args[:3], torch.tensor([-1e-4, 0.0], device="cuda"), *args[4:])
        check(kernels, args, do, d_state)


class TestNumbersOfBf16:
    """Operands of fp32 that hold no more than numbers of bf16 need fewer products, for the same result."""

    @staticmethod
    def arguments(narrow, *given, **more):
        (q, k, v, *rest), do, d_state = arguments(*given, dtype=torch.float32, **more)
        operands = [x.bfloat16().float() if name in narrow else x for name, x in zip("qkv", (q, k, v), strict=True)]
        return (*operands, *rest), do, d_state

    @pytest.mark.parametrize("narrow", ["q", "k", "v", "qkv"])
    @pytest.mark.parametrize("dk, dv", [(64, 64), (128, 64), (64, 128)])
    @DECAYS
    def test_the_same_bits(self, kernels, dk, dv, narrow, per_token, monkeypatch):
        set_plan(kernels, monkeypatch, lambda length: (length, 1))
        args, do, d_state = self.arguments(narrow, 333, dk, dv, per_token)
        told = (*kernels.forward(*args, narrow=narrow), *kernels.backward(do, d_state, *args, narrow=narrow))
        untold = (*kernels.forward(*args), *kernels.backward(do, d_state, *args))
        for n, (a, b) in enumerate(zip(told, untold, strict=True)):
            if n == 5:  # of the decay: a product of its own form is part of it
                assert relative_error(a, b) < budget(torch.float32).gradient
            else:
                assert torch.equal(a, b), n

    @pytest.mark.parametrize("narrow", ["k", "qk", "qkv"])
    @pytest.mark.parametrize("size", [64, 128])
    @DECAYS
    def test_segments(self, kernels, size, narrow, per_token):
        check(kernels, *self.arguments(narrow, 4096, size, size, per_token, batch=1, heads=1), narrow=narrow)


class TestExactness:
    @pytest.mark.parametrize("size", [32, 64, 128, 256])
    @DTYPES
    def test_integers(self, kernels, size, dtype, monkeypatch):
        """Without decay sums of integers are exact: one lost or doubled product shows, whatever the tolerance."""
        set_plan(kernels, monkeypatch, lambda length: (512, -(-length // 512)))
        self.check_integers(kernels, size, dtype)

    @staticmethod
    def check_integers(kernels, size, dtype):
        generator = torch.Generator("cuda").manual_seed(0)
        length = 1024 + 77
        sparse = torch.rand(3, B, H, length, size, generator=generator, device="cuda") < 4 / size
        signs = torch.randint(0, 2, sparse.shape, generator=generator, device="cuda") * 2 - 1
        q, k, do = (sparse * signs).to(dtype).unbind()
        wide = 65793 if dtype == torch.float32 else 1  # as a sum of bf16 numbers it takes three
        args = (q, k, do * wide, torch.zeros(H, device="cuda"), 1.0, None)
        for _ in range(3):
            out, last = kernels.forward(*args)
            grads = kernels.backward(do, None, *args)
            want, want_last, want_grads = exact(args, do, None)
            assert max(want.abs().max(), want_last.abs().max()) <= 256 * wide  # else bf16 would round, or fp32
            assert torch.equal(out.double(), want) and torch.equal(last.double(), want_last)
            for got, expected in zip(grads[:3], want_grads[:3], strict=True):
                assert torch.equal(got, expected.to(dtype))

    @DECAYS
    def test_impulses(self, kernels, per_token):
        """With q = 1, k and v one-hot at token j, ``o_i = 2^-(i - j)``: an off-by-one shows everywhere."""
        length, size = 1500, 64
        for j in (0, 63, 64, 511, 512, 700, 1499):
            q = torch.ones(1, 1, length, size, device="cuda", dtype=torch.bfloat16)
            k, v = torch.zeros_like(q), torch.zeros_like(q)
            k[:, :, j, 0] = v[:, :, j, 0] = 1
            g = torch.full((1, 1, length) if per_token else (1,), -math.log(2), device="cuda")
            out, _ = kernels.forward(q, k, v, g, 1.0, None)
            gap = torch.arange(length, dtype=torch.float64, device="cuda") - j
            want = torch.where((gap >= 0) & (gap < 100), torch.exp2(-gap), 0.0)
            torch.testing.assert_close(out[0, 0, :, 0].double(), want, rtol=2**-8, atol=2.0**-99)
            assert (out[..., 1:] == 0).all()

    @pytest.mark.parametrize("size", [64, 128])
    @DECAYS
    def test_two_runs_are_the_same_bits(self, kernels, size, per_token):
        args, do, d_state = arguments(5000, size, size, per_token)
        first = (*kernels.forward(*args), *kernels.backward(do, d_state, *args))
        for _ in range(5):
            again = (*kernels.forward(*args), *kernels.backward(do, d_state, *args))
            assert all(torch.equal(a, b) for a, b in itertools.zip_longest(first, again))


class TestSelfCheck:
    @pytest.fixture(autouse=True)
    def no_verdicts(self, kernels, monkeypatch):
        monkeypatch.setattr(kernels.selfcheck, "VERDICTS", {})

    def test_each_kind_is_asked_once(self, kernels):
        args, do, d_state = arguments(300)
        kernels.forward(*args)
        kernels.backward(do, d_state, *args)
        assert list(kernels.selfcheck.VERDICTS.values()) == [True, True]

    @DECAYS
    def test_a_wrong_kernel_is_not_used(self, kernels, per_token, monkeypatch):
        for name in ("forward", "backward"):
            module = sys.modules[f"{kernels.__name__}.{name}"]
            monkeypatch.setattr(module, "equal", lambda found, want: False)
        args = arguments(300, per_token=per_token, k_heads=1)
        with pytest.warns(kernels.selfcheck.WrongKernel):
            kernels.forward(*args[0])
        check(kernels, *args)


class TestLaunches:
    """From the second call on kernels are launched through CUDA's driver, not by Triton."""

    @pytest.fixture
    def launches(self, kernels, monkeypatch):
        """All that are prepared, as pairs of a launch and how often Triton launched it."""
        seen = []

        class Recorded(kernels.calls.Launch):
            def __init__(self, *args):
                super().__init__(*args)
                seen.append(self)

        for name in ("forward", "backward", "segments", "decode", "decay_grad", "factors"):
            monkeypatch.setattr(importlib.import_module(f"{kernels.__name__}.{name}"), "Launch", Recorded)
        kernels.calls.forget()
        return seen

    def runs(self, kernels, monkeypatch, per_token):
        """A call of every kernel, for the same numbers at other addresses in each."""
        set_plan(kernels, monkeypatch, lambda length: (512, -(-length // 512)))
        args, do, d_state = arguments(1100, per_token=per_token, k_heads=1)

        def run():
            inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
            few = [x[:, :, :3] if i < 3 or (i == 3 and per_token) else x for i, x in enumerate(inputs)]
            state = inputs[5].clone()
            decoded = kernels.decode(*few[:5], state)
            return (*kernels.forward(*inputs), *kernels.backward(do.clone(), d_state, *inputs), decoded, state)

        return run

    @DECAYS
    def test_all_are_the_same_bits(self, kernels, launches, monkeypatch, per_token):
        run = self.runs(kernels, monkeypatch, per_token)
        first = run()
        assert launches and all(launch.direct is not None for launch in launches)
        monkeypatch.setattr(kernels.direct, "MOST", 2)
        kept = [run() for _ in range(4)]
        for again in kept:
            assert all(torch.equal(a, b) for a, b in itertools.zip_longest(first, again))
        assert all(0 < len(launch.direct.known) <= 2 for launch in launches)

    def test_a_hook_is_told_of_each(self, kernels, monkeypatch):
        from triton import knobs

        run, told = self.runs(kernels, monkeypatch, per_token=False), []
        run()

        def hook(metadata):
            told.append(metadata.get()["name"])

        knobs.runtime.launch_enter_hook.add(hook)
        try:
            run()
        finally:
            knobs.runtime.launch_enter_hook.remove(hook)
        run()
        names = [f"{name}_kernel" for name in ("forward", "backward", "contributions", "scan", "decode", "decay_grad")]
        assert sorted(told) == sorted([*names, "contributions_kernel", "scan_kernel"])

    @pytest.mark.parametrize("change", ["fewer", "more", "other"])
    def test_a_kernel_that_takes_something_else_is_left_to_triton(self, kernels, launches, monkeypatch, change):
        layout_of = kernels.direct.layout_of

        def wrong(*args):
            layout = layout_of(*args)
            if change == "fewer":
                layout.sizes.pop()
            elif change == "more":
                layout.sizes.append(8)
            else:
                layout.sizes[-1] = 4
            return layout

        monkeypatch.setattr(kernels.direct, "layout_of", wrong)
        run = self.runs(kernels, monkeypatch, per_token=False)
        first, again = run(), run()
        assert launches and all(launch.direct is None for launch in launches)
        assert all(torch.equal(a, b) for a, b in itertools.zip_longest(first, again))


class TestPrecision:
    @DECAYS
    def test_fp32_that_is_not_a_number_stays_so(self, kernels, per_token):
        args, _, _ = arguments(200, 64, 64, per_token, torch.float32, k_heads=H)
        args[1][0, 1, 100, 3] = float("nan")
        out, last = kernels.forward(*args)
        assert out[0, 1, 100:].isnan().all() and last[0, 1, 3].isnan().all()
        assert not out[0, 0].isnan().any() and not out[0, 1, :64].isnan().any()

    @DECAYS
    def test_fp32_products_are_as_exact_as_pytorch_is_asked_to_form_its_own(self, kernels, per_token):
        args, do, d_state = arguments(700, 64, 64, per_token, torch.float32)
        check(kernels, args, do, d_state)
        torch.set_float32_matmul_precision("high")
        try:
            found = [kernels.forward(*args)[0], *kernels.backward(do, d_state, *args)[:3]]
        finally:
            torch.set_float32_matmul_precision("highest")
        out, _, grads = exact(args, do, d_state)
        for got, want in zip(found, (out, *grads[:3]), strict=True):
            if kernels.launch.HOPPER:  # which is faster than with TF32
                assert relative_error(got, want) <= budget(torch.float32).output
            else:  # TF32 has the mantissa of fp16
                assert budget(torch.float32).gradient < relative_error(got, want) <= budget(torch.float16).gradient


class TestTuning:
    def test_a_search_finds_a_winner_that_is_kept(self, monkeypatch, tmp_path):
        from lacompile.kernels import lightning2
        from lacompile.kernels.lightning2.compiler import identity
        from lacompile.kernels.tuning import choose, table

        monkeypatch.setenv("LACOMPILE_AUTOTUNE", "quick")
        monkeypatch.setenv("LACOMPILE_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(table, "shipped_path", lambda gpu: tmp_path / "none.json")
        choose.forget()
        lightning2.calls.forget()
        try:
            check(lightning2, *arguments(300))
            found = table.read(table.stored_path(identity(torch.device("cuda", 0))))
            assert len(found) == 2  # forward, and backward with the decay's gradient
            for winner in found.values():
                assert all(ms is not None and ms > 0 for ms in winner.milliseconds)
        finally:
            choose.forget()
            lightning2.calls.forget()


class TestCompilation:
    @staticmethod
    def count(kernels):
        """How many kernels have been compiled."""
        names = ("forward", "backward", "segments", "hopper.forward", "hopper.backward")
        modules = [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]
        every = {id(k): k for m in modules for name, k in vars(m).items() if name.endswith("_kernel")}
        return sum(len(cache[0]) for k in every.values() for cache in k.device_caches.values())

    def test_none_per_length_or_batch(self, kernels):
        def run(length, batch, heads):
            args, do, d_state = arguments(length, 64, 64, batch=batch, heads=heads, tokens_first=True)
            kernels.forward(*args)
            kernels.backward(do, d_state, *args)

        run(100, 2, 3)
        run(20000, 1, 3)
        before = self.count(kernels)
        for length, batch, heads in ((1, 1, 1), (16, 1, 3), (101, 2, 3), (64, 16, 16), (5000, 1, 2), (8192, 2, 1)):
            run(length, batch, heads)
        assert self.count(kernels) == before

    @DECAYS
    @pytest.mark.parametrize("length", [100, 20000])
    def test_ahead_of_the_call(self, kernels, length, per_token):
        from lacompile.kernels.lightning2 import warm

        args, do, d_state = arguments(length, 40, 56, per_token, batch=1, heads=3, tokens_first=True)
        q, k, v, log_decay, initial = (x.requires_grad_() for x in args if isinstance(x, torch.Tensor))
        before = self.count(kernels)
        warm.compile_kernels(warm.Call.of(q, k, v, log_decay, initial, True, ""))
        after = self.count(kernels)
        with torch.no_grad():
            kernels.forward(*args)
            kernels.backward(do, d_state, *args)
        assert after == self.count(kernels)
        assert before < after or length > 100  # bodies share the kernels that cut


class TestMemory:
    def test_strided_inputs(self, kernels):
        (q, k, v, g, scale, initial), do, d_state = arguments(300, per_token=True, tokens_first=True)
        packed = torch.cat([q, k, v], 3).transpose(1, 2).contiguous().transpose(1, 2)
        check(kernels, (*packed.split(64, 3), g.mT.contiguous().mT, scale, initial), do, d_state)
        check(kernels, (q, k, v, g, scale, initial), do[..., :1].expand(do.shape), d_state)

    def test_rows_at_odd_offsets(self, kernels):
        (q, k, v, g, scale, initial), do, d_state = arguments(300)
        wide = torch.zeros(*q.shape[:3], 67, device="cuda", dtype=q.dtype)
        wide[..., 1:65] = q
        check(kernels, (wide[..., 1:65], k, v, g, scale, initial), do, d_state)

    def test_offsets_beyond_31_bits(self, kernels):
        args, do, d_state = arguments(600, batch=1, heads=1)
        far = torch.zeros(600 * 2**22, device="cuda", dtype=torch.bfloat16)
        views = [far.as_strided(args[0].shape, (0, 0, 2**22, 1), 64 * n) for n in range(3)]
        for view, x in zip(views, args, strict=False):
            view.copy_(x)
        check(kernels, (*views, *args[3:]), do, d_state)

    def test_no_decay_is_read_before_the_first(self, kernels):
        """Decays so far apart that one read before token 0 would be of memory that is not there."""
        args, do, d_state = arguments(130, per_token=True, batch=1, heads=1)
        far = torch.zeros(130 * 2**18, device="cuda")[:: 2**18][None, None]
        far.copy_(args[3])
        check(kernels, (*args[:3], far, *args[4:]), do, d_state)

    def test_many_heads(self, kernels):
        args, do, d_state = arguments(65, 16, 16, batch=300, heads=256, states="")
        check(kernels, args, do, d_state, rows=False)

    def test_nothing_outside_is_written(self, kernels):
        """The kernels write where the launcher says; NaN around the inputs does not leak in either."""
        args, do, d_state = arguments(70, 80, 80)
        guarded = []
        for x in args[:3]:
            around = torch.full((B, H, 70 + 64, 96), float("nan"), device="cuda", dtype=x.dtype)
            around[:, :, :70, :80] = x
            guarded.append(around[:, :, :70, :80])
        check(kernels, (*guarded, *args[3:]), do, d_state)

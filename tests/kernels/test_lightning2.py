"""The Triton kernels compute what the fp64 reference computes, run by Triton's interpreter on the CPU.

bf16 is not here: the interpreter multiplies its bits as integers.
"""

from __future__ import annotations

import dataclasses
import math
from unittest import mock

import pytest
import torch

from lacompile.kernels import cpu, reference
from lacompile.kernels.tuning import space
from lacompile.testing import budget, check_error, head_log_decay, qkv, relative_error, state, token_log_decay

from .interpreter import interpreted_kernels, run_in_a_process_of_its_own

lightning2 = interpreted_kernels()
B, H, C = 1, 2, 64
DECAYS = pytest.mark.parametrize("per_token", [False, True], ids=["per-head", "per-token"])
STATES = pytest.mark.parametrize("states", ["", "initial", "final", "initial final"], ids=lambda s: s or "none")
interpreted = pytest.mark.skipif(lightning2 is None, reason="runs in a process of its own")


@pytest.mark.skipif(lightning2 is not None, reason="interpreted in this process")
def test_in_a_process_of_its_own():
    run_in_a_process_of_its_own(__file__)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch, request):
    """Memory that is not written to holds NaN. Triton reads its variable again when it runs."""
    if lightning2 is not None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        if "own_tiles" not in request.fixturenames:
            config = lightning2.launch.config
            wide = {"chunk": C, "stages": 1}  # the short chunks of fp32 take the interpreter four times as long
            shorter = lambda *kind: [dataclasses.replace(tiles, **wide) for tiles in config(*kind)]  # noqa: E731
            monkeypatch.setattr(lightning2.launch, "config", shorter)
        lightning2.calls.forget()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def own_tiles():
    """Keeps the launcher's chunks."""


@pytest.fixture
def descriptors(monkeypatch):
    """Tiles by tensor descriptor, as on Hopper. Returns what was described: nothing must fall back to pointers."""
    seen = []
    use_tma = lightning2.launch.use_tma
    monkeypatch.setattr(lightning2.launch, "has_tma", lambda device: True)
    monkeypatch.setattr(lightning2.launch, "use_tma", lambda *x: seen.append(use_tma(*x)) or seen[-1])
    yield
    assert seen and all(seen)


@pytest.fixture
def short_segments():
    """Segments of three chunks and marks at every two, so that short sequences have many of both."""
    launch = lightning2.launch

    def plan(length, *_, **__):
        return launch.Segments(3 * C, -(-length // (3 * C)))

    with mock.patch.multiple(launch, plan=plan, SPAN=2 * C):
        yield


def arguments(length, dk=16, dv=16, per_token=False, dtype=torch.float32, states="initial final", **more):
    """q, k, v, log_decay, scale, initial state, and the gradients of the output and of the final state."""
    q, k, v = qkv(B, H, length, dk, dv, dtype=dtype, **more)
    log_decay = token_log_decay(B, H, length) if per_token else head_log_decay(H)
    do = qkv(B, H, length, dk, dv, dtype=dtype, seed=7)[2]
    initial = state(B, H, dk, dv) if "initial" in states else None
    d_state = state(B, H, dk, dv, seed=8) if "final" in states else None
    return (q, k, v, log_decay, 0.5, initial), do, d_state


def wanted(args, do, d_state):
    """Output, state and gradients of the fp64 reference; the initial state's is empty where there is none."""
    exact = [x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) else x for x in args]
    out, last = reference.quadratic(*exact)
    loss = (out * do.double()).sum() + (0 if d_state is None else (last * d_state.double()).sum())
    leaves = [x for x in exact if isinstance(x, torch.Tensor)]
    grads = list(torch.autograd.grad(loss, leaves))
    return out, last, grads + [out.new_empty(0)] * (5 - len(grads))


def check(args, do, d_state, narrow=""):
    """Forward and backward within the budgets of the dtype."""
    dtype = args[0].dtype
    out, last = lightning2.forward(*args, narrow=narrow)
    grads = lightning2.backward(do, d_state, *args, narrow=narrow)
    want_out, want_last, want_grads = wanted(args, do, d_state)
    assert out.dtype == dtype and last.dtype == torch.float32
    check_error("o", out, want_out)
    check_error("state", last, want_last, dtype=dtype)
    for name, got, want in zip(("dq", "dk", "dv", "dg", "d_initial"), grads, want_grads, strict=True):
        assert got.dtype == (dtype if name in ("dq", "dk", "dv") else torch.float32)
        if name == "dg" and got.dim() == 1:
            # A sum over all tokens of terms of either sign, each within the budget.
            assert relative_error(got, want) <= 4 * budget(dtype).gradient
        else:
            check_error(name, got, want, kind="gradient", dtype=dtype)


@interpreted
class TestAgainstTheReference:
    @pytest.mark.parametrize("length", [1, 2, C - 1, C, C + 1, 2 * C + 7])
    @DECAYS
    def test_lengths(self, length, per_token):
        check(*arguments(length, per_token=per_token))

    @STATES
    @DECAYS
    def test_states(self, states, per_token):
        check(*arguments(C + 5, per_token=per_token, states=states))

    @pytest.mark.parametrize("dk, dv", [(32, 80), (80, 48), (24, 20), (192, 16), (16, 192), (128, 64)])
    def test_head_sizes(self, dk, dv):
        check(*arguments(C + 3, dk, dv, states="initial"))

    @DECAYS
    def test_half_precision(self, per_token):
        check(*arguments(3 * C - 5, 32, 32, per_token, torch.float16))

    @DECAYS
    def test_short_chunks(self, per_token, own_tiles):
        check(*arguments(C + 5, per_token=per_token))

    @pytest.mark.parametrize(
        ("dk", "dv", "length", "per_token"),
        [
            (32, 80, 1, False),
            (16, 16, 1, True),
            (32, 80, 2 * C, True),
            (16, 16, 2 * C, False),
            (32, 80, 4 * C + 9, False),
            (16, 16, 4 * C + 9, True),
        ],
    )
    def test_descriptors(self, dk, dv, length, per_token, descriptors, short_segments):
        groups = {"q_heads": 1, "k_heads": 1} if dk == dv else {}
        check(*arguments(length, dk, dv, per_token, torch.float16, tokens_first=dk == dv, **groups))

    @pytest.mark.parametrize(
        "groups", [{"k_heads": 1, "v_heads": 1}, {"q_heads": 1, "k_heads": 1}, {"q_heads": 1}], ids=str
    )
    @DECAYS
    def test_shared_heads(self, groups, per_token):
        check(*arguments(C + 5, per_token=per_token, **groups))

    @pytest.mark.parametrize(
        ("length", "states", "per_token"),
        [
            (2 * C, "", False),
            (2 * C, "initial", True),
            (2 * C, "final", True),
            (2 * C, "initial final", False),
            (4 * C + 9, "", True),
            (4 * C + 9, "initial", False),
            (4 * C + 9, "final", False),
            (4 * C + 9, "initial final", True),
        ],
    )
    def test_segments(self, length, states, per_token, short_segments):
        check(*arguments(length, per_token=per_token, states=states))

    @pytest.mark.parametrize(("narrow", "per_token"), [("q", False), ("k", True), ("qkv", False), ("qkv", True)])
    def test_numbers_of_bf16(self, narrow, per_token, short_segments):
        (q, k, v, *rest), do, d_state = arguments(4 * C + 9, 32, 80, per_token)
        operands = [x.bfloat16().float() if name in narrow else x for name, x in zip("qkv", (q, k, v), strict=True)]
        check((*operands, *rest), do, d_state, narrow)

    def test_segments_of_shared_heads(self, short_segments):
        check(*arguments(3 * C, 32, 80, True, k_heads=1, v_heads=1))


@interpreted
class TestDecays:
    @pytest.mark.parametrize("decay", [0.0, 1e-5, 1.0, 20.0, 500.0])
    def test_strengths(self, decay, short_segments):
        args, do, d_state = arguments(4 * C + 3)
        args = (*args[:3], torch.full((H,), -decay), *args[4:])
        out, last = lightning2.forward(*args)
        want, want_last, _ = wanted(args, do, d_state)
        check_error("o", out, want)
        check_error("state", last, want_last)
        assert all(x.isfinite().all() for x in lightning2.backward(do, d_state, *args))

    @pytest.mark.parametrize("most", [0.05, 1.0, 5.0])
    def test_gates_cost_no_more_digits_than_in_the_chunked_form(self, most, own_tiles):
        """The sums of a chunk's gates are large beside the differences that count; tokens of one chunk are most of
        q . dq and of k . dk, and large beside what is left of their difference. A parameter that all tokens share adds
        up what is left of its rounding."""
        q, k, v = qkv(B, H, C + 6, 16, 16)
        do = qkv(B, H, C + 6, 16, 16, seed=7)[2]
        args = q, k, v, -most * torch.rand(B, H, C + 6, generator=torch.Generator().manual_seed(0)), 1.0, None
        want, _, wanted_grads = wanted(args, do, None)
        check_error("o", lightning2.forward(*args)[0], want, eager=cpu.forward(*args)[0])
        grads = lightning2.backward(do, None, *args), wanted_grads, cpu.backward(do, None, *args)
        for name, got, exact, chunked in zip(("dq", "dk", "dv", "dg"), *grads, strict=False):
            check_error(name, got, exact, eager=chunked, kind="gradient")
        got, exact, chunked = ((x[3].double() * args[3]).sum((0, 2)) for x in grads)
        check_error("rates", got.float(), exact, eager=chunked, kind="gradient")

    @DECAYS
    def test_minus_infinity_forgets_everything(self, per_token):
        (q, k, v, g, scale, initial), _, _ = arguments(C + 9, per_token=per_token)
        g = g.clone()
        g[(..., 5) if per_token else ...] = float("-inf")
        out, last = lightning2.forward(q, k, v, g, scale, initial)
        want, want_last = reference.recurrence(*(x.double() for x in (q, k, v, g)), scale, initial.double())
        check_error("o", out, want)
        check_error("state", last, want_last)

    def test_nan_is_not_hidden(self):
        (q, k, v, g, scale, _), _, _ = arguments(10, per_token=True)
        g[0, 0, 4] = float("nan")
        out, _ = lightning2.forward(q, k, v, g, scale, None)
        assert out[0, 0, 4:].isnan().all() and not out[0, 1].isnan().any()

    @DECAYS
    def test_an_impulse_decays_exactly(self, per_token, short_segments):
        """With q = 1, k and v one-hot at token j, ``o_i = 2^-(i - j)`` from j on: an off-by-one shows everywhere."""
        length, j = 4 * C + 5, C - 2
        q = torch.ones(B, H, length, 16)
        k, v = torch.zeros_like(q), torch.zeros_like(q)
        k[:, :, j, 0] = v[:, :, j, 0] = 1
        g = torch.full((B, H, length) if per_token else (H,), -0.25).mul_(torch.tensor(2.0).log() * 4)
        out, _ = lightning2.forward(q, k, v, g, 1.0, None)
        gap = torch.arange(length, dtype=torch.float64) - j
        want = torch.where(gap >= 0, torch.exp2(-gap), 0.0)
        got = out[0, 0, :, 0].double()
        # What a fixed decay has halved 40 times may be forgotten from one segment to the next.
        near = (gap <= 40) | per_token
        torch.testing.assert_close(got[near], want[near], rtol=2e-5, atol=1e-37)
        assert ((got == 0) | ((got / want - 1).abs() <= 2e-5))[~near].all()
        assert (out[..., 1:] == 0).all()

    def test_small_integers_are_exact(self, short_segments):
        generator = torch.Generator().manual_seed(0)
        shape = (3, B, H, 3 * C + 1, 32)
        q, k, v = torch.randint(-2, 3, shape, generator=generator).float().unbind()
        args = (q, k, v, torch.zeros(H), 1.0, None)
        out, last = lightning2.forward(*args)
        want, want_last = reference.quadratic(*args)
        assert torch.equal(out, want) and torch.equal(last, want_last)

    @pytest.mark.parametrize("dtype, per_token", [(torch.float16, True), (torch.float32, False)], ids=str)
    def test_decay_gradient_may_be_left_out(self, dtype, per_token):
        args, do, d_state = arguments(C + 5, dtype=dtype, per_token=per_token)
        got = lightning2.backward(do, d_state, *args, want_decay=False)
        want = lightning2.backward(do, d_state, *args)
        assert not got[3].numel() and want[3].any()
        assert all(torch.equal(a, b) for n, (a, b) in enumerate(zip(got, want, strict=True)) if n != 3)

    @pytest.mark.parametrize("decay", [-2.0, -0.1])
    def test_one_decay_for_many_chunks(self, decay):
        """Its gradient is a sum of inner products at all borders, nearly all of which the row sums stand for."""
        args, do, d_state = arguments(24 * C, dk=32, dv=32, dtype=torch.float16)
        args[3].fill_(decay)
        exact = [x.double() if isinstance(x, torch.Tensor) else x for x in (*args, do, d_state)]
        want = cpu.backward(exact[6], exact[7], *exact[:6])[3]
        got = lightning2.backward(do, d_state, *args)[3]
        for head in range(H):
            check_error("decay", got[head], want[head], kind="gradient", dtype=torch.float16)

    def test_one_decay_for_all_tokens_makes_the_other_gradients_more_exact(self):
        """In 16 bits states are read as two numbers then (decay_grad.py)."""
        args, do, d_state = arguments(2 * C + 5, dtype=torch.float16)
        exact = [x.double() if isinstance(x, torch.Tensor) else x for x in (*args, do, d_state)]
        want = cpu.backward(exact[6], exact[7], *exact[:6])
        left_out = lightning2.backward(do, d_state, *args, want_decay=False)
        got = lightning2.backward(do, d_state, *args)
        for n in (0, 1):
            assert relative_error(got[n], want[n]) <= relative_error(left_out[n], want[n])
        assert torch.equal(got[2], left_out[2]) and torch.equal(got[4], left_out[4])

    def test_factors_of_chunks(self):
        """What Hopper's body reads: of a ragged last chunk the sum stays at its last value."""
        from lacompile.kernels.lightning2 import factors

        g = token_log_decay(2, 3, 2 * C + 20).transpose(1, 2).contiguous().transpose(1, 2)
        g[0, 1, 70] = float("-inf")
        found = factors.token_factors(g, C, exact=False)(g)
        padded = torch.nn.functional.pad(g.double(), (0, C - 20)) / math.log(2)
        sums = padded.clamp(min=-160).unflatten(2, (3, C)).cumsum(3)
        last = sums[..., -1:].expand_as(sums)
        want = torch.stack([sums, sums.exp2(), (last - sums).exp2(), last.exp2()], 3)
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-5)
        found = factors.token_factors(g, C, exact=True)(g).double()
        torch.testing.assert_close(found[..., 0, :] + found[..., 3, :], sums, rtol=1e-7, atol=0)
        torch.testing.assert_close(found[..., 1:3, :], want[..., 1:3, :], rtol=1e-6, atol=1e-30)


@interpreted
class TestLayouts:
    @pytest.mark.parametrize("tokens_first", [False, True])
    def test_the_output_is_laid_out_like_q(self, tokens_first):
        args, _, _ = arguments(9, 16, 32, tokens_first=tokens_first)
        out, _ = lightning2.forward(*args)
        want = cpu.forward(*args)[0]
        check_error("o", out, want.double())
        assert out.transpose(1, 2).is_contiguous() == tokens_first

    def test_any_strides(self, short_segments):
        (q, k, v, g, scale, initial), do, d_state = arguments(2 * C + 9, 16, 16, True, tokens_first=True)
        packed = torch.cat([q, k, v], 3)
        q2, k2, v2 = packed.split(16, 3)
        k2 = k2.transpose(2, 3).contiguous().transpose(2, 3)  # last stride is not 1
        g2 = g.transpose(1, 2).contiguous().transpose(1, 2)
        initial2 = initial.transpose(2, 3).contiguous().transpose(2, 3)
        do2 = do[:, :, :, :1].expand(do.shape)
        want = lightning2.forward(q, k, v, g, scale, initial)
        got = lightning2.forward(q2, k2, v2, g2, scale, initial2)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        want = lightning2.backward(do2.contiguous(), d_state, q, k, v, g, scale, initial)
        got = lightning2.backward(do2, d_state.mT.contiguous().mT, q2, k2, v2, g2, scale, initial2)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    def test_odd_strides(self):
        """Rows that start at an odd offset, which vector loads cannot read."""
        (q, k, v, g, scale, initial), do, d_state = arguments(C + 9)
        wide = torch.zeros(*q.shape[:3], 17)
        wide[..., 1:] = q
        args = (wide[..., 1:], k, v, g, scale, initial)
        check(args, do, d_state)

    @pytest.mark.parametrize("shape", [(B, H, 0, 16), (0, H, 5, 16)])
    def test_nothing_to_do(self, shape):
        q = torch.zeros(shape)
        initial = torch.ones(shape[0], H, 16, 16)
        out, last = lightning2.forward(q, q, q, torch.zeros(H), 1.0, initial)
        assert out.shape == shape and torch.equal(last, initial)
        grads = lightning2.backward(q, 2 * initial, q, q, q, torch.zeros(H), 1.0, initial)
        assert [x.shape for x in grads[:4]] == [shape] * 3 + [(H,)]
        assert (grads[3] == 0).all() and torch.equal(grads[4], 2 * initial)

    def test_what_cannot_be_described_is_read_by_pointer(self, monkeypatch):
        monkeypatch.setattr(lightning2.launch, "has_tma", lambda device: True)
        x = torch.zeros(2, 3, 5, 64, dtype=torch.float16)
        assert lightning2.launch.use_tma(x, x.transpose(1, 2), x[:, :1], x[..., 8:40])
        assert not lightning2.launch.use_tma(x, x[..., 1:33])  # base
        assert not lightning2.launch.use_tma(x, x.expand(2, 3, 5, 64)[:, :1].expand(2, 3, 5, 64))  # repeated heads
        assert not lightning2.launch.use_tma(x, torch.zeros(2, 3, 5, 68, dtype=torch.float16)[..., :64])  # strides
        assert lightning2.launch.use_tma(x.float(), torch.zeros(2, 3, 5, 68)[..., :64])
        assert not lightning2.launch.portable_tma(True, torch.float32)

    def test_two_runs_are_the_same_bits(self, short_segments):
        args, do, d_state = arguments(3 * C, per_token=True)
        one, two = (lightning2.forward(*args) + lightning2.backward(do, d_state, *args) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

    def test_pieces_make_the_whole(self):
        """The final state of one call as the initial state of the next: prefill in pieces."""
        (q, k, v, g, scale, _), _, _ = arguments(2 * C + 20)
        whole, last = lightning2.forward(q, k, v, g, scale, None)
        cut, carried, out = C + 11, None, []
        for piece in (slice(0, cut), slice(cut, None)):
            o, carried = lightning2.forward(*(x[:, :, piece] for x in (q, k, v)), g, scale, carried)
            out.append(o)
        assert relative_error(torch.cat(out, 2), whole) < 1e-6 and relative_error(carried, last) < 1e-6


@interpreted
class TestSelfCheck:
    @pytest.mark.parametrize(
        ("per_token", "aligned", "states"),
        [(False, False, False), (False, True, True), (True, False, True), (True, True, False)],
    )
    def test_what_it_asks_for_is_exact(self, per_token, aligned, states):
        known = lightning2.selfcheck.Integers(32, 48, torch.zeros(1, dtype=torch.float16), per_token, aligned)
        start, d_end = (known.state, known.d_end) if states else (None, None)
        assert (known.q.data_ptr() % 16 == 0) == aligned and known.outputs(start)[0].abs().max() <= 256  # as in bf16
        args = (known.q, known.k, known.v, known.log_decay, 1.0, start)
        out, last, grads = wanted(args, known.do, d_end)
        assert all(torch.equal(a, b) for a, b in zip((out, last), known.outputs(start), strict=True))
        assert lightning2.selfcheck.equal(grads[:5], known.gradients(start, d_end))
        assert lightning2.selfcheck.equal(lightning2.forward(*args), known.outputs(start))
        assert lightning2.selfcheck.equal(lightning2.backward(known.do, d_end, *args), known.gradients(start, d_end))

    def test_one_lost_product_is_noticed(self):
        known = lightning2.selfcheck.Integers(32, 32, torch.zeros(1, dtype=torch.float16), False, True)
        for start in (None, known.state):
            out, last = (x.half() for x in known.outputs(start))
            assert lightning2.selfcheck.equal((out, last), known.outputs(start))
            out[0, 1, 150, 3] += 1
            assert not lightning2.selfcheck.equal((out, last), known.outputs(start))

    def test_a_state_that_arrives_wrong_is_noticed(self):
        known = lightning2.selfcheck.Integers(32, 32, torch.zeros(1, dtype=torch.float16), False, True)
        assert not torch.equal(known.outputs(known.state)[0][:, :, :64], known.outputs(None)[0][:, :, :64])
        with_state, without = known.gradients(None, known.d_end), known.gradients(None, None)
        assert not any(torch.equal(a, b) for a, b in zip(with_state[1:], without[1:], strict=True))


@interpreted
class TestPlan:
    @pytest.fixture
    def tiles(self):
        return lightning2.launch.portable(128, 128, torch.bfloat16)

    @pytest.fixture
    def hardware(self):
        return lightning2.launch.Hardware()

    def test_one_segment_when_the_device_is_full(self, hardware, tiles):
        assert lightning2.launch.plan(4096, 256, hardware, tiles).count == 1

    @pytest.mark.parametrize("length", [32768, 131072, 40001])
    @pytest.mark.parametrize("uses", [1, 3])
    def test_segments_when_it_is_not(self, length, uses, hardware, tiles):
        split = lightning2.launch.plan(length, 32, hardware, tiles, uses)
        assert split.count > 2 and split.tokens % lightning2.launch.GRANULE == 0
        assert (split.count - 1) * split.tokens < length <= split.count * split.tokens

    def test_faster_memory_takes_more_programs(self, hardware, tiles):
        narrow = dataclasses.replace(tiles, saturating=1.1)
        counts = [
            lightning2.launch.plan(32768, 32, dataclasses.replace(hardware, bandwidth=share), narrow).count
            for share in (0.7, 1.0, 1.44)
        ]
        assert counts == sorted(counts) and counts[0] < counts[2]

    @pytest.mark.parametrize(
        ("heads", "length", "size", "uses", "count"),
        [
            (16, 1024, 128, 3, 1),
            (16, 2048, 128, 3, 1),
            (16, 8192, 128, 3, 2),
            (16, 32768, 128, 3, 2),
            (16, 131072, 128, 3, 4),
            (8, 4096, 128, 3, 4),
            (4, 1024, 128, 3, 1),
            (4, 4096, 128, 3, 4),
            (64, 2048, 128, 3, 1),
            (16, 4096, 64, 3, 2),
            (16, 32768, 64, 3, 2),
            (16, 1024, 128, 1, 1),
            (16, 4096, 128, 1, 4),
            (16, 8192, 128, 1, 4),
            (16, 32768, 128, 1, 6),
            (16, 131072, 128, 1, 6),
            (4, 4096, 128, 1, 8),
            (64, 2048, 128, 1, 1),
        ],
    )
    def test_plans_of_an_h200(self, heads, length, size, uses, count):
        """Those that docs/kernel-notes gives times of, so that no change of the model goes unnoticed."""
        launch = lightning2.launch
        tiles = space.hopper(size, size, torch.bfloat16)[0]
        programs = heads * uses * launch.blocks(size, tiles.bv)
        assert launch.plan(length, programs, launch.Hardware(bandwidth=1.436), tiles, uses).count == count

    def test_a_device_is_known_by_its_memory(self, monkeypatch):
        class H200:
            multi_processor_count, memory_clock_rate, memory_bus_width = 132, 3201000, 6016

        launch = lightning2.launch
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H200)
        launch.hardware.cache_clear()
        found = launch.hardware(torch.device("cuda", 0))
        launch.hardware.cache_clear()
        assert found.processors == 132 and 1.4 < found.bandwidth < 1.5
        assert launch.hardware(torch.device("cpu")) == launch.Hardware()

    @pytest.mark.parametrize("length", [0, 1, 511, 512])
    def test_short_sequences_stay_whole(self, length, hardware, tiles):
        assert lightning2.launch.plan(length, 1, hardware, tiles).count == 1

    @pytest.mark.parametrize("tokens", [64, 128, 512, 1536, 5120])
    def test_pieces_make_up_a_segment(self, tokens):
        launch = lightning2.launch
        piece = launch.Segments(tokens, 3).piece
        assert piece % launch.CHUNK == 0 and launch.PIECES * piece >= tokens and piece >= launch.PIECE

    def test_segments_and_spans_are_made_of_chunks(self):
        launch = lightning2.launch
        assert launch.GRANULE % launch.CHUNK == launch.SPAN % launch.CHUNK == 0


@interpreted
class TestAheadOfTheCall:
    """What is compiled for tensors that are not there yet is what they launch."""

    @pytest.fixture
    def launched(self, monkeypatch):
        """What was launched: kernels with all that they are compiled for."""
        seen = set()
        run = lightning2.calls.Launch.__call__

        def recorded(launch, *tensors):
            pairs = zip(launch.boxes, tensors, strict=True)
            told = tuple(x.dtype if box is None else (x.dtype, *box.tile) for box, x in pairs)
            constants, options = (tuple(sorted(d.items())) for d in (launch.constants, launch.options))
            seen.add((launch.kernel.__name__, told, constants, options))
            run(launch, *tensors)

        monkeypatch.setattr(lightning2.calls.Launch, "__call__", recorded)
        return seen

    def both(self, launched, args, do, d_state, want_state=True, gradients=True):
        """What a call launches, and what compiling for it does; the tensors have no values in the second case."""
        from lacompile.kernels.lightning2 import warm

        launched.clear()
        q, k, v, log_decay, scale, initial = args
        lightning2.chunked.forward(q, k, v, log_decay, scale, initial, want_state)
        if gradients:
            lightning2.backward(do, d_state, q, k, v, log_decay, scale, initial, True)
        real = set(launched)
        launched.clear()
        leaves = [None if x is None else x.detach().requires_grad_(gradients) for x in (q, k, v, log_decay, initial)]
        warm.compile_kernels(warm.Call.of(*leaves, want_state, ""))
        assert real and launched == real
        return {name for name, *_ in real}

    @pytest.mark.parametrize(
        ("layout", "per_token"),
        [
            ("heads first", False),
            ("heads first", True),
            ("tokens first", False),
            ("odd", True),
            ("sliced", False),
            ("turned", True),
        ],
    )
    def test_layouts(self, launched, layout, per_token):
        args, do, d_state = arguments(
            100, 20 if layout == "odd" else 16, 24, per_token, tokens_first=layout != "heads first"
        )
        if layout == "sliced":
            args = tuple(torch.cat([x, x], -1)[..., 1 : x.shape[3] + 1] if n < 3 else x for n, x in enumerate(args))
        if layout == "turned":
            args = (args[0].mT.contiguous().mT, *args[1:])
        self.both(launched, args, do, d_state)

    @STATES
    @pytest.mark.parametrize("gradients", [False, True])
    def test_states(self, launched, states, gradients):
        args, do, d_state = arguments(70, states=states)
        self.both(launched, args, do, d_state, "final" in states, gradients)

    @DECAYS
    def test_segments(self, launched, per_token, monkeypatch):
        launch = lightning2.launch
        monkeypatch.setattr(launch, "GRANULE", 2 * C)
        cut = lambda length, *_: launch.Segments(2 * C, -(-length // (2 * C)) if length > 4 * C else 1)  # noqa: E731
        monkeypatch.setattr(launch, "plan", cut)
        names = self.both(launched, *arguments(5 * C + 3, per_token=per_token))
        assert {"contributions_kernel", "scan_kernel"} <= names
        assert "scan_kernel" not in self.both(launched, *arguments(3 * C, per_token=per_token))

    def test_shared_heads_and_descriptors(self, launched, descriptors):
        self.both(launched, *arguments(70, dtype=torch.float16, k_heads=1))
        assert any(isinstance(x, tuple) for _, told, *_ in launched for x in told)

    def test_a_few_tokens_and_a_search_are_left_to_the_call(self, launched, monkeypatch):
        from lacompile.kernels.lightning2 import warm

        (q, k, v, log_decay, _, initial), *_ = arguments(2)
        warm.compile_kernels(warm.Call.of(q, k, v, log_decay, initial, True, ""))
        (q, k, v, log_decay, _, initial), *_ = arguments(70)
        monkeypatch.setenv("LACOMPILE_AUTOTUNE", "quick")
        warm.compile_kernels(warm.Call.of(q, k, v, log_decay, initial, True, ""))
        assert not launched

    @pytest.fixture
    def graph(self, monkeypatch):
        """One that calls the operator on sequences of symbolic length, and what Dynamo knows of its symbols."""
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

        import lacompile.ops  # noqa: F401
        from lacompile.kernels import select

        monkeypatch.setattr(select, "has_kernels", lambda q, v: True)
        known = ShapeEnv()
        mode = FakeTensorMode(shape_env=known)
        (q, k, v, log_decay, scale, _), *_ = arguments(70)
        graph = torch.fx.Graph()
        nodes = [graph.placeholder(name) for name in ("q", "k", "v", "log_decay")]
        for node, x in zip(nodes, (q, k, v, log_decay), strict=True):
            sizes = [DimDynamic.DYNAMIC if n == 2 else DimDynamic.STATIC for n in range(x.dim())]
            context = StatelessSymbolicContext(dynamic_sizes=sizes)
            node.meta["example_value"] = mode.from_tensor(x, symbolic_context=context)
        assert not isinstance(nodes[0].meta["example_value"].shape[2], int)
        graph.output(
            graph.call_function(torch.ops.lacompile.decayed_attention.default, (*nodes, scale, None, False, ""))
        )
        return torch.fx.GraphModule({}, graph), known

    def test_a_graph_that_is_compiled(self, launched, graph):
        from lacompile.ahead import kernels_compiled

        gm, known = graph
        before = len(known.guards)
        with kernels_compiled(gm):
            pass
        assert {name for name, *_ in launched} == {"forward_kernel"}
        assert len(known.guards) == before

    def test_what_fails_is_left_to_the_call(self, graph, monkeypatch, caplog):
        from lacompile.ahead import kernels_compiled
        from lacompile.kernels.lightning2 import warm

        def fails(call):
            raise RuntimeError("no such instruction")

        monkeypatch.setattr(warm, "compile_kernels", fails)
        caplog.set_level("DEBUG", "lacompile")
        with kernels_compiled(graph[0]):
            pass
        assert "no such instruction" in caplog.text

"""The chunked form on CPU computes what the fp64 recurrence computes, at every length around its chunks."""

from __future__ import annotations

import pytest
import torch

from lacompile.kernels import cpu, reference
from lacompile.testing import check_error, head_log_decay, qkv, relative_error, state, token_log_decay

C = cpu.CHUNK
B, H, DK, DV = 2, 4, 8, 6
LENGTHS = (0, 1, 2, C - 1, C, C + 1, 2 * C, 2 * C + 7)
GROUPS = {
    "heads": {},
    "shared-kv": {"k_heads": 1, "v_heads": 1},
    "grouped-kv": {"k_heads": 2, "v_heads": 2},
    "shared-qk": {"q_heads": 1, "k_heads": 1},
}
DECAYS = pytest.mark.parametrize("per_token", [False, True], ids=["per-head", "per-token"])


def arguments(length, per_token=False, dtype=torch.float32, groups=None, **more):
    """q, k, v, log_decay, scale and initial state of one call."""
    small = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = qkv(B, H, length, DK, DV, dtype=dtype, **(groups or {}), **more)
    log_decay = token_log_decay(B, H, length, dtype=small) if per_token else head_log_decay(H, dtype=small)
    return q, k, v, log_decay, 0.5, state(B, H, DK, DV, dtype=small)


def promoted(args):
    return [x.double() if isinstance(x, torch.Tensor) else x for x in args]


class TestForward:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("length", LENGTHS)
    @DECAYS
    def test_output_and_state(self, length, per_token, dtype):
        args = arguments(length, per_token, dtype)
        out, last = cpu.forward(*args)
        want, want_last = reference.recurrence(*promoted(args))
        assert out.dtype == dtype and out.shape == (B, H, length, DV)
        assert last.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        check_error("o", out, want)
        check_error("state", last, want_last)

    @pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
    @DECAYS
    def test_shared_heads_are_those_of_repeated_ones(self, groups, per_token):
        args = arguments(C + 5, per_token, groups=groups)
        want, want_last = reference.recurrence(*promoted(args))
        out, last = cpu.forward(*args)
        check_error("o", out, want)
        check_error("state", last, want_last)

    @pytest.mark.parametrize("reset", [float("-inf"), -1e38, -1e9, -1e4])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @DECAYS
    def test_decays_behind_a_full_reset_are_what_they_were(self, per_token, dtype, reset):
        """Sums that hold such a number hold nothing else: its differences are no decays."""
        q, k, v, g, scale, initial = arguments(2 * C + 7, per_token, dtype)
        g[(..., slice(5, None, 60)) if per_token else slice(1, 2)] = reset
        given = [x.requires_grad_() for x in (q, k, v, g, initial)]
        out, last = cpu.forward(q, k, v, g, scale, initial)
        want, want_last = reference.recurrence(*promoted((q, k, v, g, scale, initial)))
        check_error("o", out, want)
        check_error("state", last, want_last)
        do, d_state = torch.randn_like(out), torch.randn_like(last)
        found = cpu.backward(do, d_state, q, k, v, g, scale, initial)
        wanted = torch.autograd.grad((want, want_last), given, (do.double(), d_state.double()))
        for name, mine, exact in zip(("q", "k", "v", "g", "S"), found, wanted, strict=True):
            check_error(f"gradient of {name}", mine, exact, kind="gradient")

    def test_a_group_is_made_of_neighbouring_heads(self):
        q, k, v, g, scale, initial = arguments(9, groups={"k_heads": 2, "v_heads": 2})
        out, _ = cpu.forward(q, k, v, g, scale, initial)
        alone, _ = cpu.forward(q[:, 1:2], k[:, :1], v[:, :1], g[1:2], scale, initial[:, 1:2])
        check_error("o", out[:, 1:2], alone)

    def test_without_a_state_it_starts_from_zero(self):
        q, k, v, g, scale, initial = arguments(C + 5)
        out, last = cpu.forward(q, k, v, g, scale, None)
        want, want_last = cpu.forward(q, k, v, g, scale, torch.zeros_like(initial))
        assert torch.equal(out, want) and torch.equal(last, want_last)

    def test_no_token_returns_the_initial_state_and_not_its_memory(self):
        *rest, initial = arguments(0)
        _, last = cpu.forward(*rest, initial)
        assert torch.equal(last, initial) and last.data_ptr() != initial.data_ptr()

    def test_a_token_never_sees_a_later_one(self):
        q, k, v, g, scale, initial = arguments(2 * C)
        out, _ = cpu.forward(q, k, v, g, scale, initial)
        k, v = k.clone(), v.clone()
        k[:, :, C + 3 :], v[:, :, C + 3 :] = 100.0, -100.0
        changed, _ = cpu.forward(q, k, v, g, scale, initial)
        assert torch.equal(out[:, :, : C + 3], changed[:, :, : C + 3])
        assert not torch.equal(out[:, :, C + 3], changed[:, :, C + 3])

    @pytest.mark.parametrize("log_decay", [0.0, -1e-4, -80.0, -1e4])
    def test_extreme_decays_overflow_nothing(self, log_decay):
        q, k, v, _, scale, _ = arguments(2 * C + 7)
        args = (q, k, v, torch.full((H,), log_decay), scale, None)
        out, last = cpu.forward(*args)
        want, want_last = reference.recurrence(*promoted(args[:5]))
        check_error("o", out, want)
        check_error("state", last, want_last)

    def test_strides_do_not_matter(self):
        plain = arguments(C + 5)
        strided = arguments(C + 5, tokens_first=True)
        assert torch.equal(cpu.forward(*plain)[0], cpu.forward(*strided)[0])


class TestBackward:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("length", [1, C, 2 * C + 7])
    @pytest.mark.parametrize("groups", [GROUPS["heads"], GROUPS["grouped-kv"]], ids=["heads", "grouped-kv"])
    @DECAYS
    def test_all_gradients_are_those_of_the_recurrence(self, length, per_token, groups, dtype):
        args = arguments(length, per_token, dtype, groups)
        do = qkv(B, H, length, DV, seed=5, dtype=dtype)[0]
        d_state = state(B, H, DK, DV, seed=6)
        got = cpu.backward(do, d_state, *args)
        leaves = [x.requires_grad_() for x in promoted(args) if isinstance(x, torch.Tensor)]
        q, k, v, log_decay, initial = leaves
        results = reference.recurrence(q, k, v, log_decay, args[4], initial)
        want = torch.autograd.grad(results, leaves, (do.double(), d_state.double()))
        for name, mine, other in zip(("dq", "dk", "dv", "d_log_decay", "d_initial"), got, want, strict=True):
            check_error(name, mine, other, kind="gradient")

    def test_no_gradient_of_the_state_is_a_gradient_of_zero(self):
        args = arguments(C + 5, per_token=True)
        do = qkv(B, H, C + 5, DV, seed=5)[0]
        for mine, other in zip(
            cpu.backward(do, None, *args), cpu.backward(do, torch.zeros(B, H, DK, DV), *args), strict=True
        ):
            assert torch.equal(mine, other)

    def test_no_token_passes_the_state_gradient_through(self):
        args = arguments(0)
        d_state = state(B, H, DK, DV, seed=6)
        *others, d_initial = cpu.backward(torch.zeros(B, H, 0, DV), d_state, *args)
        assert torch.equal(d_initial, d_state)
        for grad, x in zip(others, args[:4], strict=True):
            assert grad.shape == x.shape and not grad.count_nonzero()


def test_the_gradient_of_a_decay_per_head_is_as_exact_as_eagers():
    """It sums over all pairs of tokens. Several draws count as one: a single one says little about rounding."""
    length, log_decay = 4 * C, -torch.tensor([0.05, 0.1, 0.2, 0.3])
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    ours, eagers, exact = [], [], []
    for seed in range(12):
        q, k, v = qkv(B, H, length, DK, seed=seed)
        do = qkv(B, H, length, DK, seed=seed + 100)[0]
        ours.append(cpu.backward(do, None, q, k, v, log_decay, 1.0, None)[3])
        for dtype, found in ((torch.float32, eagers), (torch.float64, exact)):
            g = log_decay.to(dtype, copy=True).requires_grad_()
            weight = (g[:, None, None] * distance.clamp(min=0)).exp() * (distance >= 0)
            out = (q.to(dtype) @ k.to(dtype).mT * weight) @ v.to(dtype)
            found += torch.autograd.grad(out, g, do.to(dtype))
    want = torch.cat(exact)
    # tighter than the budget, whose floor is as large as the difference between a good sum and a bad one
    assert relative_error(torch.cat(ours), want) <= 2 * relative_error(torch.cat(eagers), want)


@DECAYS
def test_the_two_definitions_agree(per_token):
    args = promoted(arguments(C + 5, per_token))
    for mine, other in zip(reference.recurrence(*args), reference.quadratic(*args), strict=True):
        assert relative_error(mine, other) < 1e-13

"""The kernel for a few tokens computes what the fp64 recurrence computes, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch

from lacompile.kernels import reference
from lacompile.testing import check_error, head_log_decay, qkv, relative_error, state, token_log_decay

from .interpreter import interpreted_kernels, run_in_a_process_of_its_own

lightning2 = interpreted_kernels()
interpreted = pytest.mark.skipif(lightning2 is None, reason="runs in a process of its own")
DECAYS = pytest.mark.parametrize("per_token", [False, True], ids=["per-head", "per-token"])

B, H = 2, 4


@pytest.mark.skipif(lightning2 is not None, reason="interpreted in this process")
def test_in_a_process_of_its_own():
    run_in_a_process_of_its_own(__file__)


@pytest.fixture(autouse=True)
def interpretation(monkeypatch):
    """Triton reads its variable again when it runs. Memory that is not written to holds NaN."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def only_the_step(monkeypatch):
    """The chunked kernels must not run."""

    def no(*_):
        raise AssertionError("chunked")

    monkeypatch.setattr(lightning2.chunked, "forward", no)


def arguments(length, dk=16, dv=16, per_token=False, dtype=torch.float32, **more):
    """q, k, v, log_decay and a scale."""
    q, k, v = qkv(B, H, length, dk, dv, dtype=dtype, **more)
    return q, k, v, token_log_decay(B, H, length) if per_token else head_log_decay(H), 0.5


def check(args, initial):
    """Out of place and in place, within the budgets of the dtype."""
    want, want_last = reference.recurrence(
        *(x.double() if isinstance(x, torch.Tensor) else x for x in args), None if initial is None else initial.double()
    )
    out, last = lightning2.forward(*args, initial)
    assert out.dtype == args[0].dtype and last.dtype == torch.float32
    found = [(out, last)]
    if initial is not None:
        given = initial.clone(memory_format=torch.preserve_format)
        found.append((lightning2.decode(*args, given), given))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    for out, last in found:
        check_error("o", out, want)
        check_error("state", last, want_last)


@interpreted
class TestAgainstTheReference:
    @pytest.mark.parametrize("length", [1, 2, 5, 16])
    @pytest.mark.parametrize("with_state", [False, True], ids=["no-state", "state"])
    @DECAYS
    def test_lengths(self, length, with_state, per_token, only_the_step):
        check(arguments(length, per_token=per_token), state(B, H, 16) if with_state else None)

    @pytest.mark.parametrize("dk, dv", [(128, 128), (24, 20), (80, 112), (192, 16), (16, 256)])
    def test_head_sizes(self, dk, dv, only_the_step):
        check(arguments(2, dk, dv), state(B, H, dk, dv))

    @pytest.mark.parametrize("groups", [{"q_heads": 2, "k_heads": 1, "v_heads": 1}, {"q_heads": 1}], ids=str)
    @DECAYS
    def test_shared_heads(self, groups, per_token, only_the_step):
        check(arguments(3, per_token=per_token, tokens_first=True, **groups), state(B, H, 16))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_low_precision(self, dtype, only_the_step):
        args = arguments(3, dtype=dtype)
        check(args, state(B, H, 16))
        # Only the output is rounded: a state that was would be off by 1e-3.
        exact = reference.recurrence(*(x.double() if isinstance(x, torch.Tensor) else x for x in args))[1]
        assert relative_error(lightning2.forward(*args, None)[1], exact) < 1e-6

    def test_strengths(self, only_the_step):
        q, k, v, _, scale = arguments(4)
        check((q, k, v, torch.tensor([0.0, -1e-5, -20.0, float("-inf")]), scale), state(B, H, 16))

    def test_longer_inputs_are_chunked(self):
        check(arguments(17), state(B, H, 16))


@interpreted
class TestMemory:
    @pytest.mark.parametrize("layout", ["transposed", "slice", "token-major", "offset"])
    def test_states_of_any_strides_stay_where_they_are(self, layout, only_the_step):
        initial, args = state(B, H, 16, 32), arguments(2, 16, 32)
        around = torch.full((B, H, 3, 48, 48), 7.0)
        given = {
            "transposed": torch.empty(B, H, 32, 16).mT,
            "slice": around[:, :, 1, 8:24, 8:40],
            "token-major": torch.empty(16, 32, H, B).permute(3, 2, 0, 1),
            "offset": torch.empty(B * H * 512 + 1)[1:].view(B, H, 16, 32),
        }[layout].copy_(initial)
        out = lightning2.decode(*args, given)
        want = initial.clone()
        assert torch.equal(out, lightning2.decode(*args, want)) and torch.equal(given, want)
        around[:, :, 1, 8:24, 8:40] = 7.0
        assert (around == 7.0).all()

    def test_any_strides_of_the_inputs(self, only_the_step):
        q, k, v, g, scale = arguments(3, 16, 16, True)
        packed = torch.cat([q, k, v], 3).transpose(1, 2).contiguous().transpose(1, 2)
        q2, k2, v2 = packed.split(16, 3)
        k2 = k2.mT.contiguous().mT
        got = lightning2.forward(q2, k2, v2, g.mT.contiguous().mT, scale, None)
        want = lightning2.forward(q, k, v, g, scale, None)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    def test_nan_stays_in_its_head(self, only_the_step):
        args, initial = arguments(2), state(B, H, 16)
        initial[0, 1, 3, 4] = float("nan")
        out, last = lightning2.forward(*args, initial)
        assert out[0, 1, :, 4].isnan().all() and last[0, 1, 3, 4].isnan()
        assert out.isnan().sum() == 2 and last.isnan().sum() == 1

    def test_no_tokens_and_no_batch(self):
        q = torch.zeros(B, H, 0, 16)
        initial = state(B, H, 16)
        given = initial.clone()
        assert lightning2.decode(q, q, q, head_log_decay(H), 1.0, given).shape == q.shape
        assert torch.equal(given, initial)
        q = torch.zeros(0, H, 1, 16)
        assert lightning2.forward(q, q, q, head_log_decay(H), 1.0, None)[0].shape == q.shape

"""The decoding step's contract: in place and equal to the operator, schema and fake, errors that name the argument."""

from __future__ import annotations

import re

import pytest
import torch
from torch.library import opcheck

from lacompile import decayed_attention, decode_step
from lacompile.decode import decode_step_op
from lacompile.errors import BadArgument
from lacompile.kernels import reference
from lacompile.testing import check_error, head_log_decay, qkv, state, token_log_decay

FP64 = torch.float64
GROUPED = {"q_heads": 2, "k_heads": 1, "v_heads": 1}
DECAYS = pytest.mark.parametrize("per_token", [False, True], ids=["per-head", "per-token"])
GROUPS = pytest.mark.parametrize("groups", [{}, GROUPED], ids=["heads", "grouped"])


def arguments(length=1, per_token=False, groups=None, dtype=FP64):
    """q, k, v, log_decay and a state."""
    q, k, v = qkv(2, 4, length, 8, 5, dtype=dtype, **(groups or {}))
    full = FP64 if dtype == FP64 else torch.float32
    log_decay = token_log_decay(2, 4, length, dtype=full) if per_token else head_log_decay(4, dtype=full)
    return q, k, v, log_decay, state(2, 4, 8, 5, dtype=full)


class TestValues:
    @pytest.mark.parametrize("length", [1, 3, 20])
    @DECAYS
    @GROUPS
    def test_output_and_state_are_those_of_the_recurrence(self, length, per_token, groups):
        q, k, v, g, carried = arguments(length, per_token, groups)
        want, want_last = reference.recurrence(q, k, v, g, 0.7, carried)
        address = carried.data_ptr()
        check_error("o", decode_step(q, k, v, g, carried, scale=0.7), want)
        check_error("state", carried, want_last)
        assert carried.data_ptr() == address

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_has_an_fp32_state(self, dtype):
        q, k, v, g, carried = arguments(dtype=dtype)
        exact = reference.recurrence(*(x.double() for x in (q, k, v, g)), 1.0, carried.double())
        out = decode_step(q, k, v, g, carried)
        assert out.dtype == dtype
        check_error("o", out, exact[0])
        check_error("state", carried, exact[1])

    def test_a_prompt_and_then_token_by_token_is_the_whole(self):
        q, k, v, g, _ = arguments(9, per_token=True)
        whole, end = decayed_attention(q, k, v, g, return_final_state=True)
        out, carried = decayed_attention(*(x[:, :, :6] for x in (q, k, v, g)), return_final_state=True)
        parts = [out]
        for t in range(6, 9):
            one = slice(t, t + 1)
            parts.append(decode_step(q[:, :, one], k[:, :, one], v[:, :, one], g[:, :, one], carried))
        check_error("o", torch.cat(parts, 2), whole)
        check_error("state", carried, end)

    def test_a_state_may_be_a_part_of_a_cache(self):
        q, k, v, g, carried = arguments()
        cache = torch.zeros(3, 4, 2, 5, 8, dtype=FP64)
        part = cache[1].transpose(0, 1).mT
        part.copy_(carried)
        out = decode_step(q, k, v, g, part)
        assert torch.equal(out, decode_step(q, k, v, g, carried)) and torch.equal(part, carried)
        assert not cache[0].any() and not cache[2].any()

    def test_no_tokens_leave_the_state_alone(self):
        q, k, v, g, carried = arguments(0)
        before = carried.clone()
        assert decode_step(q, k, v, g, carried).shape == (2, 4, 0, 5) and torch.equal(carried, before)

    def test_numbers_serve_as_log_decay(self):
        q, k, v, _, carried = arguments()
        other = carried.clone()
        got = decode_step(q, k, v, [-0.1, -0.2, -0.3, 0.0], carried)
        assert torch.equal(got, decode_step(q, k, v, torch.tensor([-0.1, -0.2, -0.3, 0.0], dtype=FP64), other))


class TestRegistration:
    @DECAYS
    @GROUPS
    def test_schema_and_fake(self, per_token, groups):
        q, k, v, g, carried = arguments(2, per_token, groups)
        opcheck(decode_step_op, (q, k, v, g, 0.7, carried))

    def test_compiled_without_a_graph_break_it_still_writes_in_place(self):
        q, k, v, g, carried = arguments(dtype=torch.float32)
        other = carried.clone()
        run = torch.compile(lambda *a: decode_step(*a) * 2, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            got = run(q, k, v, g, carried)
        assert torch.equal(got, 2 * decode_step(q, k, v, g, other)) and torch.equal(carried, other)

    def test_the_write_is_counted(self):
        q, k, v, g, carried = arguments()
        version = carried._version
        decode_step(q, k, v, g, carried)
        assert carried._version > version


Q, K, V, G, S = arguments(dtype=torch.float32)
GOOD = {"q": Q, "k": K, "v": V, "log_decay": G, "state": S}
WRONG = {
    "k-length": ("k", K[:, :, :0], "batch 2 and length 1 like q", "(2, 4, 0, 8)"),
    "decay-positive": ("log_decay", [0.1] * 4, "natural logarithms of at most 0", "0.1"),
    "scale": ("scale", "0.5", "a Python number", "str"),
    "state-no-tensor": ("state", None, "a tensor [B,H,Dk,Dv]", "NoneType"),
    "state-shape": ("state", S.mT, "shape (2, 4, 8, 5)", "(2, 4, 5, 8)"),
    "state-dtype": ("state", S.bfloat16(), "dtype torch.float32", "torch.bfloat16"),
    "state-shared": ("state", S[:, :1].expand(S.shape), "memory of its own for each element", "strides (160, 0, 5, 1)"),
    "q-gradient": ("q", Q.clone().requires_grad_(), "no gradient to be wanted (torch.no_grad())", "requires_grad=True"),
}


@pytest.mark.parametrize(("name", "value", "expected", "found"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_named_and_the_state_untouched(name, value, expected, found):
    before = S.clone()
    with pytest.raises(BadArgument, match="^" + re.escape(f"{name}: expected {expected}, got {found}") + "$"):
        decode_step(**{**GOOD, name: value})
    assert torch.equal(S, before)


def test_the_arguments_that_the_wrong_ones_replace_are_right():
    assert decode_step(**{**GOOD, "state": S.clone()}).shape == (2, 4, 1, 5)
    with torch.no_grad():
        decode_step(**{**GOOD, "q": Q.clone().requires_grad_(), "state": S.clone()})

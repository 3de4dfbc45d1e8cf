"""Packed sequences are what separate calls make of them: the operator's values, derivatives, schema and errors."""

from __future__ import annotations

import re

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

from lacompile import decayed_attention
from lacompile.errors import BadArgument
from lacompile.kernels import cpu
from lacompile.packed import packed_attention_backward_op, packed_attention_op
from lacompile.testing import check_error, head_log_decay, qkv, state, token_log_decay

FP64 = torch.float64
LENGTHS = (3, 0, 1, 7)
DECAYS = pytest.mark.parametrize("per_token", [False, True], ids=["per-head", "per-token"])
GROUPS = pytest.mark.parametrize("groups", [{}, {"q_heads": 2, "k_heads": 1, "v_heads": 1}], ids=["heads", "grouped"])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK", 3)


def edges(lengths=LENGTHS):
    return torch.tensor([0, *lengths]).cumsum(0)


def arguments(per_token=False, groups=None, requires_grad=False, lengths=LENGTHS):
    """q, k, v, log_decay, the states before the sequences, and where those begin."""
    full = {"dtype": FP64, "requires_grad": requires_grad}
    q, k, v = qkv(1, 2, sum(lengths), 2, 3, **full, **(groups or {}))
    g = token_log_decay(1, 2, sum(lengths), mean=0.3, **full) if per_token else head_log_decay(2, **full)
    return q, k, v, g, state(len(lengths), 2, 2, 3, **full), edges(lengths)


def attend(q, k, v, g, initial, cu):
    return decayed_attention(
        q, k, v, g, scale=0.7, initial_state=initial, return_final_state=True, cu_seqlens=cu
    )  # fmt: skip


def one_by_one(q, k, v, g, initial, cu):
    """The same by a call for each sequence."""
    outs, states = [], []
    for n, (begin, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        own = slice(begin, end)
        decay = g if g.dim() == 1 else g[:, :, own]
        first = None if initial is None else initial[n : n + 1]
        o, s = decayed_attention(
            q[:, :, own], k[:, :, own], v[:, :, own], decay, scale=0.7, initial_state=first, return_final_state=True
        )
        outs.append(o)
        states.append(s)
    return torch.cat(outs, 2), torch.cat(states)


class TestValues:
    @DECAYS
    @GROUPS
    @pytest.mark.parametrize("with_state", [False, True], ids=["no-state", "state"])
    def test_output_states_and_gradients_are_those_of_separate_calls(self, per_token, groups, with_state):
        *args, initial, cu = arguments(per_token, groups, requires_grad=True)
        initial = initial if with_state else None
        leaves = [*args, initial] if with_state else args
        results = [f(*args, initial, cu) for f in (attend, one_by_one)]
        weights = [torch.randn_like(x) for x in results[0]]
        grads = [torch.autograd.grad(r, leaves, weights) for r in results]
        for kind, got, want in (("output", *results), ("gradient", *grads)):
            for n, (a, b) in enumerate(zip(got, want, strict=True)):
                check_error(f"{kind} {n}", a, b, kind=kind)

    @DECAYS
    def test_gradients(self, per_token):
        *args, cu = arguments(per_token, requires_grad=True)
        assert gradcheck(lambda *a: attend(*a, cu), args)

    def test_one_sequence_is_the_plain_operator(self):
        q, k, v, g, initial, _ = arguments(lengths=(9,))
        got = attend(q, k, v, g, initial, torch.tensor([0, 9], dtype=torch.int32))
        assert all(torch.equal(a, b) for a, b in zip(got, one_by_one(q, k, v, g, initial, edges((9,))), strict=True))

    def test_no_tokens(self):
        q, k, v, g, initial, cu = arguments(lengths=(0, 0))
        o, last = attend(q, k, v, g, initial, cu)
        assert o.shape == (1, 2, 0, 3) and torch.equal(last, initial)


class TestRegistration:
    @DECAYS
    @GROUPS
    def test_schema_fake_and_autograd(self, per_token, groups):
        *args, initial, cu = arguments(per_token, groups, requires_grad=True)
        utils = ("test_schema", "test_autograd_registration", "test_faketensor")
        opcheck(packed_attention_op, (*args, 0.7, initial, True, cu), test_utils=utils)
        do, d_state = torch.randn(1, 2, 11, 3, dtype=FP64), torch.randn(4, 2, 2, 3, dtype=FP64)
        opcheck(packed_attention_backward_op, (do, d_state, *args, 0.7, initial, True, cu), test_utils=utils)

    def test_compiled_without_a_graph_break_for_any_lengths(self):
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
        for lengths in (LENGTHS, (2, 2, 2)):
            args = arguments(lengths=lengths)
            check_error("o", compiled(*args)[0], attend(*args)[0])

    def test_a_second_derivative_is_refused(self):
        q, k, v, g, initial, cu = arguments(requires_grad=True)
        (dq,) = torch.autograd.grad(attend(q, k, v, g, initial, cu)[0].square().sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="once for each sequence"):
            torch.autograd.grad(dq.sum(), k)


Q, K, V, G, S, CU = arguments()
GOOD = {"q": Q, "k": K, "v": V, "log_decay": G, "initial_state": S, "cu_seqlens": CU}
WRONG = {
    "no-tensor": ("cu_seqlens", [0, 11], "a tensor [S+1]", "list"),
    "dimensions": ("cu_seqlens", CU[None], "shape [S+1] for S of at least 1", "(1, 5)"),
    "no-sequence": ("cu_seqlens", CU[:1], "shape [S+1] for S of at least 1", "(1,)"),
    "floats": ("cu_seqlens", CU.float(), "int32 or int64", "torch.float32"),
    "device": ("cu_seqlens", CU.to("meta"), "device cpu like q", "meta"),
    "start": ("cu_seqlens", CU + 1, "numbers from 0 to 11 that do not fall", "[1, 4, 4, 5, 12]"),
    "end": ("cu_seqlens", CU[:-1], "numbers from 0 to 11 that do not fall", "[0, 3, 3, 4]"),
    "order": ("cu_seqlens", CU[[0, 3, 2, 1, 4]], "numbers from 0 to 11 that do not fall", "[0, 4, 3, 3, 11]"),
    "states": ("initial_state", S[:3], "shape (4, 2, 2, 3)", "(3, 2, 2, 3)"),
    "batch": ("q", Q.expand(2, -1, -1, -1), "batch 1 for packed sequences", "2"),
}


@pytest.mark.parametrize(("name", "value", "expected", "found"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_named(name, value, expected, found):
    with pytest.raises(BadArgument, match="^" + re.escape(f"{name}: expected {expected}, got {found}") + "$"):
        decayed_attention(**{**GOOD, name: value})


def test_the_arguments_that_the_wrong_ones_replace_are_right():
    assert decayed_attention(**GOOD).shape == (1, 2, 11, 3)

"""Packed sequences are what separate calls make of them: the Triton kernels, by Triton's interpreter, against fp64."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch

from lacompile.kernels import packed as plain
from lacompile.testing import budget, check_error, head_log_decay, qkv, relative_error, state, token_log_decay

from .interpreter import interpreted_kernels, run_in_a_process_of_its_own

lightning2 = interpreted_kernels()
if lightning2 is not None:
    from lacompile.kernels.lightning2 import packed
    from lacompile.kernels.lightning2.packed import pieces

interpreted = pytest.mark.skipif(lightning2 is None, reason="runs in a process of its own")
DECAYS = pytest.mark.parametrize("per_token", [False, True], ids=["per-head", "per-token"])

H, C = 2, 64
RAGGED = (0, 1, 130, 0, 64, 45, 200, 0)


@pytest.mark.skipif(lightning2 is not None, reason="interpreted in this process")
def test_in_a_process_of_its_own():
    run_in_a_process_of_its_own(__file__)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pieces of two chunks, marks at every chunk. Memory that is not written to holds NaN."""
    if lightning2 is None:
        yield
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton reads its variable again when it runs
    config = lightning2.launch.portable
    monkeypatch.setattr(pieces, "SHORTEST", 2 * C)
    wide = {"chunk": C, "stages": 1}
    monkeypatch.setattr(lightning2.launch, "portable", lambda *a: dataclasses.replace(config(*a), **wide))
    torch.use_deterministic_algorithms(True)
    with mock.patch.multiple(lightning2.launch, SPAN=C):
        yield
    torch.use_deterministic_algorithms(False)


def edges(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def check(lengths=RAGGED, dk=16, dv=16, per_token=False, dtype=torch.float32, states="initial final", **more):
    """Output, final states and all gradients, within the budgets of the dtype."""
    cu, length, count = edges(lengths), sum(lengths), len(lengths)
    q, k, v = qkv(1, H, length, dk, dv, dtype=dtype, **more)
    do = qkv(1, H, length, dk, dv, dtype=dtype, seed=7)[2]
    g = token_log_decay(1, H, length) if per_token else head_log_decay(H)
    initial = state(count, H, dk, dv) if "initial" in states else None
    d_state = state(count, H, dk, dv, seed=8) if "final" in states else None
    exact = [None if x is None else x.double() for x in (q, k, v, g, initial, do, d_state)]
    want_o, want_last = plain.forward(*exact[:4], 0.5, exact[4], True, cu)
    want = plain.backward(exact[5], exact[6], *exact[:4], 0.5, exact[4], True, cu)
    o, last = packed.forward(q, k, v, g, 0.5, initial, True, cu)
    check_error("o", o, want_o)
    check_error("state", last, want_last, dtype=dtype)
    grads = packed.backward(do, d_state, q, k, v, g, 0.5, initial, True, cu)
    for name, got, wanted in zip(("dq", "dk", "dv", "dg", "d_initial"), grads, want, strict=True):
        if name == "dg" and not per_token:
            # A sum over all tokens of terms of either sign, each within the budget.
            assert relative_error(got, wanted) <= 4 * budget(dtype).gradient
        else:
            check_error(name, got, wanted, kind="gradient", dtype=dtype)


@interpreted
class TestAgainstSeparateCalls:
    @pytest.mark.parametrize("lengths", [(150,), (1, 1, 1), (128, 128), (0, 0, 300), RAGGED], ids=str)
    @DECAYS
    def test_lengths(self, lengths, per_token):
        check(lengths, per_token=per_token)

    @pytest.mark.parametrize(
        ("states", "per_token"), [("", False), ("initial", True), ("final", False), ("final", True)]
    )
    def test_states(self, states, per_token):
        check(per_token=per_token, states=states)

    @pytest.mark.parametrize("dk, dv", [(32, 80), (24, 20)])
    def test_head_sizes(self, dk, dv):
        check((3, 140), dk, dv)

    @DECAYS
    def test_shared_heads_and_layout(self, per_token):
        check((3, 140, 70), per_token=per_token, q_heads=1, k_heads=1, tokens_first=True)

    def test_half_precision(self):
        check((100, 260), 32, 32, dtype=torch.float16)

    def test_without_the_decay_gradient_and_the_states(self):
        cu = edges((70, 200))
        q, k, v = qkv(1, H, 270, 16)
        o, last = packed.forward(q, k, v, head_log_decay(H), 1.0, None, False, cu)
        assert last.numel() == 0
        whole = packed.forward(q, k, v, head_log_decay(H), 1.0, None, True, cu)[0]
        assert torch.equal(o, whole)
        grads = packed.backward(v, None, q, k, v, head_log_decay(H), 1.0, None, False, cu)
        assert not grads[3].any() and grads[4].numel() == 0 and all(x.isfinite().all() for x in grads[:3])


@interpreted
class TestPieces:
    def test_they_cover_every_token_once_and_end_with_their_sequence(self):
        cu = edges(RAGGED)
        length = int(cu[-1])
        found = pieces.cut(cu, length, 64)
        seen = torch.zeros(length, dtype=torch.int)
        for sequence, begin, end in found.table.tolist():
            seen[begin:end] += 1
            assert end == begin or (cu[sequence] <= begin and end <= cu[sequence + 1] and end - begin <= 64)
        assert (seen == 1).all()
        assert found.firsts.diff().tolist() == [-(-n // 64) for n in RAGGED]
        assert found.count >= found.firsts[-1]

    @pytest.mark.parametrize("wrong", [[0, 500], [-7, 50, 20], [90, 0], [0, 100, 100]], ids=str)
    def test_none_reaches_beyond_the_tokens_whatever_the_numbers(self, wrong):
        table = pieces.cut(torch.tensor(wrong), 100, 64).table
        assert (table[:, 1] <= table[:, 2]).all()
        there = table[table[:, 1] < table[:, 2]]
        assert (there[:, 1] >= 0).all() and (there[:, 2] <= 100).all()

    def test_few_heads_make_short_pieces_and_many_heads_long_ones(self):
        assert pieces.tokens_of_a_piece(2**20, 32, 264) % pieces.SHORTEST == 0
        assert pieces.tokens_of_a_piece(2**20, 2, 264) < pieces.tokens_of_a_piece(2**20, 128, 264)
        assert pieces.tokens_of_a_piece(1, 1, 264) == pieces.SHORTEST

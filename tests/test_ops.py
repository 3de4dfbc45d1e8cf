"""The operator's contract: schema and fakes, derivatives of every argument, errors that name the wrong argument."""

from __future__ import annotations

import re

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck

from lacompile import decayed_attention
from lacompile.errors import BadArgument
from lacompile.kernels import cpu, reference
from lacompile.ops import ForwardModeRefused, decayed_attention_backward_op, decayed_attention_op
from lacompile.testing import check_error, head_log_decay, qkv, state, token_log_decay

FP64 = torch.float64
SMALL = {"batch": 1, "heads": 2, "length": 7, "dk": 2, "dv": 3}
GROUPED = {"q_heads": 2, "k_heads": 1, "v_heads": 1}

DECAYS = pytest.mark.parametrize("per_token", [False, True], ids=["per-head", "per-token"])
GROUPS = pytest.mark.parametrize("groups", [{}, GROUPED], ids=["heads", "grouped"])
# What opcheck checks without tracing: the schema, the autograd registration, and the fake's shapes and strides.
CHEAP_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
STATES = pytest.mark.parametrize("with_state", [False, True], ids=["no-state", "state"])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last one ragged, at lengths that finite differences can afford."""
    monkeypatch.setattr(cpu, "CHUNK", 3)


def arguments(per_token=False, groups=None, with_state=False, requires_grad=True, dtype=FP64, **sizes):
    """q, k, v, log_decay and the initial state of a small call."""
    s = {**SMALL, **sizes}
    q, k, v = qkv(**s, **(groups or {}), dtype=dtype, requires_grad=requires_grad)
    full = {"dtype": FP64 if dtype == FP64 else torch.float32, "requires_grad": requires_grad}
    if per_token:
        log_decay = token_log_decay(s["batch"], s["heads"], s["length"], mean=0.3, **full)
    else:
        log_decay = head_log_decay(s["heads"], **full)
    initial = state(s["batch"], s["heads"], s["dk"], s["dv"], **full) if with_state else None
    return q, k, v, log_decay, initial


def attend(q, k, v, log_decay, initial=None):
    """Both results, on inputs as gradcheck hands them over."""
    return decayed_attention(q, k, v, log_decay, scale=0.7, initial_state=initial, return_final_state=True)


class TestValues:
    @DECAYS
    @GROUPS
    @STATES
    def test_output_and_state_are_those_of_the_recurrence(self, per_token, groups, with_state):
        args = arguments(per_token, groups, with_state, requires_grad=False)
        got = attend(*args)
        want = reference.recurrence(*args[:4], 0.7, args[4])
        check_error("o", got[0], want[0])
        check_error("state", got[1], want[1])

    def test_the_state_comes_only_when_asked_for(self):
        q, k, v, g, _ = arguments()
        out = decayed_attention(q, k, v, g)
        assert isinstance(out, torch.Tensor) and out.shape == (1, 2, 7, 3)

    def test_two_halves_linked_by_the_state_are_the_whole(self):
        q, k, v, g, initial = arguments(per_token=True, with_state=True, requires_grad=False)
        whole, end = attend(q, k, v, g, initial)
        first, middle = attend(*(x[:, :, :4] for x in (q, k, v, g)), initial)
        second, last = attend(*(x[:, :, 4:] for x in (q, k, v, g)), middle)
        check_error("o", torch.cat([first, second], 2), whole)
        check_error("state", last, end)

    def test_numbers_serve_as_log_decay(self):
        q, k, v, _, _ = arguments()
        got = decayed_attention(q, k, v, [-0.1, -0.3])
        check_error("o", got, decayed_attention(q, k, v, torch.tensor([-0.1, -0.3], dtype=FP64)))

    @pytest.mark.parametrize("tokens_first", [False, True])
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_the_output_is_laid_out_like_q_but_on_a_cpu(self, tokens_first, device):
        q, k, v = (x.to(device) for x in qkv(2, 3, 5, 4, tokens_first=tokens_first))
        out = decayed_attention(q, k, v, head_log_decay(3).to(device))
        assert (out.stride(1) < out.stride(2)) is (tokens_first and device != "cpu")

    def test_autocast_does_not_reach_inside(self):
        q, k, v = qkv(length=40, dk=16)
        g = head_log_decay()
        want = decayed_attention(q, k, v, g)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(decayed_attention(q, k, v, g), want)

    def test_vmap_runs_each_slice(self):
        q, k, v, g, _ = arguments(requires_grad=False)
        many = torch.stack([q, 2 * q])
        got = torch.vmap(lambda x: decayed_attention(x, k, v, g))(many)
        assert torch.equal(got[1], decayed_attention(2 * q, k, v, g))


class TestRegistration:
    @DECAYS
    @GROUPS
    @STATES
    def test_forward(self, per_token, groups, with_state):
        q, k, v, g, initial = arguments(per_token, groups, with_state)
        opcheck(decayed_attention_op, (q, k, v, g, 0.7, initial, with_state, ""), test_utils=CHEAP_CHECKS)

    @DECAYS
    @GROUPS
    @STATES
    def test_backward(self, per_token, groups, with_state):
        q, k, v, g, initial = arguments(per_token, groups, with_state)
        do = torch.randn(1, 2, 7, 3, dtype=FP64)
        d_state = torch.randn(1, 2, 2, 3, dtype=FP64) if with_state else None
        opcheck(
            decayed_attention_backward_op, (do, d_state, q, k, v, g, 0.7, initial, True, ""), test_utils=CHEAP_CHECKS
        )

    @pytest.mark.parametrize(("per_token", "groups", "with_state"), [(False, None, False), (True, GROUPED, True)])
    def test_forward_traced_with_symbolic_sizes(self, per_token, groups, with_state):
        q, k, v, g, initial = arguments(per_token, groups, with_state)
        opcheck(decayed_attention_op, (q, k, v, g, 0.7, initial, with_state, ""))

    @pytest.mark.parametrize(("per_token", "groups", "with_state"), [(False, None, False), (True, GROUPED, True)])
    def test_backward_traced_with_symbolic_sizes(self, per_token, groups, with_state, monkeypatch):
        monkeypatch.setattr(cpu, "CHUNK", 64)  # its own derivative is traced too, one chunk is enough of it
        q, k, v, g, initial = arguments(per_token, groups, with_state)
        do = torch.randn(1, 2, 7, 3, dtype=FP64, requires_grad=True)
        d_state = torch.randn(1, 2, 2, 3, dtype=FP64, requires_grad=True) if with_state else None
        opcheck(decayed_attention_backward_op, (do, d_state, q, k, v, g, 0.7, initial, True, ""))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_low_precision_and_transposed_layouts(self, dtype):
        q, k, v = qkv(2, 4, 7, 8, tokens_first=True, k_heads=2, dtype=dtype, requires_grad=True)
        args = (q, k, v, head_log_decay(requires_grad=True), 1.0, state(dk=8, requires_grad=True), True, "")
        opcheck(decayed_attention_op, args)

    def test_compiled_without_a_graph_break_and_for_any_length(self):
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
        for length in (7, 10):
            args = arguments(requires_grad=False, length=length)
            check_error("o", compiled(*args)[0], attend(*args)[0])

    def test_numbers_as_log_decay_in_a_compiled_and_in_an_exported_program(self):
        class Layer(torch.nn.Module):
            def forward(self, x):
                return decayed_attention(x, x, x, [-0.5, -0.25])

        layer, x = Layer(), torch.randn(1, 2, 10, 8)
        assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
        assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


class TestReverseMode:
    @DECAYS
    @GROUPS
    @STATES
    def test_gradients_of_every_tensor_argument(self, per_token, groups, with_state):
        args = arguments(per_token, groups, with_state)
        assert gradcheck(attend, args)

    def test_results_may_be_written_into(self):
        """A program does so with what the rewritten graph has in its place. Those of one chunk were views."""
        args = arguments(with_state=True, length=2)

        def doubled(*args):
            out, last = attend(*args)
            out *= 2
            last += out.sum()
            return out, last

        assert gradcheck(doubled, args)

    def test_gradients_without_tokens(self):
        args = arguments(with_state=True, length=0)
        out, last = attend(*args)
        assert out.shape == (1, 2, 0, 3)
        grads = torch.autograd.grad((last * 2).sum() + out.sum(), args, allow_unused=True)
        assert torch.equal(grads[4], torch.full_like(args[4], 2.0))
        assert all(g is None or not g.count_nonzero() for g in grads[:4])

    @DECAYS
    @GROUPS
    def test_second_derivatives(self, per_token, groups):
        args = arguments(per_token, groups, with_state=True, length=4, dv=2)
        assert gradgradcheck(attend, args)

    def test_second_derivatives_of_a_tensor_passed_twice(self):
        q, _, v, g, _ = arguments(length=4)
        assert gradgradcheck(lambda x: attend(x, x, v.detach(), g.detach())[0], (q,))

    def test_third_derivatives(self):
        q, k, v, g, _ = arguments(length=3, heads=1, dk=1, dv=1)

        def first(k, g):
            out = decayed_attention(q.detach(), k, v.detach(), g)
            return torch.autograd.grad((out**2).sum(), (k, g), create_graph=True)

        assert gradcheck(first, (k, g))
        assert gradgradcheck(first, (k, g))


class TestForwardMode:
    """Its tangents would be lost below autograd, and a lost tangent reads as zero."""

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_dual_tensors_are_refused(self, requires_grad):
        q, k, v, g, _ = arguments(requires_grad=requires_grad)
        with forward_ad.dual_level(), pytest.raises(ForwardModeRefused, match=r"forward-mode.*reverse mode"):
            decayed_attention(forward_ad.make_dual(q.detach(), torch.ones_like(q)), k, v, g)

    def test_transforms_are_refused(self):
        q, k, v, g, _ = arguments(requires_grad=False)
        with pytest.raises(ForwardModeRefused):
            torch.func.jacfwd(lambda x: decayed_attention(x, k, v, g).sum())(q)

    def test_the_bare_operator_refuses_too(self):
        q, k, v, g, _ = arguments(requires_grad=False)
        op = torch.ops.lacompile.decayed_attention
        with pytest.raises(ForwardModeRefused):
            torch.func.jvp(lambda x: op(x, k, v, g, 1.0, None, False, "")[0], (q,), (q,))

    def test_a_compiled_transform_refuses_too(self):
        q, k, v, g, _ = arguments(requires_grad=False)
        run = torch.compile(lambda x: torch.func.jvp(lambda y: attend(y, k, v, g)[0], (x,), (x,)), backend="aot_eager")
        with pytest.raises(Exception, match="forward-mode"):
            run(q)


def test_compiled_graphs_call_the_operators_past_autograd():
    """Each call would enter Python once more only to find that there is nothing to record."""
    called = []

    def collect(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes if "lacompile" in str(node.target))
        return make_boxed_func(graph)

    q, k, v, g, _ = arguments(requires_grad=True)
    compiled = torch.compile(lambda *x: attend(*x)[0], backend=aot_autograd(fw_compiler=collect, bw_compiler=collect))
    compiled(q, k, v, g).sum().backward()
    assert called == ["lacompile.decayed_attention.recorded", "lacompile.decayed_attention_backward.recorded"]
    with torch.no_grad():
        compiled(q, k, v, g)
    assert called[2:] == ["lacompile.decayed_attention.recorded"]


# --------------------------------------------------------------------------------------------------- wrong arguments

Q, K, V = qkv(2, 4, 6, 8, 5)
G = head_log_decay(4)
S = state(2, 4, 8, 5)
GOOD = {"q": Q, "k": K, "v": V, "log_decay": G, "initial_state": S}

WRONG = {
    "q-no-tensor": ("q", 1.0, "a tensor [B,H,N,D]", "float"),
    "q-dimensions": ("q", Q[0], "a tensor [B,H,N,D]", "3 dimensions (4, 6, 8)"),
    "q-integers": ("q", Q.long(), "a floating-point tensor", "torch.int64"),
    "q-heads": ("q", Q[:, :3], "a number of heads that divides 4", "3"),
    "q-no-heads": ("q", Q[:, :0], "a number of heads that divides 4", "0"),
    "k-no-tensor": ("k", None, "a tensor [B,H,N,D]", "NoneType"),
    "k-dimensions": ("k", K[..., None], "a tensor [B,H,N,D]", "5 dimensions (2, 4, 6, 8, 1)"),
    "k-batch": ("k", K[:1], "batch 2 and length 6 like q", "(1, 4, 6, 8)"),
    "k-length": ("k", K[:, :, :5], "batch 2 and length 6 like q", "(2, 4, 5, 8)"),
    "k-head-dimension": ("k", K[..., :7], "head dimension 8 like q", "7"),
    "k-dtype": ("k", K.bfloat16(), "dtype torch.float32 like q", "torch.bfloat16"),
    "k-heads": ("k", K[:, :3], "a number of heads that divides 4", "3"),
    "k-device": ("k", K.to("meta"), "device cpu like q", "meta"),
    "v-length": ("v", V[:, :, :5], "batch 2 and length 6 like q", "(2, 4, 5, 5)"),
    "v-dtype": ("v", V.double(), "dtype torch.float32 like q", "torch.float64"),
    "v-heads": ("v", V[:, :3], "a number of heads that divides 4", "3"),
    "decay-heads": ("log_decay", G[:2], "shape (4,)", "(2,)"),
    "decay-no-dimension": ("log_decay", G[0], "shape [H] or [B,H,N]", "0 dimensions ()"),
    "decay-dimensions": ("log_decay", G[None], "shape [H] or [B,H,N]", "2 dimensions (1, 4)"),
    "decay-length": ("log_decay", token_log_decay(2, 4, 5), "shape (2, 4, 6)", "(2, 4, 5)"),
    "decay-integers": ("log_decay", G.long(), "a floating-point tensor", "torch.int64"),
    "decay-device": ("log_decay", G.to("meta"), "device cpu like q", "meta"),
    "decay-words": ("log_decay", "fast", "a tensor, or numbers in a list", "str"),
    "decay-number": ("log_decay", -0.1, "shape [H] or [B,H,N]", "0 dimensions ()"),
    "decay-positive": ("log_decay", 0.1, "natural logarithms of at most 0", "0.1"),
    "decay-one-positive": ("log_decay", [-0.1, 0.0, 0.25, -1.0], "natural logarithms of at most 0", "0.25"),
    "decay-nan": ("log_decay", [-0.1, float("nan"), 0.0, -1.0], "natural logarithms of at most 0", "nan"),
    "state-no-tensor": ("initial_state", 0.0, "a tensor [B,H,Dk,Dv]", "float"),
    "state-dimensions": ("initial_state", S[0], "a tensor [B,H,Dk,Dv]", "3 dimensions (4, 8, 5)"),
    "state-shape": ("initial_state", S.transpose(2, 3), "shape (2, 4, 8, 5)", "(2, 4, 5, 8)"),
    "state-integers": ("initial_state", S.long(), "a floating-point tensor", "torch.int64"),
    "scale-tensor": ("scale", torch.tensor(0.5), "a Python number", "Tensor"),
    "scale-words": ("scale", "0.5", "a Python number", "str"),
}


@pytest.mark.parametrize(("name", "value", "expected", "found"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_named_with_what_was_expected_and_found(name, value, expected, found):
    with pytest.raises(BadArgument, match="^" + re.escape(f"{name}: expected {expected}, got {found}") + "$") as caught:
        decayed_attention(**{**GOOD, name: value})
    assert (caught.value.argument, caught.value.expected, caught.value.got) == (name, expected, found)
    assert isinstance(caught.value, ValueError)


def test_the_arguments_that_the_wrong_ones_replace_are_right():
    assert decayed_attention(**GOOD).shape == (2, 4, 6, 5)

"""Which operands are known to hold numbers of bf16 in fp32: those that are such a cast and nothing more."""

from __future__ import annotations

import pytest
import torch

from lacompile.decision import decide
from lacompile.options import Options
from lacompile.testing import assert_rewritten, head_log_decay, qkv

B, H, N, D = 2, 3, 12, 8
BF16 = torch.bfloat16
RATES = head_log_decay(H)


def retention(q, k, v):
    i = torch.arange(q.shape[2])
    distance = i[:, None] - i
    return (q @ k.mT * (RATES[:, None, None] * distance).exp().tril().to(q.dtype)) @ v


def cast(q, k, v):
    return retention(q.float(), k.to(torch.float32), v.type(torch.float32))


def turned_and_scaled(q, k, v):
    q, k, v = (x.transpose(1, 2).contiguous().float().transpose(1, 2) for x in (q, k, v))
    return retention(q * D**-0.5, k, v)


def functions_in_bf16(q, k, v):
    return retention(torch.relu(q).float(), torch.nn.functional.silu(k).float(), v.float())


def gated_values(q, k, v):
    return retention(q.float(), k.float(), v.float() * torch.sigmoid(v.float()))


def normed_queries(q, k, v):
    return retention(torch.nn.functional.normalize(q.float(), dim=-1), k.float(), v.float())


def heads_one_by_one(q, k, v):
    def head(n):
        i = torch.arange(N)
        distance = i[:, None] - i
        scores = q[:, n].float() @ k[:, n].float().mT
        return (scores * (RATES[n] * distance).exp().tril()) @ v[:, n].float()

    return torch.stack([head(n) for n in range(H)], 1)


def in_fp16_between(q, k, v):
    return retention(q.float(), torch.exp(k.half()).float(), v.float())


def written_into(q, k, v):
    v = v.float()
    v.mul_(torch.sigmoid(v))
    return retention(q.float(), k.float(), v)


def of_another_attention(q, k, v):
    y = retention(q.float(), k.float(), v.float())
    return retention(q.float(), k.float(), y)


def nothing_cast(q, k, v):
    return retention(q, k, v)


PROGRAMS = {
    cast: "qkv",
    turned_and_scaled: "qkv",
    functions_in_bf16: "qkv",
    heads_one_by_one: "qkv",
    gated_values: "qk",
    normed_queries: "kv",
    in_fp16_between: "qv",
    written_into: "qk",
    of_another_attention: "qkv qk",
    nothing_cast: "",
}


def narrow_operands(program, *args):
    """What the operator is told, call by call."""
    found = []

    def backend(gm, inputs):
        graph = (decide(gm, inputs, Options()).rewritten or gm).graph
        found.extend(n.args[7] for n in graph.nodes if n.target is torch.ops.lacompile.decayed_attention.default)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(program, backend=backend, dynamic=False)(*args)
    return found


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_what_is_told(program):
    assert " ".join(narrow_operands(program, *qkv(B, H, N, D, dtype=BF16))) == PROGRAMS[program]


def test_numbers_of_fp32_are_not():
    assert narrow_operands(cast, *qkv(B, H, N, D)) == [""]
    assert narrow_operands(cast, *qkv(B, H, N, D, dtype=torch.float16)) == [""]


@pytest.mark.parametrize("program", [cast, gated_values], ids=lambda f: f.__name__)
def test_compiled(program):
    assert_rewritten(program, *qkv(B, H, N, D, dtype=BF16, requires_grad=True))

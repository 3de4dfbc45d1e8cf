"""What the operator is called with: in the formats that the program multiplied in, with the heads that it has.

Models in sixteen bits cast to fp32 what goes into the recurrence, as Mamba-2 does: a product made before the cast has
lost what the cast was for.
"""

from __future__ import annotations

import pytest
import torch

from lacompile.decision import decide
from lacompile.options import Options
from lacompile.testing import budget, relative_error

B, N, H, DK, DV = 2, 24, 4, 16, 8
ATTENTION = torch.ops.lacompile.decayed_attention.default


def causal(g):
    """``[B,H,N,N]`` of log-decays ``[B,N,H]``."""
    sums = g.transpose(1, 2).cumsum(-1)
    gap = sums[..., :, None] - sums[..., None, :]
    return gap.masked_fill(torch.ones(N, N, dtype=torch.bool, device=g.device).triu(1), float("-inf")).exp()


def of_keys(q, k, x, dt, rate):
    """As in Mamba-2: the step of each head is a factor of keys that all heads share."""
    g = -rate.float().exp() * dt.float()
    weighted = k.float()[:, :, None] * dt.float()[..., None]
    scores = torch.einsum("bnd,bmhd->bhnm", q.float(), weighted) * causal(g)
    return torch.einsum("bhnm,bmhe->bnhe", scores, x.float())


def of_values(q, k, x, dt, rate):
    g = -rate.float().exp() * dt.float()
    scores = (q.float() @ k.float().mT)[:, None] * causal(g)
    return torch.einsum("bhnm,bmhe->bnhe", scores, x.float() * dt.float()[..., None])


def of_scores(q, k, x, dt, rate):
    g = -rate.float().exp() * dt.float()
    scores = (q.float() @ k.float().mT)[:, None] * causal(g) * dt.float().transpose(1, 2)[:, :, None]
    return torch.einsum("bhnm,bmhe->bnhe", scores, x.float())


def exponentials(q, k, x, dt, rate):
    """exp of a query in fp32, of which the program has no value of all tokens."""
    g = -rate.float().exp() * dt.float()
    scores = torch.exp(q.float() / 4) @ torch.exp(k.float() / 4).mT
    return torch.einsum("bhnm,bmhe->bnhe", scores[:, None] * causal(g), x.float())


PROGRAMS = (of_keys, of_values, of_scores, exponentials)


def inputs():
    torch.manual_seed(0)
    made = (torch.randn(B, N, DK), torch.randn(B, N, DK), torch.randn(B, N, H, DV), torch.rand(B, N, H), torch.randn(H))
    return [x.bfloat16() for x in made]


def rewritten(program, *given):
    """The rewritten graph of a program on these inputs."""
    found = []

    def backend(gm, example_inputs):
        decision = decide(gm, example_inputs, Options(validate="off"))
        assert len(decision.report.rewrites) == 1, str(decision.report)
        found.append(decision.rewritten)
        return decision.rewritten.forward

    torch._dynamo.reset()
    result = torch.compile(program, backend=backend)(*given)
    return found[0], result


def operands(graph):
    """q, k and v of the operator, without values."""
    node = next(n for n in graph.graph.nodes if n.target is ATTENTION)
    return [n.meta["example_value"] for n in node.args[:3]]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_products_are_as_exact_as_in_the_program(program):
    given = inputs()
    _, got = rewritten(program, *given)
    want = program(*(x.double() for x in given))
    assert got.dtype == torch.float32
    assert relative_error(got, want) <= budget(torch.float32).output


@pytest.mark.parametrize("program", [of_keys, of_values, of_scores], ids=lambda f: f.__name__)
def test_keys_that_heads_share_stay_shared(program):
    q, k, v = operands(rewritten(program, *inputs())[0])
    assert q.shape[1] == k.shape[1] == 1
    assert v.shape[1] == H


def test_a_step_that_all_heads_share_stays_with_the_keys():
    def program(q, k, x, dt, rate):
        return of_values(q, k * dt[..., :1], x, torch.ones_like(dt), rate)

    q, k, v = operands(rewritten(program, *inputs())[0])
    assert q.shape[1] == k.shape[1] == 1 and v.shape[1] == H


@pytest.mark.parametrize("turned", [True, False], ids=["features first", "tokens first"])
def test_features_of_a_token_are_beside_each_other(turned, monkeypatch):
    """The device ``meta`` stands for a GPU, whose kernels would copy what lies in another way."""
    monkeypatch.setattr("lacompile.kernels.select.refusal", lambda **_: None)
    graphs = []

    def program(q, k, v, g):
        return (q @ k.mT * causal(g)) @ v

    def backend(gm, example_inputs):
        fakes = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
        decision = decide(gm, fakes, Options(validate="off"))
        assert len(decision.report.rewrites) == 1, str(decision.report)
        graphs.append(decision.rewritten)
        return gm.forward

    torch._dynamo.reset()
    shape = (B, H, DK, N) if turned else (B, H, N, DK)
    given = [torch.empty(shape, device="meta") for _ in range(3)]
    gates = torch.empty(B, N, H, device="meta")
    torch.compile(program, backend=backend)(*(x.mT if turned else x for x in given), gates)
    assert all(x.stride(-1) == 1 for x in operands(graphs[0]))
    copies = [n for n in graphs[0].graph.nodes if n.target is torch.Tensor.contiguous]
    assert len(copies) == (3 if turned else 0)

"""Programs whose numbers are made, or kept, on the CPU and sent to where the data is."""

from __future__ import annotations

import pytest
import torch

from lacompile.decision import decide
from lacompile.options import Options
from lacompile.passes.capture.standins import Metas, standins
from lacompile.testing import assert_rewritten

SLOPES = torch.tensor([0.1, 0.02])  # none of these is a buffer: they stay on the CPU
RATES = torch.tensor([0.9, 0.98])


def loop(q, k, v, rate, state):
    out = []
    for t in range(q.shape[2]):
        state = rate * state + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(out, 2)


def none(q):
    return torch.zeros(q.shape[0], 2, q.shape[3], q.shape[3])


def rates(q, k, v):
    return loop(q, k, v, RATES.to(q.device)[:, None, None], none(q).to(q))


def rates_of_slopes(q, k, v):
    return loop(q, k, v, torch.exp(-SLOPES.to(q.device))[:, None, None], none(q).to(q.device))


def rates_of_slopes_sent(q, k, v):
    return loop(q, k, v, torch.exp(-SLOPES).to(q)[:, None, None], q.new_zeros(()))


def mask_of_rates(q, k, v):
    i = torch.arange(q.shape[2])
    distance = i[:, None] - i
    mask = torch.where(distance >= 0, RATES[:, None, None] ** distance.clamp(min=0), 0.0)
    return (q @ k.mT * mask.to(q.device)) @ v


def mask_of_slopes(q, k, v):
    i = torch.arange(q.shape[2])
    return (q @ k.mT * torch.exp(-SLOPES[:, None, None] * (i[:, None] - i)).tril().to(q)) @ v


def state_of_the_cpu(q, k, v):
    state = torch.ones(2, q.shape[3], q.shape[3]) * SLOPES[:, None, None]
    return loop(q, k, v, torch.exp(-SLOPES.to(q.device))[:, None, None], state.to(q))


def written_after_it_was_sent(q, k, v):
    """The state that is read at the end is the one of the CPU, into which nothing was written."""
    empty = none(q)
    state, out = empty.to(q.device), []
    for t in range(q.shape[2]):
        state.mul_(RATES.to(q.device)[:, None, None]).add_(k[:, :, t, :, None] * v[:, :, t, None])
        out.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(out, 2) + empty.to(q)[:, :, :1, :]


PROGRAMS = {
    f.__name__: f
    for f in (
        rates,
        rates_of_slopes,
        rates_of_slopes_sent,
        mask_of_rates,
        mask_of_slopes,
        state_of_the_cpu,
    )
}


@pytest.mark.parametrize("program", [*PROGRAMS.values(), written_after_it_was_sent])
def test_the_operator_is_called_on_one_device(program, monkeypatch):
    """The device ``meta`` stands for a GPU."""
    monkeypatch.setattr("lacompile.kernels.select.refusal", lambda **_: None)
    devices = []

    def backend(gm, example_inputs):
        assert isinstance(standins(gm), Metas)
        fakes = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
        given = [f if x.is_meta else x for x, f in zip(example_inputs, fakes, strict=True)]
        decision = decide(gm, given, Options(validate="off"))
        assert len(decision.report.rewrites) == 1, str(decision.report)
        for node in decision.rewritten.graph.nodes:
            if node.target is torch.ops.lacompile.decayed_attention.default:
                devices.extend({n.meta["example_value"].device.type for n in node.all_input_nodes})
        return gm.forward

    torch._dynamo.reset()
    torch.compile(program, backend=backend)(*(torch.randn(1, 2, 12, 8, device="meta") for _ in range(3)))
    assert devices == ["meta"]


def mask_of_ones(q, k, v):
    n = q.shape[2]
    return (q @ k.mT * torch.tril(torch.ones(n, n)).to(q.device)) @ v


def keys_from_the_cpu(q, k, v):
    return mask_of_slopes(q, (k.cpu() + 1).to(q.device), v)


def moved_by_cuda(q, k, v):
    return loop(q, k, v, torch.exp(-SLOPES.cuda())[:, None, None], none(q).cuda())


ON_A_GPU = {**PROGRAMS, **{f.__name__: f for f in (mask_of_ones, keys_from_the_cpu, moved_by_cuda)}}


def inputs(device, grads=True):
    return (torch.randn(1, 2, 24, 16, device=device, requires_grad=grads) for _ in range(3))


@pytest.mark.parametrize("name", PROGRAMS)
def test_they_are_rewritten_on_the_cpu(name):
    assert_rewritten(PROGRAMS[name], *inputs("cpu"), compiled=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ON_A_GPU)
def test_they_are_rewritten_on_a_gpu(name):
    assert_rewritten(ON_A_GPU[name], *inputs("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_state_that_is_written_into_where_it_was_sent():
    assert_rewritten(written_after_it_was_sent, *inputs("cuda", grads=False), grads=False)

"""A graph that runs on meta tensors shows what it shows on Dynamo's fakes: operations, formats, shared memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.passes.capture import Capture
from lacompile.passes.capture.observer import Ignorant
from lacompile.passes.capture.standins import RESHAPING, TO_DEVICE, Fakes, Metas, fake_mode_of, standins
from lacompile.testing import assert_rewritten

X = torch.randn(2, 4, 6)
Y = torch.randn(4, 6, dtype=torch.bfloat16)
N = torch.arange(6)
HELD = torch.randn(6, 6)


def layers(x, y, n):
    x = F.layer_norm(F.linear(x, HELD), (6,))
    return F.rms_norm(F.gelu(x), (6,)).softmax(-1), F.silu(y), F.one_hot(n, 6), F.embedding(n, HELD)


def views(x, y, n):
    a, b = x.chunk(2, -1)
    flat = x.transpose(0, 1).reshape(4, 12)
    return (
        a[:, 1],
        b.unfold(1, 2, 2),
        x.view(8, 6),
        flat,
        x[None].expand(3, -1, -1, -1),
        x.contiguous(),
        x.mT.flatten(1),
    )


def writes(x, y, n):
    out = torch.zeros_like(x)
    out[:, 1:3] = x[:, :2]
    out[:, 0].mul_(2)
    part = out.view(-1)[3:]
    part += 1
    other = x.clone()
    other.masked_fill_(other > 0, 0.0)
    other[0].copy_(y)
    return out, other, part


def formats(x, y, n):
    """The same operation of numbers that are equal and of another type."""
    return n * 1, n * 1.0, n * True, n / 2, n // 2, y * 2, y + x, x.to(torch.float64), x > 0, x.sum(), (x.sum() * y)


def made(x, y, n):
    i = torch.arange(4, device=x.device)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    return (
        torch.where(mask, 0.9 ** (i[:, None] - i), 0.0),
        torch.tensor([1.0, 2.0]) * 3,
        torch.tensor(2.0) * n,
        x.new_zeros(3).to("cpu"),
        torch.full((2,), 2),
        torch.linspace(0, 1, 4),
        torch.stack([x, x]),
        torch.cat([x, x[:, :1]], 1),
    )


def sent(x, y, n):
    """To the device where they are: no copy, if not asked for one."""
    z = x.to(x.device).to("cpu").to(y.device, torch.float32)
    other = x.to("cpu", copy=True)
    third = torch.as_tensor(x, device="cpu")
    return z.add_(1), other.mul_(2), third.sub_(1), y.to(x), x.to("cpu", torch.float64), x.new_ones(3, device="cpu")


def products(x, y, n):
    return (
        x @ x.mT,
        torch.einsum("bnd,bmd->bnm", x, x),
        x[0] @ HELD,
        F.conv1d(x, torch.ones(4, 1, 3), groups=4),
        x.cumsum(1),
        x.topk(2)[0],
        torch.unbind(x, 1)[2],
    )


PROGRAMS = {f.__name__: f for f in (layers, views, writes, formats, made, sent, products)}


def to_another_device(x, y, n):
    """A copy, which what is written into it does not change the first of; ``META`` stands for a GPU."""
    state = torch.zeros(4, 6)
    there = state.to(x)
    there += x[0]
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    here, elsewhere = mask.to("cpu"), mask.to(x.device)
    here[0].fill_(False)
    by_index = x[:, torch.arange(2)]
    part = state[:2].to(x.device, torch.float64)
    x.copy_(state)
    same = x.to(x.device)
    same.mul_(2)
    return state, there, mask, elsewhere, by_index, part, x * torch.tensor(2.0), there.to(y.dtype), same


class Recorder(Ignorant):
    """What an observer is shown."""

    def __init__(self):
        self.seen = []

    def operation(self, func, args, kwargs, out, dtypes):
        outs = out if isinstance(out, list | tuple) else [out]
        shapes = [(tuple(t.shape), t.dtype) if isinstance(t, torch.Tensor) else t for t in outs]
        self.seen.append((str(func), shapes, dtypes, {k: v for k, v in kwargs.items() if v is not None}))
        return super().operation(func, args, kwargs, out, dtypes)


def graph_of(program, *inputs, **options):
    graphs = []

    def backend(gm, example_inputs):
        graphs.append((gm, example_inputs, standins(gm)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(program, backend=backend, fullgraph=True, **options)(*inputs)
    ((gm, example_inputs, chosen),) = graphs
    return gm, example_inputs, chosen


def run(gm, example_inputs, on):
    recorder = Recorder()
    capture = Capture(gm, recorder)
    capture._standins = capture._dispatch.standins = on
    capture.run(example_inputs)
    effects = capture.effects
    nodes = list(gm.graph.nodes)
    lives = {n: effects.lives.get(n, frozenset()) for n in nodes}
    return {
        "operations": recorder.seen,
        "shared": [(a.name, b.name) for a in nodes for b in nodes if effects.alias(a, b)],
        "written": {n.name: [m.name for m in nodes if lives[m] & w] for n, w in effects.writes.items()},
        "impure": {n.name for n in effects.impure},
    }


@pytest.mark.parametrize("name", PROGRAMS)
def test_metas_show_what_fakes_show(name):
    gm, example_inputs, chosen = graph_of(PROGRAMS[name], X, Y, N)
    assert isinstance(chosen, Metas)
    fakes = run(gm, example_inputs, Fakes(fake_mode_of(gm)))
    metas = run(gm, example_inputs, chosen)
    assert not metas["impure"]
    assert len(metas["operations"]) > 5
    for what in fakes:
        assert metas[what] == fakes[what]


def test_metas_show_what_fakes_show_on_two_devices():
    gm, example_inputs, chosen = graph_of(to_another_device, X.to("meta"), Y.to("meta"), N)
    assert isinstance(chosen, Metas)
    fakes, metas = run(gm, example_inputs, Fakes(fake_mode_of(gm))), run(gm, example_inputs, chosen)
    assert not metas["impure"]
    assert metas == fakes
    state, there, mask, here, elsewhere = ("state", "there", "mask", "here", "elsewhere")
    assert (mask, here) in metas["shared"]
    assert (mask, elsewhere) not in metas["shared"]
    assert (state, there) not in metas["shared"]


def in_autocast(x, y, n):
    with torch.autocast("cpu", torch.bfloat16):
        return x @ x.mT


def under_checkpoint(x, y, n):
    return torch.utils.checkpoint.checkpoint(in_autocast, x, y, n, use_reentrant=False)


@pytest.mark.parametrize("program", [in_autocast, under_checkpoint])
def test_an_autocast_needs_fakes(program):
    assert isinstance(graph_of(program, X, Y, N)[2], Fakes)


def test_an_autocast_around_the_program_needs_fakes():
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(graph_of(products, X, Y, N)[2], Fakes)


@pytest.mark.parametrize("method", [*TO_DEVICE, *RESHAPING])
def test_a_method_that_names_a_device_or_changes_a_shape_needs_fakes(method):
    gm, _, chosen = graph_of(lambda x: x.exp() + 1, X)
    assert isinstance(chosen, Metas)
    next(n for n in gm.graph.nodes if n.target == "exp").target = method
    assert isinstance(standins(gm), Fakes)


def test_a_shape_that_changes_in_place():
    """Dynamo's example of the first value is of the shape that it is given later."""

    def run(q, k, v):
        i, j = torch.arange(8.0).unsqueeze_(-1), torch.arange(8.0).unsqueeze_(0)
        return (q @ k.mT * (0.9 ** torch.abs(i - j)).masked_fill_(i < j, 0)) @ v

    assert_rewritten(run, *(torch.randn(2, 8, 4, requires_grad=True) for _ in range(3)), compiled=False)


def test_symbolic_sizes_need_fakes():
    x = X.clone()
    torch._dynamo.mark_dynamic(x, 1)
    assert isinstance(graph_of(lambda x: x * 2, x)[2], Fakes)


def test_complex_inputs_need_fakes():
    assert isinstance(graph_of(lambda x: x * 2, X.to(torch.complex64))[2], Fakes)


def test_a_result_that_dynamo_saw_otherwise_is_unknown():
    gm, example_inputs, on = graph_of(lambda x: (x * 2).exp(), X)
    node = next(n for n in gm.graph.nodes if n.target == "exp")
    node.meta["example_value"] = node.meta["example_value"].double()
    found = run(gm, example_inputs, on)
    assert found["impure"] == {node.name}

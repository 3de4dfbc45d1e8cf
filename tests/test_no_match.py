"""Where nothing is found, Inductor gets what it would have got without this backend: the same object, as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lacompile
from lacompile import _compat
from lacompile.backend import lightning


class SoftmaxBlock(nn.Module):
    """One block of a transformer, its attention written out."""

    def __init__(self, dim=32, heads=4):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class ConvNet(nn.Module):
    """With a buffer that it writes into, in training."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, x):
        return self.layers(x).flatten(1)


def dropped_out(x):
    return F.dropout(x, 0.5) + torch.rand_like(x)


def written_in_place(x):
    y = x.clone()
    y[1:] += x[:-1]
    return y.cumsum(0)


PROGRAMS = {
    "softmax attention": (SoftmaxBlock, (2, 16, 32)),
    "convolutions": (ConvNet, (2, 3, 8, 8)),
    "random numbers": (lambda: dropped_out, (4, 4)),
    "writes": (lambda: written_in_place, (4, 4)),
    "a recurrence that is not one": (lambda: lambda x: torch.tanh(x @ x.mT) @ x, (4, 4)),
}


class Watch:
    """The backend, and Inductor behind it: what each was called with."""

    def __init__(self, monkeypatch, **options):
        self.options = options
        self.given = []
        self.handed_over = []
        monkeypatch.setattr(_compat, "compile_with_inductor", self.inductor)
        monkeypatch.setattr(_compat, "compile_without_inductor", self.inductor)
        monkeypatch.setattr(_compat, "cpu_compiler_error", lambda: None)

    def __call__(self, gm, example_inputs):
        self.given.append((gm, example_inputs, picture(gm)))
        return lightning(gm, example_inputs, options=self.options or None)

    def inductor(self, gm, example_inputs, config_patches=None, cache_tag=""):
        given = self.given[-1][0]
        self.handed_over.append((gm, example_inputs, config_patches, cache_tag, picture(given)))
        return gm.forward


def picture(gm):
    """Everything there is to see of a graph: its nodes themselves, what they do, and their metadata.

    Taken when the backend is called and when Inductor is: Dynamo clears some of it later.
    """
    nodes = [(id(n), n.op, n.target, n.name, repr(n.args), repr(n.kwargs), *n.users) for n in gm.graph.nodes]
    meta = [{k: id(v) for k, v in n.meta.items()} for n in gm.graph.nodes]
    state = [(name, id(t), t._version) for name, t in (*gm.named_parameters(), *gm.named_buffers())]
    return gm.code, nodes, meta, state, sorted(vars(gm)), {k: id(v) for k, v in gm.meta.items()}


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_same_object_untouched(name, dynamic, gradients, monkeypatch):
    torch._dynamo.reset()
    torch.manual_seed(0)
    build, shape = PROGRAMS[name]
    watch = Watch(monkeypatch)
    with torch.set_grad_enabled(gradients):
        torch.compile(build(), backend=watch, dynamic=dynamic)(torch.randn(shape))
    assert len(watch.given) == len(watch.handed_over) == 1
    (gm, example_inputs, before), (got, got_inputs, patches, tag, after) = watch.given[0], watch.handed_over[0]
    assert got is gm
    assert got_inputs is example_inputs
    assert not patches and not tag
    assert after == before
    report = lacompile.last_report()
    assert report is not None and not report.rewrites
    assert report.nodes_before == report.nodes_after == len(gm.graph.nodes)


def test_a_dry_run_hands_over_the_same_object(monkeypatch):
    """A match that is not to be used leaves no trace either."""
    torch._dynamo.reset()
    watch = Watch(monkeypatch, dry_run=True)
    torch.compile(lambda q, k, v: (q @ k.mT).tril() @ v, backend=watch)(*torch.randn(3, 1, 2, 8, 4))
    (gm, _, before), (got, *_, after) = watch.given[0], watch.handed_over[0]
    report = lacompile.last_report()
    assert report is not None and len(report.rewrites) == 1
    assert got is gm and after == before


def test_a_match_is_rewritten_on_a_copy(monkeypatch):
    """The near twin: another object is handed over, and the one that was given is untouched all the same."""
    torch._dynamo.reset()
    watch = Watch(monkeypatch)
    torch.compile(lambda q, k, v: (q @ k.mT).tril() @ v, backend=watch)(*torch.randn(3, 1, 2, 8, 4))
    (gm, _, before), (got, *_, after) = watch.given[0], watch.handed_over[0]
    assert got is not gm and after == before


def test_random_numbers_are_those_of_inductor(monkeypatch):
    """The analysis draws none from the program's generator."""
    torch._dynamo.reset()
    watch = Watch(monkeypatch)
    f = torch.compile(dropped_out, backend=watch)
    torch.manual_seed(0)
    got = f(torch.ones(4, 4))
    torch.manual_seed(0)
    assert torch.equal(got, dropped_out(torch.ones(4, 4)))

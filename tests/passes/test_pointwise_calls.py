"""Pointwise functions between state and projection of a loop over tokens, whatever their names; near twins."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F

from lacompile.passes.capture import Capture
from lacompile.passes.capture.observer import Ignorant
from lacompile.passes.graph.calls import is_pointwise_call
from lacompile.testing import assert_refused, assert_rewritten

from .test_filled import compared
from .test_series import WIDTH, B, N, attention_of, layer, tokens


def projected(function, join=torch.stack, dim=1):
    """A loop that projects ``function(o, t)`` of what each token reads, ``[B, WIDTH]``."""

    def run(x, w, b):
        outs = attention_of(x, lambda o, x_t: o.flatten(1))
        return join([F.linear(function(o, t), w, b) for t, o in enumerate(outs)], dim)

    return run


POINTWISE = {
    **{f.__name__: f for f in (F.mish, F.leaky_relu, F.selu, F.celu, F.hardswish, F.relu6, F.softsign, F.tanhshrink)},
    **{f.__name__: f for f in (torch.sin, torch.atan, torch.erf, torch.asinh, operator.abs)},
    "clamp": lambda o: o.clamp(min=-0.1),
    "clip": lambda o: torch.clip(o, -0.5, 0.5),
    "multiply": lambda o: torch.multiply(o, 2.0),
    "where": lambda o: torch.where(o > 0, o, 0.1 * o),
    "where of a number": lambda o: o.where(o > 0, 0.0),
    "masked_fill": lambda o: o.masked_fill(o.lt(0), 0.5),
    "product with a condition": lambda o: o * (o > 0),
    "maximum": lambda o: torch.maximum(o, -o),
    "max": lambda o: o.max(0.1 * o),
    "softsign written out": lambda o: o / (1 + o.abs()),
    "ATen's own": torch.ops.aten.sin.default,
    "fp64 in between": lambda o: o.double().sin().float(),
    "dropout in evaluation": lambda o: F.dropout(o.sin(), 0.5, False),
    "dropout of nothing": lambda o: F.dropout(o.sin(), 0.0, True),
    "copied": lambda o: o.sin().clone(),
}


def calls_by_entries(function):
    """For each call of the graph whether it is one function of each entry."""
    found = []

    def backend(gm, example_inputs):
        capture = Capture(gm, Ignorant())
        capture.run(example_inputs)
        found.extend(is_pointwise_call(n, capture.effects) for n in gm.graph.nodes if n.op.startswith("call"))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(torch.linspace(-1, 1, B * WIDTH).view(B, WIDTH))
    return found


@pytest.mark.parametrize("name", POINTWISE)
def test_is_of_entries(name):
    assert set(calls_by_entries(POINTWISE[name])) == {True}


MOVED = [
    "mish",  # named nowhere, like most of the others
    "abs",  # of Python's operators
    "clip",  # told numbers
    "where", "masked_fill", "product with a condition",  # two operands, one of them a condition
    "maximum", "max",  # two operands, by a function and by a method
    "softsign written out",  # several calls
    "ATen's own", "fp64 in between",
    "dropout in evaluation", "dropout of nothing", "copied",  # which run nothing, or draw
]  # fmt: skip
"""One of each kind."""


@pytest.mark.parametrize("name", MOVED)
def test_is_moved(name):
    run = projected(lambda o, t: POINTWISE[name](o))
    report = assert_rewritten(run, tokens(), *layer(), compiled=False)
    assert report.rewrites[0].length == str(N)
    assert report.nodes_after < report.nodes_before / 2


@torch.compiler.allow_in_graph
def by_rows(x):
    """Pointwise operations alone, of a number that is none of PyTorch's making."""
    return x.sin() * x.shape[0]


def into_another(o, t):
    out = torch.empty_like(o)
    torch.sin(o, out=out)
    return out


TWINS = {
    "another function once": lambda o, t: F.mish(o) if t == 3 else F.selu(o),
    "another number once": lambda o, t: o.clamp(min=0.1 if t == 3 else 0.0),
    "a number of each": lambda o, t: F.leaky_relu(o, 0.1 * t),
    "a condition and a number": lambda o, t: o * ((o > 0) if t == 3 else (o > 0).to(o.dtype)),
    "softmax over the batch": lambda o, t: o.softmax(0),
    "prefix sums over the batch": lambda o, t: o.cumsum(0),
    "a norm over the batch": lambda o, t: o / o.norm(dim=0, keepdim=True),
    "the batch turned round": lambda o, t: o.flip(0).sin(),
    "a function that asks for a shape": lambda o, t: by_rows(o),
    "written in place": lambda o, t: F.mish(o.sin(), inplace=True),
    "written in place by name": lambda o, t: o.mul(2).clamp_(min=0),
    "another's rows": lambda o, t: torch.where(o > 0, o, o[:1]),
}


@pytest.mark.parametrize("name", TWINS)
def test_twins(name):
    """Rewritten or not, they are what they are."""
    compared(projected(TWINS[name]), tokens(), *layer())


@pytest.mark.parametrize("name", ["softmax over the batch", "the batch turned round", "another's rows"])
def test_twins_that_are_joined_in_front_of_the_batch(name):
    compared(projected(TWINS[name], dim=0), tokens(), *layer())


OF_THE_BATCH = [
    "softmax over the batch", "prefix sums over the batch", "a norm over the batch", "the batch turned round",
    "a function that asks for a shape",
]  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_BATCH)
def test_is_not_of_entries(name):
    assert False in calls_by_entries(lambda o: TWINS[name](o, 0))


def test_what_is_not_of_pytorch_stays():
    report = compared(projected(TWINS["a function that asks for a shape"], dim=0), tokens(), *layer())
    assert f"N={N}" not in str(report)


def test_what_is_written_elsewhere():
    compared(projected(into_another), *(a.detach() for a in (tokens(), *layer())))


WHOLE_IN_ONE_ENTRY = {
    "a part": lambda y: y[:, 0:1],
    "a sum to a size": lambda y: y.sum_to_size(B, 1, WIDTH),
    "a sum": lambda y: y.sum(1, keepdim=True),
    "an order": lambda y: y.transpose(1, 1),
    "prefix sums": lambda y: y.cumsum(1),
    "a shift": lambda y: y.roll(1, 1),
    "a repetition": lambda y: y.expand(B, 1, WIDTH),
    "softmax": lambda y: y.softmax(1),
    "difference": lambda y: y - y.mean(1, keepdim=True) + y.sin(),
}


JOINED = {
    "joined": ["a part", "a sum to a size", "an order", "a repetition", "difference"],
    "written": WHOLE_IN_ONE_ENTRY,
}


@pytest.mark.parametrize(("how", "name"), [(how, name) for how, names in JOINED.items() for name in names])
def test_what_one_entry_hides(how, name):
    """Of one token each of these runs nothing or no more than a pointwise function would; of all tokens another sum."""

    def run(x, w, b):
        outs = attention_of(x, lambda o, x_t: o.flatten(1)[:, None])
        outs = [F.linear(WHOLE_IN_ONE_ENTRY[name](y).sin(), w, b) for y in outs]
        if how == "joined":
            return torch.cat(outs, 1)
        out = torch.zeros_like(x)
        for t, y in enumerate(outs):
            out[:, t : t + 1] = y
        return out

    compared(run, tokens(), *layer())


@pytest.mark.parametrize("shape", [(WIDTH,), (B, WIDTH), (B, 1), (1, 1), ()])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_an_argument_for_all_tokens(shape, dim):
    """Where it would be laid along another dimension of what is joined it stays."""
    bound = torch.linspace(-1, 1, max(1, torch.Size(shape).numel())).view(shape)

    def run(x, w, b):
        outs = attention_of(x[:, :B], lambda o, x_t: o.flatten(1))  # as many tokens as sequences
        return torch.stack([torch.maximum(o, bound.to(o)).sin() * w[0] + b for o in outs], dim)

    compared(run, tokens(), *layer())


DRAWN = {
    "dropout": lambda o, t: F.dropout(o, 0.5, True),
    "rrelu": lambda o, t: F.rrelu(o, training=True),
    "bernoulli": lambda o, t: o * torch.bernoulli(torch.full_like(o, 0.5)),
    "noise": lambda o, t: o + torch.rand_like(o),
}


@pytest.mark.parametrize("name", DRAWN)
def test_random_functions_stay(name):
    """Each token draws its own numbers, in the order of the program."""
    assert_refused(projected(DRAWN[name]), tokens(), *layer(), options={"validate": "off"})


@pytest.mark.parametrize(
    "function",
    [
        lambda o, t: torch.maximum(o.float(), o.double()).sin().to(o.dtype),
        lambda o, t: torch.where(o > 0, o.half(), o.double()).sin().to(o.dtype),
        lambda o, t: (o.half() if t % 2 else o.float()).sin().to(o.dtype),
    ],
    ids=["two formats", "two formats and a condition", "another format every other token"],
)
def test_formats_that_are_promoted(function):
    compared(projected(function), tokens(), *layer())

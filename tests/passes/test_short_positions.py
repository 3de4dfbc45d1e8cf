"""Positions and rates that bf16 and fp16 cannot hold: they are known by their numbers, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lacompile
from lacompile.testing import assert_refused, assert_rewritten

BF16, FP16 = torch.bfloat16, torch.float16
UNCHECKED = {"validate": "off"}


def inputs(n):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 1, n, d, generator=generator, requires_grad=True) for d in (4, 4, 5)]


def attention(mask):
    def run(q, k, v):
        return (q @ k.mT * mask(q.shape[2]).tril().to(q)) @ v

    return run


def apart(i):
    return i[:, None] - i


def filled(n):
    i = torch.empty(n, dtype=BF16)
    i.copy_(torch.arange(n))
    return i


def scaled_in_place(n):
    i = torch.zeros(n, dtype=BF16)
    i += torch.arange(n)
    i *= 0.37
    return i


ROUNDED = {
    "a range": (300, lambda n: torch.exp(-0.01 * apart(torch.arange(n, dtype=BF16)).float())),
    "a range in fp16": (2100, lambda n: torch.exp(-0.01 * apart(torch.arange(n, dtype=FP16)).float())),
    "weights that grow": (300, lambda n: torch.exp(0.1 * apart(torch.arange(n, dtype=BF16)).float())),
    "distances cast": (400, lambda n: torch.exp(-0.1 * apart(torch.arange(n)).to(BF16).float())),
    "positions cast": (400, lambda n: torch.exp(-0.1 * apart(torch.arange(n).to(BF16)).float())),
    "without a sign": (400, lambda n: torch.exp(-0.1 * apart(torch.arange(n).to(BF16)).abs().float())),
    "an exponent": (60, lambda n: torch.exp(-0.1 * apart(torch.arange(n).to(BF16)))),
    "a long exponent": (300, lambda n: torch.exp(-0.1 * apart(torch.arange(n).to(BF16)))),
    "ones that are counted": (300, lambda n: torch.exp(-0.2 * apart(torch.ones(n, dtype=BF16).cumsum(0)).float())),
    "a product that counts": (
        400,
        lambda n: torch.exp(-0.1 * apart(torch.ones(n, n, dtype=BF16).tril() @ torch.ones(n, dtype=BF16)).float()),
    ),
    "evenly spaced": (200, lambda n: torch.exp(-apart(torch.linspace(0, 37.0, n, dtype=BF16)).float())),
    "fractions": (200, lambda n: torch.exp(-apart(torch.arange(n).to(BF16) * 0.37).float())),
    "fractions in fp16": (300, lambda n: torch.exp(-apart(torch.arange(n).half() * 0.137).float())),
    "few fractions": (40, lambda n: torch.exp(-apart(torch.arange(n).to(BF16) * 0.37).float())),
    "fractions cast": (200, lambda n: torch.exp(-apart((torch.arange(n) * 0.37).to(BF16)).float())),
    "roots": (200, lambda n: torch.exp(-apart(torch.arange(n).to(BF16).sqrt()).float())),
    "written into": (400, lambda n: torch.exp(-0.1 * apart(filled(n)).float())),
    "written in place": (200, lambda n: torch.exp(-apart(scaled_in_place(n)).float())),
    "one by one": (
        40,
        lambda n: torch.exp(-apart(torch.stack([torch.tensor(float(t), dtype=BF16) for t in range(n)]) * 0.37).float()),
    ),
    "rates that are added up": (
        200,
        lambda n: torch.exp(apart(torch.full((n,), -0.1, dtype=BF16).cumsum(0)).float()),
    ),
    "logarithms of weights": (100, lambda n: torch.exp(apart(torch.exp(-0.1 * torch.arange(n)).to(BF16).log()))),
    "a base": (100, lambda n: 0.9 ** apart(torch.arange(n).to(BF16))),
    "a base in fp16": (100, lambda n: 0.9 ** apart(torch.arange(n).half())),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_what_is_rounded_is_not_taken_apart(name):
    n, mask = ROUNDED[name]
    assert_refused(attention(mask), *inputs(n), options=UNCHECKED)


def test_of_an_unknown_length():
    torch._dynamo.reset()
    mask = ROUNDED["a range"][1]
    report = lacompile.explain(torch.compile(attention(mask), dynamic=True), **UNCHECKED)(*inputs(300))
    assert not report.rewrites, str(report)


def test_a_learned_base_is_rounded_beside_short_positions():
    def run(q, k, v, gate):
        weights = torch.sigmoid(gate) ** apart(torch.arange(q.shape[2]).to(BF16))
        return (q @ k.mT * weights.tril().to(q)) @ v

    assert_refused(run, *inputs(100), torch.tensor(2.2, requires_grad=True), options=UNCHECKED)


KNOWN = {
    "few enough": (200, lambda n: torch.exp(-0.1 * apart(torch.arange(n).to(BF16)).float())),
    "of fp16": (300, lambda n: torch.exp(-0.1 * apart(torch.arange(n).half()).float())),
    "binary fractions": (60, lambda n: torch.exp(-apart(torch.arange(n).to(BF16) * 0.5).float())),
    "subtracted in fp32": (300, lambda n: torch.exp(-0.01 * apart(torch.arange(n, dtype=BF16).float()))),
    "fractions, subtracted in fp32": (200, lambda n: torch.exp(-apart((torch.arange(n).to(BF16) * 0.37).float()))),
    "a product of a number": (100, lambda n: torch.exp(apart((-0.37 * torch.arange(n).to(BF16)).float()))),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_by_its_numbers_comes_out_right(name):
    n, mask = KNOWN[name]
    assert_rewritten(attention(mask), *inputs(n), compiled=False, options=UNCHECKED)


def test_a_mask_that_is_cast_once_is_a_mask():
    def run(q, k, v):
        weights = torch.exp(-0.1 * apart(torch.arange(q.shape[2]))).tril().to(q.dtype)
        return (q @ k.mT * weights) @ v

    assert_rewritten(run, *(x.detach().to(BF16).requires_grad_() for x in inputs(100)), compiled=False)


WHOLLY = {
    "a number times distances": lambda i: torch.exp(-0.05 * apart(i)),
    "slopes times distances": lambda i: torch.exp(-torch.tensor([0.5, 0.25, 0.1]).to(i)[:, None, None] * apart(i)),
}


@pytest.mark.parametrize("name", WHOLLY)
def test_in_a_program_of_bf16_alone_a_rounded_distance_is_a_rounded_weight(name):
    def run(q, k, v):
        weights = WHOLLY[name](torch.arange(q.shape[2]).to(q.dtype)).tril()
        return (q @ k.mT * weights) @ v

    assert_rewritten(run, *(x.detach().to(BF16).requires_grad_() for x in inputs(100)), compiled=False)
    assert_refused(run, *(x.detach().to(BF16).requires_grad_() for x in inputs(300)), options=UNCHECKED)


class Positions(nn.Module):
    def __init__(self, numbers, rate):
        super().__init__()
        self.rate = rate
        self.register_buffer("numbers", numbers)

    def to(self, *_):
        return self  # the buffer's format is what is looked at

    def forward(self, q, k, v):
        i = self.numbers[: q.shape[2]]
        return (q @ k.mT * torch.exp(-self.rate * apart(i).float()).tril()) @ v


BUFFERS = {
    "a range": (torch.arange(400).to(BF16), 0.1, 0),
    "fractions": ((torch.arange(200) * 0.37).to(BF16), 1.0, 0),
    "sums of gates": (torch.rand(200, generator=torch.Generator().manual_seed(0)).cumsum(0).to(BF16), 1.0, 0),
    "a range that is held": (torch.arange(200).to(BF16), 0.1, 1),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers(name):
    numbers, rate, found = BUFFERS[name]
    torch._dynamo.reset()
    module = Positions(numbers, rate)
    report = lacompile.explain(module, **UNCHECKED)(*inputs(len(numbers)))
    assert len(report.rewrites) == found, str(report)

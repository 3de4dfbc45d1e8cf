"""The mLSTM of two packages, untouched: the same operator where its input gate is bounded, else left alone."""

from __future__ import annotations

import pytest
import torch

from lacompile.testing import assert_refused, assert_rewritten

from .loading import load

pytest.importorskip("mlstm_kernels", reason="a public package that is tested where it is installed")
pytest.importorskip("xlstm")


def inputs(*gate_shape):
    torch.manual_seed(0)
    qkv = [torch.randn(2, 3, 50, 16) for _ in range(3)]
    gates = [torch.randn(2, 3, 50, *gate_shape) for _ in range(2)]
    return [x.requires_grad_() for x in (*qkv, *gates)]


@pytest.mark.parametrize("stable_fgate", [False, True])
def test_sigmoid_gate_and_its_normaliser(stable_fgate):
    forward = load("mlstm_kernels", "torch/parallel/native_siging/fw.py").mlstm_siging_parallel_fw
    # the normaliser is the same operator with values of one
    assert_rewritten(lambda *x: forward(*x, stable_fgate=stable_fgate)[0], *inputs(), count=2, compiled=False)


def test_sigmoid_gate_alone():
    forward = load("mlstm_kernels", "torch/parallel/native_siging/fw.py").mlstm_siging_parallel_fw
    assert_rewritten(lambda *x: forward(*x, normalize=False)[0], *inputs(), compiled=False)


def test_exponential_gate():
    forward = load("mlstm_kernels", "torch/parallel/native/fw.py").mlstm_parallel_fw
    assert_refused(lambda *x: forward(*x)[0], *inputs(), obligation="bounded-weights")


def test_exponential_gate_of_xlstm():
    forward = load("xlstm", "blocks/mlstm/backends.py").parallel_stabilized_simple
    assert_refused(forward, *inputs(1), obligation="bounded-weights")

"""The public MiniMax model of transformers, untouched: its Lightning-Attention layer, and the whole small model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import MiniMaxConfig, MiniMaxForCausalLM
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention

from lacompile import explain
from lacompile.testing import assert_rewritten

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
FP32, BF16 = torch.float32, torch.bfloat16
LINEAR = (1, 2)


def config(**more):
    return MiniMaxConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=4,
        num_local_experts=2,
        num_experts_per_tok=2,  # both: a rounding must not route a token elsewhere
        layer_types=["full_attention", "linear_attention", "linear_attention", "full_attention"],
        attn_implementation="eager",
        experts_implementation="batched_mm",
        **more,
    )


class Layer(nn.Module):
    """The attention layer alone; ``index`` decides its slopes, which are tiny in the last layer."""

    def __init__(self, index=1, **more):
        super().__init__()
        self.attention = MiniMaxLightningAttention(config(**more), index)

    def forward(self, x, mask=None):
        return self.attention(x, None, mask)[0]


class LayerWithState(Layer):
    def forward(self, x, state):
        cache = MiniMaxCache()
        index = self.attention.layer_idx
        cache.set_linear_cache(index, state)
        out = self.attention(x, None, None, cache)[0]
        return out, cache.get_linear_cache(index)


class Model(nn.Module):
    def __init__(self, **more):
        super().__init__()
        self.model = MiniMaxForCausalLM(config(**more))

    def forward(self, tokens, mask=None):
        return self.model(tokens, use_cache=False, attention_mask=mask).logits


class Prefill(Model):
    def forward(self, tokens):
        out = self.model(tokens, use_cache=True, past_key_values=MiniMaxCache())
        return out.logits, [out.past_key_values.get_linear_cache(n) for n in LINEAR]


def hidden(length, dtype):
    return torch.randn(2, length, 64, dtype=dtype)


def padded(length):
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, : length // 8] = 0
    return mask


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("length", "masked", "dtype"),
    [
        (256, False, FP32),
        (256, True, BF16),
        (700, False, BF16),
        (700, True, FP32),
        (1000, False, FP32),
        (1000, True, BF16),
    ],
)
def test_layer(length, masked, dtype):
    args = (hidden(length, dtype), padded(length)) if masked else (hidden(length, dtype),)
    assert_rewritten(Layer().to(dtype), *args, compiled=False)


@DTYPES
def test_last_layer_whose_decays_round_to_one(dtype):
    assert_rewritten(Layer(index=3).to(dtype), hidden(700, dtype), compiled=False)


@DTYPES
def test_long_layer(dtype):
    report = assert_rewritten(Layer().to(dtype), hidden(4096, dtype), grads=False, compiled=False)
    assert report.rewrites[0].length == "4096"
    assert report.nodes_before > 300 and report.nodes_after < 60


@DTYPES
@pytest.mark.parametrize("length", [1, 4])
def test_decoding(length, dtype):
    state = torch.randn(2, 4, 16, 16, dtype=dtype)
    report = assert_rewritten(LayerWithState().to(dtype), hidden(length, dtype), state, compiled=False)
    assert report.rewrites[0].initial_state and report.rewrites[0].final_state


@pytest.mark.parametrize(
    ("length", "masked", "dtype"), [(64, False, FP32), (64, True, BF16), (200, False, BF16), (200, True, FP32)]
)
def test_model(length, masked, dtype):
    tokens = torch.randint(0, 64, (2, length))
    args = (tokens, padded(length)) if masked else (tokens,)
    assert_rewritten(Model(block_size=64).to(dtype), *args, count=2, compiled=False)


@pytest.mark.parametrize(("length", "dtype"), [(64, BF16), (200, FP32)])
def test_prefill(length, dtype):
    report = assert_rewritten(
        Prefill(block_size=64).to(dtype), torch.randint(0, 64, (2, length)), count=2, grads=False, compiled=False
    )
    assert all(r.final_state for r in report.rewrites)


def test_layers_that_share_a_graph_are_each_rewritten(without_inductor):
    """Dynamo compiles the class once; the second layer's buffers are others."""
    layers = [Layer(index=n, block_size=32) for n in (1, 2)]
    x = hidden(100, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda layer, x: layer(x), backend="lightning")
    for _ in range(2):
        for layer in layers:
            torch.testing.assert_close(compiled(layer, x), layer(x), atol=1e-5, rtol=1e-5)


def test_the_softmax_layers_are_named():
    report = explain(Model(block_size=64))(torch.randint(0, 64, (2, 96)))
    assert {m.obligation for m in report.near_misses} == {"separable"}

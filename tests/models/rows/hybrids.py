"""transformers: models with linear layers, on the plain path that it takes without kernels of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from ..loading import without
from ..matrix import Row

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "attn_implementation": "eager",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1}
MIXER = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_chunk_size": 32}


class Model(nn.Module):
    """A small causal language model of this configuration."""

    def __init__(self, name: str, **config: Any):
        super().__init__()
        with without("fla", "mamba_ssm", "mambapy"):  # or it takes kernels that need a GPU
            causal = getattr(transformers, f"{name}ForCausalLM")
        made = getattr(transformers, f"{name}Config")(**COMMON, **config)
        self.model = causal(made)

    def forward(self, tokens):
        return self.model(tokens, use_cache=False).logits


def model(name: str, dtype: torch.dtype = torch.float32, **config: Any) -> Callable[[int], Any]:
    return lambda n: (Model(name, **config).to(dtype).eval(), (torch.randint(1, 64, (2, n)),))


def row(
    name: str,
    rewrites: int,
    reason: str | None = None,
    formulation: str = "whole model",
    length: int = 70,
    before: int | None = None,
    **config: Any,
) -> Row:
    made = model(name, **config)
    return Row("transformers", f"`{name}ForCausalLM`", formulation, made, length, rewrites, reason, before)


def minimax_layer(n):
    made = transformers.MiniMaxConfig(**COMMON, num_attention_heads=2, head_dim=16, num_hidden_layers=2, block_size=32)
    layer = MiniMaxLightningAttention(made, 0)
    return Wrapped(layer), (torch.randn(2, n, 32),)


class Wrapped(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, None, None)[0]


def mamba2_mixer(n):
    sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 32}
    return Mamba2Mixer(transformers.Mamba2Config(expand=2, **sizes), 0), (torch.randn(2, n, 32),)


MINIMAX = {
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "block_size": 32,
    "intermediate_size": 32,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "experts_implementation": "batched_mm",
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
GATED_DELTA = {
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "head_dim": 16,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}

ROWS = [
    Row("transformers", "`MiniMaxLightningAttention`", "chunkwise", minimax_layer, 70, before=74),
    row("MiniMax", 2, "separable", **MINIMAX),
    Row("transformers", "`Mamba2Mixer`", "chunkwise", mamba2_mixer, 70, before=74),
    row("Mamba2", 2, num_heads=4, head_dim=16, state_size=16, n_groups=2, chunk_size=32, num_hidden_layers=2),
    row(
        "Bamba", 2, "separable", intermediate_size=32, num_hidden_layers=3, attn_layer_indices=[1], **ATTENTION, **MIXER
    ),
    row("FalconH1", 2, "separable", intermediate_size=32, num_hidden_layers=2, mamba_d_ssm=64, **ATTENTION, **MIXER),
    row(
        "GraniteMoeHybrid",
        2,
        "separable",
        num_hidden_layers=3,
        layer_types=["mamba", "attention", "mamba"],
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=32,
        **ATTENTION,
        **MIXER,
    ),
    row(
        "NemotronH",
        2,
        "separable",
        intermediate_size=32,
        layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention"],
        head_dim=16,
        ssm_state_size=16,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        chunk_size=32,
        **ATTENTION,
    ),
    row(
        "Zamba2",
        2,
        num_attention_heads=2,
        num_hidden_layers=2,
        layers_block_type=["mamba", "mamba"],
        mamba_d_state=16,
        mamba_ngroups=2,
        n_mamba_heads=4,
        chunk_size=32,
        intermediate_size=32,
    ),
    row(
        "Qwen3Next",
        0,
        "recurrence",
        formulation="delta rule",
        **ATTENTION,
        **GATED_DELTA,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        experts_implementation="batched_mm",
    ),
    row("OlmoHybrid", 0, "recurrence", formulation="delta rule", **ATTENTION, **GATED_DELTA),
    row("Mamba", 0, "decay", formulation="decay per feature", length=8, state_size=8, num_hidden_layers=1),
    row(
        "Jamba",
        0,
        "decay",
        formulation="decay per feature",
        length=8,
        num_hidden_layers=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        use_mamba_kernels=False,
        num_experts=1,
        intermediate_size=32,
        **ATTENTION,
    ),
    row(
        "RecurrentGemma",
        0,
        "separable",
        formulation="decay per feature",
        length=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        lru_width=32,
    ),
    row(
        "Rwkv",
        0,
        "bounded-weights",
        formulation="decay per feature",
        length=8,
        num_hidden_layers=2,
        attention_hidden_size=32,
    ),
    row(
        "Lfm2",
        0,
        "separable",
        formulation="other",
        num_hidden_layers=2,
        intermediate_size=32,
        layer_types=["conv", "full_attention"],
        **ATTENTION,
    ),
    row("Doge", 0, "separable", formulation="other", num_hidden_layers=1, intermediate_size=32, **ATTENTION),
    row(
        "xLSTM",
        2,
        formulation="chunkwise",
        length=64,
        num_heads=2,
        num_hidden_layers=1,
        num_blocks=1,
        chunk_size=32,
        qk_dim_factor=0.5,
        v_dim_factor=1.0,
        mode="train",
        # The gradients of its gates nearly cancel: in fp32 it is chance whose rounding is the better one.
        dtype=torch.float64,
        norm_reduction_force_float32=False,
        return_last_states=True,
        chunkwise_kernel="chunkwise--native_autograd",
    ),
]

"""Mamba-2 of transformers, untouched, on its plain path: the mixer, and the hybrid models that share its scan."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from lacompile.testing import assert_rewritten

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "attn_implementation": "eager"}
MIXER = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_chunk_size": 32}
MODELS = {
    "Bamba": {"intermediate_size": 32, "num_hidden_layers": 3, "num_key_value_heads": 1, "attn_layer_indices": [1]}
    | MIXER,
    "FalconH1": {"intermediate_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 1, "mamba_d_ssm": 64} | MIXER,
    "GraniteMoeHybrid": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 32,
    }
    | MIXER,
    "NemotronH": {
        "intermediate_size": 32,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
        "num_key_value_heads": 1,
        "head_dim": 16,
        "ssm_state_size": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 32,
    },
    "Zamba2": {
        "num_hidden_layers": 2,
        "layers_block_type": ["mamba", "mamba"],
        "mamba_d_state": 16,
        "mamba_ngroups": 2,
        "n_mamba_heads": 4,
        "chunk_size": 32,
        "intermediate_size": 32,
    },
}


class Model(nn.Module):
    def __init__(self, name):
        super().__init__()
        config = getattr(transformers, f"{name}Config")(**SMALL, **MODELS[name])
        self.model = getattr(transformers, f"{name}ForCausalLM")(config)

    def forward(self, tokens):
        return self.model(tokens, use_cache=False).logits


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("length", [20, 32, 64, 100, 128])
def test_mixer(length):
    """One chunk and several, with and without padding; two groups of four heads."""
    sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 32}
    mixer = Mamba2Mixer(transformers.Mamba2Config(expand=2, **sizes), 0)
    assert_rewritten(mixer, torch.randn(2, length, 32), compiled=False)


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    tokens = torch.randint(0, 64, (2, 70))
    assert_rewritten(Model(name).eval(), tokens, count=2, compiled=False)

"""Counted weights against transformers' modules, for small models of every family that has a counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layout.families import BASE, FAMILIES, LATENT, MOE, V4
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kvshare.errors import ConfigError
from kvshare.layout import layout_from_config
from kvshare.layout.config import Fields
from kvshare.planner.parameters import count_parameters

COUNTED: dict[str, tuple[str, dict[str, Any]]] = {
    **FAMILIES,
    "deepseek_v3": ("deepseek_v3", LATENT),
    "deepseek_v4": ("deepseek_v4", V4),
    "llama with tied embeddings and biases": ("llama", {**BASE, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen2_moe": ("qwen2_moe", {**BASE, **MOE, "shared_expert_intermediate_size": 16, "mlp_only_layers": [1], "decoder_sparse_step": 2}),
    "olmo2": ("olmo2", BASE),
    "granite": ("granite", BASE),
    "laguna gated by element": (
        "laguna",
        {
            **BASE,
            **MOE,
            "gating": "per-element",
            "num_attention_heads_per_layer": [4, 8, 4, 8, 4, 8],
            "shared_expert_intermediate_size": 16,
        },
    ),
    "gemma4 with experts": (
        "gemma4_text",
        {**BASE, **MOE, "sliding_window": 16, "enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 0},
    ),
    "gemma4 with readers twice as wide": (
        "gemma4_text",
        {**BASE, "sliding_window": 16, "num_kv_shared_layers": 0, "use_double_wide_mlp": True, "vocab_size_per_layer_input": 64},
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_weights_equal_those_of_transformers_modules(name: str):
    model_type, config = COUNTED[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**config))
    named = {"model_type": model_type, **config}
    counted = count_parameters(Fields(named), layout_from_config(named))
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    tables = [p.numel() for key, p in model.named_parameters() if "embed_tokens_per_layer" in key]
    assert counted.per_layer_tables == sum(tables)


def test_a_family_without_a_counter_says_so():
    config = {"model_type": "openelm", "num_transformer_layers": 2, "num_query_heads": [4, 4], "num_kv_heads": [2, 2], "head_dim": 8}
    with pytest.raises(ConfigError, match="openelm has no counter"):
        count_parameters(Fields(config), layout_from_config(config))


def test_readers_of_an_owner_map_have_no_keys_and_values_to_project():
    mapped = {**BASE, "model_type": "llama", "kv_sharing": [0, 0, 2, 2, 4, 4]}
    plain = {**BASE, "model_type": "llama"}
    difference = (
        count_parameters(Fields(plain), layout_from_config(plain)).total
        - count_parameters(Fields(mapped), layout_from_config(mapped)).total
    )
    projected = {**mapped, "kv_sharing_projections": ["k", "v"]}
    added = (
        count_parameters(Fields(projected), layout_from_config(projected)).total
        - count_parameters(Fields(mapped), layout_from_config(mapped)).total
    )
    assert added == 3 * 2 * 8 * 8  # A_k of each reader's two heads; A_v is folded into its output projection
    assert difference == 3 * 2 * BASE["hidden_size"] * BASE["num_key_value_heads"] * BASE["head_dim"]

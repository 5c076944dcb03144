"""Gemma 4 in all its shapes equals transformers' logits in every way of running."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from parity.harness import assert_equals_oracle, load, oracle_logits, random_ids, randomise

S, F = "sliding_attention", "full_attention"
VOCAB = 160
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
KEY_IS_VALUE = {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"}
SHAPES: dict[str, dict[str, Any]] = {
    "E2B": {
        "num_hidden_layers": 15,
        "num_key_value_heads": 1,
        "layer_types": ([S] * 4 + [F]) * 3,
        "num_kv_shared_layers": 8,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 8,
    },
    "E4B": {
        "num_hidden_layers": 12,
        "num_key_value_heads": 2,
        "layer_types": ([S] * 3 + [F]) * 3,
        "num_kv_shared_layers": 4,
        "hidden_size_per_layer_input": 8,
        "attention_bias": True,
    },
    "26B-A4B": {
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "layer_types": ([S] * 2 + [F]) * 2,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        **KEY_IS_VALUE,
    },
    "31B": {
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "layer_types": ([S] * 2 + [F]) * 2,
        **KEY_IS_VALUE,
    },
}


def tiny_gemma4(name: str, directory: Path, **changes: Any) -> transformers.PreTrainedModel:
    """A random model of a released shape, saved to `directory`."""
    config = transformers.Gemma4TextConfig(**{**BASE, **SHAPES[name], **changes})
    oracle = randomise(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    oracle.save_pretrained(directory)
    return oracle


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    oracle = tiny_gemma4(name, tmp_path)
    ids = random_ids(VOCAB)
    assert_equals_oracle(load(tmp_path), oracle_logits(oracle, ids), ids)

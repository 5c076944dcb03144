"""Llama, Qwen 3, Qwen 2 and Mistral shapes equal transformers' logits in every way of running."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from parity.harness import assert_equals_oracle, load, oracle_logits, random_ids, randomise

BASE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

SHAPES = {
    "llama": (transformers.LlamaConfig, {"head_dim": 8, "tie_word_embeddings": False, "mlp_bias": True, "attention_bias": True}),
    "llama3 rope": (transformers.LlamaConfig, {"head_dim": 8, "rope_parameters": LLAMA3}),
    "smollm2": (transformers.LlamaConfig, {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": (transformers.MistralConfig, {"head_dim": 8, "sliding_window": 9, "tie_word_embeddings": False}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    kind, extra = SHAPES[name]
    oracle = randomise(transformers.AutoModelForCausalLM.from_config(kind(**{**BASE, **extra}), attn_implementation="eager"))
    oracle.save_pretrained(tmp_path)
    ids = random_ids(BASE["vocab_size"])
    assert_equals_oracle(load(tmp_path), oracle_logits(oracle, ids), ids)

"""A replayed step of these families is one native call: no operation of torch in front of its kernels, between or behind them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity.harness import Paged, random_ids, randomise

from kvshare import kernels
from kvshare.models import build_model
from kvshare.models.model import Model

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")
S, F = "sliding_attention", "full_attention"
VOCAB = 96
YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 16, "partial_rotary_factor": 0.5}
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
GEMMA: dict[str, Any] = {**BASE, "sliding_window": 8, "layer_types": [S, S, F] * 2, "final_logit_softcapping": 30.0}
SHARED: dict[str, Any] = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB - 10}
SPARSE: dict[str, Any] = {
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "num_global_key_value_heads": 1,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LAGUNA: dict[str, Any] = {
    "layer_types": [F, S, S] * 2,
    "sliding_window": 8,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "rope_parameters": {F: YARN, S: {"rope_type": "default", "rope_theta": 1e4}},
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama, head of its own": {**BASE, "model_type": "llama", "rope_scaling": LLAMA3, "tie_word_embeddings": False},
    "Qwen 2, biases": {**BASE, "model_type": "qwen2"},
    "Qwen 3": {**BASE, "model_type": "qwen3"},
    "Gemma 3": {**GEMMA, "model_type": "gemma3_text"},
    "Gemma 3n": {**GEMMA, **SHARED, "model_type": "gemma3n_text", "laurel_rank": 8, "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4},
    "Gemma 4 E2B": {**GEMMA, **SHARED, "model_type": "gemma4_text", "global_head_dim": 32, "use_double_wide_mlp": True},
    "Gemma 4 26B-A4B": {**GEMMA, **SPARSE, "model_type": "gemma4_text", "global_head_dim": 32},
    "Laguna": {**BASE, **LAGUNA, "model_type": "laguna"},
}


def random_model(config: dict[str, Any]) -> Model:
    model = build_model(config, torch.bfloat16).to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        if name in model.keep_float32:
            parameter.data = parameter.data.float()
    randomise(model)
    return model


@pytest.mark.parametrize("name", SHAPES)
def test_a_step_is_one_native_call(name: str) -> None:
    """And equal to the step itself, which `Paged.step` asserts."""
    paged = Paged(random_model(SHAPES[name]), 3, dtype=torch.bfloat16, precision="bf16")
    tokens = random_ids(VOCAB, sequences=3, tokens=24)  # some behind the per-layer table, and more than a window
    paged.step(list(tokens[:, :5]))
    for at in range(5, 24):
        paged.step(list(tokens[:, at : at + 1]))
    assert paged.decode_steps.describe() == "decode steps replayed in 1 native call"

"""Small configs of every family that transformers has, as keyword arguments of its configuration classes."""

from __future__ import annotations

from typing import Any

S, F = "sliding_attention", "full_attention"
BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
PATTERN = [S, F, S, F, S, F]
LATENT = {
    **BASE,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
V4 = {
    **{name: value for name, value in BASE.items() if name != "intermediate_size"},  # there another name of moe_intermediate_size
    "num_hidden_layers": 5,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 24,
    "o_lora_rank": 8,
    "o_groups": 2,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "index_n_heads": 4,
    "index_head_dim": 8,
    "index_topk": 4,
    "compress_ratios": [0, 128, 4, 128, 4],
    "hc_mult": 2,
    "num_hash_layers": 1,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", BASE),
    "qwen3": ("qwen3", BASE),
    "qwen2 behind max_window_layers": ("qwen2", {**BASE, "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 4}),
    "qwen3_moe": ("qwen3_moe", {**BASE, **MOE}),
    "mistral": ("mistral", {**BASE, "sliding_window": 16}),
    "mixtral": ("mixtral", {**BASE, "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("phi3", {**BASE, "sliding_window": 16}),
    "gpt_oss": ("gpt_oss", {**BASE, "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo3": ("olmo3", {**BASE, "sliding_window": 16}),
    "laguna": ("laguna", {**BASE, **MOE, "sliding_window": 16, "layer_types": PATTERN, "shared_expert_intermediate_size": 16}),
    "gemma2": ("gemma2", {**BASE, "sliding_window": 16}),
    "gemma3": ("gemma3_text", {**BASE, "sliding_window": 16, "sliding_window_pattern": 3}),
    "gemma3n": (
        "gemma3n_text",
        {
            **BASE,
            "sliding_window": 16,
            "layer_types": PATTERN,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "gemma4 with readers": (
        "gemma4_text",
        {
            **BASE,
            "sliding_window": 16,
            "layer_types": PATTERN,
            "num_kv_shared_layers": 2,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "gemma4 with keys that equal values": (
        "gemma4_text",
        {
            **BASE,
            "sliding_window": 16,
            "layer_types": PATTERN,
            "global_head_dim": 16,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 0,
        },
    ),
    "zaya": ("zaya", {**BASE, "num_experts": 4, "moe_intermediate_size": 16, "router_hidden_size": 8, "num_experts_per_tok": 1}),
    "zaya with windows": (
        "zaya",
        {
            **BASE,
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "router_hidden_size": 8,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 2,
            "layer_types": ["hybrid", "hybrid_sliding"],
            "sliding_window": 9,
            "cca_time0": 4,
            "cca_time1": 3,
        },
    ),
    "deepseek_v32": ("deepseek_v32", {**LATENT, "index_topk": 12, "index_head_dim": 16, "index_n_heads": 4}),
}

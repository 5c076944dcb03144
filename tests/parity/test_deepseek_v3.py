"""DeepSeek V3 and V3.2: attention over latents, with and without an indexer, equals transformers', which expands keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity.harness import assert_equals_oracle, chunked, load, oracle_logits, random_ids, randomise
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV32Config

from kvshare.errors import ConfigError
from kvshare.models.deepseek_v3 import DeepseekV3Config as Config

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-2,  # not that of the norms inside attention
}
INDEXED = {"index_topk": 5, "index_head_dim": 16, "index_n_heads": 32}  # with few heads transformers breaks ties by chance
YARN = {"rope_type": "yarn", "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.7, "original_max_position_embeddings": 16, "rope_theta": 1e4}

SHAPES = {
    "v3": (DeepseekV3Config, {}),
    "v3 yarn": (DeepseekV3Config, {"rope_parameters": YARN}),
    "v3 without a query rank": (DeepseekV3Config, {"q_lora_rank": None, "norm_topk_prob": False}),
    "v3.2": (DeepseekV32Config, INDEXED),
    "v3.2 yarn": (DeepseekV32Config, {**INDEXED, "rope_parameters": YARN}),
    "v3.2 never sparse": (DeepseekV32Config, {**INDEXED, "index_topk": 64, "index_n_heads": 4}),
}


def build(name: str, **changes: Any) -> Any:
    kind, own = SHAPES[name]
    config = kind(**{**BASE, **own, **changes})
    return randomise(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    oracle = build(name)
    oracle.save_pretrained(tmp_path)
    ids = random_ids(BASE["vocab_size"])
    assert_equals_oracle(load(tmp_path), oracle_logits(oracle, ids), ids)


def test_cache_is_the_latent_and_the_indexers_key(tmp_path: Path) -> None:
    build("v3.2").save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.layout.bytes(7) == 4 * 7 * 2 * ((32 + 8) + 16)
    ids = random_ids(BASE["vocab_size"])
    native = chunked(model, ids, [ids.shape[1]], precision="native")  # 8 bits and 32-bit scales; the plan is compared after each step
    assert torch.isfinite(native).all()


@pytest.mark.parametrize(("field", "value"), [("rope_interleave", False), ("attention_bias", True), ("scoring_func", "softmax")])
def test_what_is_not_known_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        Config.read({**BASE, field: value})

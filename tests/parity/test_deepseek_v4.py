"""DeepSeek V4: windows, CSA and HCA entries, hyper-connections and hashed experts equal transformers' in every way of running."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity.harness import assert_equals_oracle, load, oracle_logits, random_ids, randomise
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"
BASE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "num_experts_per_tok": 2,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "max_position_embeddings": 1024,
    "sliding_window": 8,
    "compress_ratios": [0, 0, 4, 128, 4, 128, 4, 0],  # the last entry is the draft layer's
    "compress_rates": {CSA: 4, HCA: 16},
    "num_hash_layers": 3,
    "o_groups": 2,
    "o_lora_rank": 12,
    "index_n_heads": 32,  # with few heads all of them are often silent, and transformers breaks the ties by chance
    "index_head_dim": 16,
    "index_topk": 3,
    "rope_scaling": {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 64},
}
TOKENS = 73


def build(**changes: Any) -> Any:
    config = DeepseekV4Config(**{**BASE, **changes})
    config._attn_implementation = "eager"
    model: Any = randomise(DeepseekV4ForCausalLM(config))
    generator = torch.Generator().manual_seed(7)
    for layer in model.model.layers:
        if hasattr(layer.mlp.gate, "tid2eid"):
            order = torch.rand(config.vocab_size, config.n_routed_experts, generator=generator).argsort(dim=1)
            layer.mlp.gate.tid2eid.copy_(order[:, : config.num_experts_per_tok])
    return model


SHAPES = {
    "flash": {},
    "pro": {"compress_ratios": [128, 128, 4, 128, 4, 128, 4, 0]},
    "never sparse": {"index_topk": 64, "index_n_heads": 4},
    "plain rope, ends in csa": {"rope_scaling": None, "num_hidden_layers": 3, "num_hash_layers": 3, "compress_ratios": [128, 0, 4]},
}


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    oracle = build(**SHAPES[name])
    oracle.save_pretrained(tmp_path)
    ids = random_ids(BASE["vocab_size"], tokens=TOKENS)
    reference = torch.cat([oracle_logits(oracle, row[None]) for row in ids])  # one sequence at a time: its compressor ignores padding
    assert_equals_oracle(load(tmp_path), reference, ids)

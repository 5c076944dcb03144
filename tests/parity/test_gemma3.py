"""Gemma 3 equals transformers' logits in every way of running, from configs new and old."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parity.harness import assert_equals_oracle, greedy, load, one_shot, oracle_greedy, oracle_logits, random_ids, randomise

from kvshare.errors import ConfigError

S, F = "sliding_attention", "full_attention"
VOCAB = 160
SCALED = {
    F: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    S: {"rope_type": "default", "rope_theta": 1e4},
}
SHAPES: dict[str, dict[str, Any]] = {
    "270M": {"num_key_value_heads": 1, "query_pre_attn_scalar": 16},
    "4B": {"num_key_value_heads": 2, "query_pre_attn_scalar": 16, "rope_parameters": SCALED},
    "27B": {"num_key_value_heads": 2, "query_pre_attn_scalar": 21, "rope_parameters": SCALED, "final_logit_softcapping": 30.0},
}


def tiny_gemma3(name: str, directory: Path, **changes: Any) -> transformers.PreTrainedModel:
    """A random model of a released shape, saved to `directory`."""
    base = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "head_dim": 16,
        "sliding_window": 8,
        "max_position_embeddings": 512,
        "layer_types": [S, S, F, S, S, F, S],
    }
    config = transformers.Gemma3TextConfig(**{**base, **SHAPES[name], **changes})
    oracle = randomise(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    oracle.save_pretrained(directory)
    return oracle


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    oracle = tiny_gemma3(name, tmp_path)
    ids = random_ids(VOCAB)
    assert_equals_oracle(load(tmp_path), oracle_logits(oracle, ids), ids)
    prompts = ids[:, :20]
    assert torch.equal(greedy(load(tmp_path), prompts, 16), oracle_greedy(oracle, prompts, 16))


def test_older_config_is_the_same_model(tmp_path: Path) -> None:
    """Released configs have a pattern, two thetas and a scaling where newer ones have lists and `rope_parameters`."""
    tiny_gemma3("4B", tmp_path, layer_types=[S, S, F, S, S, F, S])
    ids = random_ids(VOCAB)
    new = one_shot(load(tmp_path), ids)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("layer_types", "rope_parameters"):
        del config[name]
    config |= {
        "sliding_window_pattern": 3,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    assert torch.equal(one_shot(load(tmp_path), ids), new)


@pytest.mark.parametrize("field", ["use_bidirectional_attention", "attn_logit_softcapping"])
def test_what_does_not_run_is_refused(field: str, tmp_path: Path) -> None:
    tiny_gemma3("4B", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: True}))
    with pytest.raises(ConfigError, match=field):
        load(tmp_path)

"""Gemma 3n equals transformers' logits in every way of running."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from parity.harness import Paged, assert_equals_oracle, greedy, load, one_shot, oracle_greedy, oracle_logits, random_ids, randomise

S, F = "sliding_attention", "full_attention"
VOCAB, ENTRIES = 176, 160


def tiny_gemma3n(directory: Path, **changes: Any) -> transformers.PreTrainedModel:
    """A random model of E2B's structure, saved to `directory`; its per-layer table is shorter than its vocabulary, as released ones are."""
    base = {
        "vocab_size": VOCAB,
        "vocab_size_per_layer_input": ENTRIES,
        "hidden_size": 64,
        "hidden_size_per_layer_input": 8,
        "intermediate_size": 96,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ([S] * 3 + [F]) * 3,
        "num_kv_shared_layers": 4,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.95] * 4 + [0.0] * 8,
        "max_position_embeddings": 512,
    }
    config = transformers.Gemma3nTextConfig(**{**base, **changes})
    oracle = randomise(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    oracle.save_pretrained(directory)
    return oracle


def test_logits_equal_transformers(tmp_path: Path) -> None:
    oracle = tiny_gemma3n(tmp_path)
    ids = random_ids(VOCAB)
    assert (ids >= ENTRIES).any()  # tokens behind the per-layer table take its row 0
    assert_equals_oracle(load(tmp_path), oracle_logits(oracle, ids), ids)


def test_without_output_scale_and_sparsity(tmp_path: Path) -> None:
    oracle = tiny_gemma3n(tmp_path, altup_correct_scale=False, activation_sparsity_pattern=[0.0] * 12)
    ids = random_ids(VOCAB)
    torch.testing.assert_close(one_shot(load(tmp_path), ids), oracle_logits(oracle, ids), atol=2e-4, rtol=0)


def test_greedy_tokens_equal_generate(tmp_path: Path) -> None:
    oracle = tiny_gemma3n(tmp_path)
    prompts = random_ids(VOCAB, tokens=20)
    assert torch.equal(greedy(load(tmp_path), prompts, 16), oracle_greedy(oracle, prompts, 16))


def test_tail_runs_on_the_rows_that_are_asked_for(tmp_path: Path) -> None:
    tiny_gemma3n(tmp_path)
    model, ids = load(tmp_path), random_ids(VOCAB)
    everything = one_shot(model, ids).flatten(0, 1)
    seen: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    keep = [0, 11, 40, 41, 80]
    torch.testing.assert_close(Paged(model, 2).step(list(ids), keep=keep), everything[keep], atol=2e-5, rtol=0)
    assert seen == [82] * 7 + [5] * 5


def test_older_config_is_the_same_model(tmp_path: Path) -> None:
    """Released configs have two thetas where newer ones have `rope_parameters`, and one feed-forward width for each layer."""
    tiny_gemma3n(tmp_path)
    ids = random_ids(VOCAB)
    new = one_shot(load(tmp_path), ids)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "intermediate_size": [96] * 12}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3n", "text_config": config}))
    assert torch.equal(one_shot(load(tmp_path), ids), new)

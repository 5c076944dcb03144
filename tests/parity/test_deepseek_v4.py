"""DeepSeek V4: windows, CSA and HCA entries, hyper-connections and hashed experts equal transformers' in every way of running."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.harness import assert_equals_oracle, chunked, load, one_shot, oracle_logits, random_ids, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from kvshare.cache.codecs.deepseek import BlockFloatCodec, hadamard
from kvshare.cache.step import DenseStep
from kvshare.layers.hyper_connections import sinkhorn
from kvshare.layers.indexer import best_rows

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
    "swiglu_limit": 0.5,  # small enough to clamp something
    "o_lora_rank": 12,
    "index_n_heads": 32,  # with few heads all of them are often silent, and transformers breaks the ties by chance
    "index_head_dim": 16,
    "index_topk": 3,
    "rope_scaling": {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 64},
}
TOKENS = 73


def build(**changes: Any) -> Any:
    config = DeepseekV4Config(**deepcopy({**BASE, **changes}))
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


def reference_logits(oracle: Any, ids: Tensor) -> Tensor:
    """One sequence at a time: transformers' compressor ignores the attention mask, so that a padded batch is wrong."""
    return torch.cat([oracle_logits(oracle, row[None]) for row in ids])


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    oracle = build(**SHAPES[name])
    oracle.save_pretrained(tmp_path)
    ids = random_ids(BASE["vocab_size"], tokens=TOKENS, seed=2)  # no two experts or entries are nearly tied for these
    assert_equals_oracle(load(tmp_path), reference_logits(oracle, ids), ids)


def test_loads_released_names_and_says_that_the_draft_layer_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    oracle = build()
    oracle.save_pretrained(tmp_path)
    ids = random_ids(BASE["vocab_size"], tokens=TOKENS)
    expected = one_shot(load(tmp_path), ids)
    tensors = {released_name(name): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert {"embed.weight", "hc_head_fn", "layers.2.attn.kv_norm.weight", "layers.2.attn.indexer.compressor.ape"} <= tensors.keys()
    save_file({**tensors, "mtp.0.enorm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "deepseek_v4", "rope_theta": 10_000, "routed_scaling_factor": 1.5, **BASE})
    )
    assert torch.equal(one_shot(load(tmp_path), ids), expected)
    assert "mtp.0.enorm.weight" in caplog.text


def released_name(saved: str) -> str:
    name = saved.removeprefix("model.").replace("hc_head.hc_", "hc_head_").replace("embed_tokens", "embed")
    return name.replace(".attn.norm.", ".attn.kv_norm.")


def test_tied_entries_are_chosen_alike_in_every_way_of_running(tmp_path: Path) -> None:
    """With 4 index heads many scores are exactly 0, and the last place among the chosen is often tied."""
    build(index_n_heads=4).save_pretrained(tmp_path)
    model = load(tmp_path)
    ids = random_ids(BASE["vocab_size"], tokens=TOKENS)
    assert_equals_oracle(model, one_shot(model, ids), ids)


def test_best_rows_breaks_ties_by_place_whatever_stands_behind() -> None:
    scores = torch.tensor([[0.0, -0.0, 2.0, 0.0, -1.0, -0.0, 0.0, 3.0]])
    assert best_rows(scores, torch.tensor([8]), 4).tolist() == [[0, 1, 2, 7]]
    for width in range(3, 8):
        assert best_rows(scores[:, :width], torch.tensor([width]), 3)[0].tolist() == [0, 1, 2]
    assert best_rows(scores, torch.tensor([2]), 4).tolist() == [[0, 1, -1, -1]]  # what is not complete yet is never chosen
    assert best_rows(scores[:, :2], torch.tensor([2]), 4).tolist() == [[0, 1, -1, -1]]


def test_mixing_matrix_is_doubly_stochastic() -> None:
    mixed = sinkhorn(torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0)).softmax(-1), 20, 1e-6)
    assert torch.allclose(mixed.sum(-1), torch.ones(5, 4), atol=1e-4)
    assert torch.allclose(mixed.sum(-2), torch.ones(5, 4), atol=1e-4)


def test_native_rows_hold_what_published_rounding_leaves(tmp_path: Path) -> None:
    """A cache of float32 rows that were rounded and one of native rows, of a quarter of the bytes, give the same logits."""
    build().save_pretrained(tmp_path)
    ids = random_ids(BASE["vocab_size"], tokens=TOKENS)
    exact = one_shot(load(tmp_path), ids)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "cache_rounding": "published"}))
    model = load(tmp_path)
    for sizes in ([TOKENS], [17, 1, 3, 1, TOKENS - 22], [1] * TOKENS):
        rounded = chunked(model, ids, sizes)
        # the two may be added in different orders; a number on the edge of two steps of the rounding then goes the other way
        assert (chunked(model, ids, sizes, precision="native") - rounded).abs().mean() < 1e-4
        assert (rounded - exact).abs().mean() > 0.01


def test_published_rounding_is_in_hadamard_space_for_the_indexer_only(tmp_path: Path) -> None:
    """In the first layer, where both models still have the same inputs."""
    build(compress_ratios=[4] * 7).save_pretrained(tmp_path)
    ids = random_ids(BASE["vocab_size"], 1, TOKENS)[0]
    config = json.loads((tmp_path / "config.json").read_text())
    kept = []
    for rounding in ("none", "published"):
        (tmp_path / "config.json").write_text(json.dumps({**config, "cache_rounding": rounding}))
        model = load(tmp_path)
        step = DenseStep(model.layout, [TOKENS])
        model(ids, step)
        kept.append({stream.name: step.rows(0, stream.name, 0) for stream in model.layout.layers[0].streams})
    plain, rounded = kept
    streams = {stream.name: stream for stream in model.layout.layers[0].streams}
    for name, rows in {**plain, "index": hadamard(plain["index"])}.items():
        native = streams[name].native
        assert native is not None
        assert torch.equal(rounded[name], BlockFloatCodec(native).rounded(rows))

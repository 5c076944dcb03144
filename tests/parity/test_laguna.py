"""Laguna equals transformers in every way of running, and loads what poolside released and what transformers saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parity.harness import assert_equals_oracle, greedy, load, oracle_greedy, oracle_logits, random_ids, randomise

from kvshare.errors import ConfigError
from kvshare.layout import layout_from_config
from kvshare.models import build_model
from kvshare.models.laguna import LagunaConfig
from kvshare.planner.models import resolve

SLIDING, FULL = "sliding_attention", "full_attention"
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 16,
    "beta_slow": 1.0,
    "beta_fast": 64.0,
    "attention_factor": 1.3465735902799727,
    "partial_rotary_factor": 0.5,
}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_attention_heads_per_layer": [4, 6, 6, 6, 4],
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_types": [FULL, SLIDING, SLIDING, SLIDING, FULL],
    "sliding_window": 8,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "moe_routed_scaling_factor": 2.5,
    "gating": "per-head",
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "rope_parameters": {FULL: YARN, SLIDING: PLAIN},
}
SHAPES: dict[str, dict[str, Any]] = {
    "heads by layer, gate per head": {},
    "all full, gate per element": {
        "layer_types": [FULL] * 5,
        "num_attention_heads_per_layer": None,
        "gating": "per-element",
        "rope_parameters": {FULL: YARN},
    },
    "gate true": {"gating": True},
    "yarn without its factor": {"rope_parameters": {FULL: {k: v for k, v in YARN.items() if k != "attention_factor"}, SLIDING: PLAIN}},
    "soft-capped router, biases, tied head": {"moe_router_logit_softcapping": 0.7, "attention_bias": True, "tie_word_embeddings": True},
    "sparse first layer": {"mlp_layer_types": ["sparse", "dense", "sparse", "dense", "sparse"]},
}


def oracle_of(seed: int = 0, **extra: Any) -> torch.nn.Module:
    config = transformers.LagunaConfig(**{**BASE, **extra})
    return randomise(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"), seed)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape: str, tmp_path: Path) -> None:
    oracle = oracle_of(**SHAPES[shape])
    oracle.save_pretrained(tmp_path)
    ids = random_ids(BASE["vocab_size"])
    assert_equals_oracle(load(tmp_path), oracle_logits(oracle, ids), ids)


def test_greedy_tokens_equal_generate(tmp_path: Path) -> None:
    oracle = oracle_of()
    oracle.save_pretrained(tmp_path)
    prompts = random_ids(BASE["vocab_size"], sequences=3, tokens=19)
    assert torch.equal(greedy(load(tmp_path), prompts, 16), oracle_greedy(oracle, prompts, 16))


def test_released_and_resaved_checkpoints_give_the_same_model(tmp_path: Path) -> None:
    """Released files name every expert; `save_original_format=False` keeps transformers' stacked tensors and other names."""
    oracle = oracle_of()
    oracle.save_pretrained(tmp_path / "released")
    oracle.save_pretrained(tmp_path / "saved", save_original_format=False)
    released, saved = (load(tmp_path / name).state_dict() for name in ("released", "saved"))
    assert released.keys() == saved.keys()
    assert all(torch.equal(released[name], saved[name]) for name in released)


def test_the_correction_bias_chooses_experts_but_does_not_weigh_them(tmp_path: Path) -> None:
    """With a bias that decides every choice, logits still follow the plain scores of the chosen experts."""
    oracle = oracle_of()
    for layer in oracle.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.data = torch.arange(8.0)
    oracle.save_pretrained(tmp_path)
    ids = random_ids(BASE["vocab_size"])
    model = load(tmp_path)
    chosen, weights = model.blocks[1].mlp.router(torch.randn(7, 48))
    assert chosen.sort().values.tolist() == [[5, 6, 7]] * 7
    torch.testing.assert_close(weights.sum(-1), torch.ones(7))
    assert_equals_oracle(model, oracle_logits(oracle, ids), ids)


def test_the_correction_bias_stays_in_float32(tmp_path: Path) -> None:
    """In bfloat16 a bias of 1.001 and one of 1 would be equal, and the choice another."""
    oracle_of().save_pretrained(tmp_path)
    model = load(tmp_path, torch.bfloat16)
    assert model.blocks[1].mlp.router.correction.dtype == torch.float32
    assert model.blocks[1].mlp.router.scores.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("gating", "per_head"), [("per-head", True), ("per-element", False), (True, True), (None, True)])
def test_gate_granularity_is_what_the_config_says(gating: object, per_head: bool) -> None:
    assert LagunaConfig.read({**BASE, "gating": gating}).gate_per_head is per_head


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gating", "per-layer"),
        ("gating", False),
        ("moe_apply_router_weight_on_input", True),
        ("hidden_act", "gelu"),
        ("mlp_layer_types", ["dense"] * 4 + ["wide"]),
        ("num_attention_heads_per_layer", [4, 6]),
        ("num_experts_per_tok", 9),
        ("rope_parameters", {FULL: YARN}),
    ],
)
def test_what_is_not_known_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        LagunaConfig.read({**BASE, field: value})
    assert error.value.field == field


@pytest.mark.parametrize("context", [0, 1, 7, 8, 9, 31, 32, 33, 64])
def test_windows_hold_the_last_rows_and_full_layers_all(context: int) -> None:
    layout = layout_from_config({**BASE, "model_type": "laguna"})
    row = 2 * 2 * 16 * 4  # keys and values, 2 heads of 16 numbers, fp32
    assert layout.bytes(context, precision="fp32") == row * (2 * context + 3 * min(context, 8))


@pytest.mark.parametrize(("name", "billions"), [("Laguna-XS.2", 33.44), ("Laguna-XS-2.1", 33.44), ("Laguna-S-2.1", 117.6)])
def test_released_configs_build_to_their_advertised_size(name: str, billions: float) -> None:
    model = build_model(resolve(name).config, torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)
    assert model.weight_sources().keys() == model.state_dict().keys()

"""ZAYA1 equals transformers in every way of running, from native and from legacy checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parity.harness import Paged, assert_equals_oracle, greedy, load, one_shot, oracle_greedy, oracle_logits, random_ids, randomise
from safetensors.torch import save_file
from torch import Tensor

from kvshare.cache.paged_step import PagedStep
from kvshare.errors import ConfigError
from kvshare.layout import layout_from_config
from kvshare.models import build_model
from kvshare.models.zaya_config import ZayaConfig
from kvshare.planner.models import resolve

FULL, SLIDING = "hybrid", "hybrid_sliding"
BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "router_hidden_size": 16,
    "max_position_embeddings": 512,
}
SHAPES: dict[str, dict[str, Any]] = {
    "8B": {},
    "74B: windows": {"layer_types": [FULL, SLIDING] * 2, "sliding_window": 8},
    "longer convolutions": {"cca_time0": 4, "cca_time1": 3},
    "biases": {"attention_bias": True, "lm_head_bias": True},
    "untied, one group": {"tie_word_embeddings": False, "num_attention_heads": 6, "num_key_value_heads": 1},
}


def oracle_of(**extra: Any) -> torch.nn.Module:
    config = transformers.ZayaConfig(**{**BASE, **extra})
    return randomise(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape: str, tmp_path: Path) -> None:
    oracle = oracle_of(**SHAPES[shape])
    oracle.save_pretrained(tmp_path)
    ids = random_ids(BASE["vocab_size"], sequences=3)
    assert_equals_oracle(load(tmp_path), oracle_logits(oracle, ids), ids)


def test_greedy_tokens_equal_generate(tmp_path: Path) -> None:
    oracle = oracle_of(layer_types=[FULL, SLIDING] * 2, sliding_window=8)
    oracle.save_pretrained(tmp_path)
    prompts = random_ids(BASE["vocab_size"], sequences=3, tokens=19)
    assert torch.equal(greedy(load(tmp_path), prompts, 16), oracle_greedy(oracle, prompts, 16))


SKIP_BIAS = 0.1


def test_the_skip_bias_is_what_the_file_holds(tmp_path: Path) -> None:
    """transformers sets the last balancing bias to -1 when it loads. Here it sends a part of the tokens past all experts, and is kept."""
    oracle = oracle_of()
    for layer in oracle.model.layers:
        layer.mlp.gate.balancing_biases.copy_(torch.tensor([0.0] * BASE["num_experts"] + [SKIP_BIAS]))
    oracle.save_pretrained(tmp_path)
    ids = random_ids(BASE["vocab_size"])
    reference = oracle_logits(oracle, ids)  # from memory: a reloaded oracle has lost the bias
    reloaded = oracle_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager"), ids)
    assert (reloaded - reference).abs().max() > 0.01, "the trap is gone: transformers keeps the bias now"
    model = load(tmp_path)
    assert [float(block.router.balance[-1]) for block in model.blocks] == pytest.approx([SKIP_BIAS] * 4)
    assert_equals_oracle(model, reference, ids)
    chosen: list[Tensor] = []
    for block in model.blocks:
        block.router.register_forward_hook(lambda module, inputs, outputs: chosen.append(outputs[0]))
    one_shot(model, ids)
    skipped = (torch.stack(chosen) == BASE["num_experts"]).float().mean()
    assert 0.05 < skipped < 0.95, "some tokens must skip the experts and some must not"


def legacy_config(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that Zyphra's own code used: attention and experts are counted as layers of their own."""
    windows = [config["sliding_window"] - 1 if kind == SLIDING else 0 for kind in config["layer_types"]]
    return {
        "model_type": "zaya",
        "cca": True,
        "activation_func": "swiglu",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "ffn_hidden_size": 2 * config["moe_intermediate_size"],
        "head_dim": config["head_dim"],
        "hidden_size": config["hidden_size"],
        "mamba_cache_dtype": "float32",
        "max_position_embeddings": config["max_position_embeddings"],
        "moe_router_topk": 1,
        "norm_epsilon": config["rms_norm_eps"],
        "num_attention_heads": config["num_attention_heads"],
        "num_experts": config["num_experts"],
        "num_hidden_layers": 2 * config["num_hidden_layers"],
        "num_key_value_heads": config["num_key_value_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "partial_rotary_factor": 0.5,
        "residual_in_fp32": True,
        "rope_scaling": False,
        "rope_theta": config["rope_parameters"][FULL]["rope_theta"],
        "scale_residual_merge": True,
        "swa_layers": [tokens for window in windows for tokens in (window, 0)],  # tokens before the query
        "vocab_size": config["vocab_size"],
        "zaya_mlp_expansion": config["router_hidden_size"],
        "zaya_use_eda": True,
        "zaya_use_mod": True,
    }


LEGACY_ATTENTION = {
    "input_layernorm.weight": "input_norm.weight",
    "self_attn.o_proj.weight": "self_attn.o_proj.weight",
    "self_attn.qkv_proj.q_proj.weight": "self_attn.qkv.linear_q.weight",
    "self_attn.qkv_proj.k_proj.weight": "self_attn.qkv.linear_k.weight",
    "self_attn.qkv_proj.v_proj_current.weight": "self_attn.qkv.val_proj1.weight",
    "self_attn.qkv_proj.v_proj_delayed.weight": "self_attn.qkv.val_proj2.weight",
    "self_attn.qkv_proj.conv_qk_depthwise.weight": "self_attn.qkv.conv_qk.0.weight",
    "self_attn.qkv_proj.conv_qk_depthwise.bias": "self_attn.qkv.conv_qk.0.bias",
    "self_attn.qkv_proj.conv_qk_grouped.weight": "self_attn.qkv.conv_qk.1.weight",
    "self_attn.qkv_proj.conv_qk_grouped.bias": "self_attn.qkv.conv_qk.1.bias",
    "self_attn.qk_norm.temp": "self_attn.qkv.temp",
}
LEGACY_EXPERTS = {
    "post_attention_layernorm.weight": "input_norm.weight",
    "mlp.gate.down_proj.weight": "zaya_block.router.down_proj.weight",
    "mlp.gate.down_proj.bias": "zaya_block.router.down_proj.bias",
    "mlp.gate.router_states_scale": "zaya_block.router.router_states_scale",
    "mlp.gate.balancing_biases": "zaya_block.router.balancing_biases",
    "mlp.gate.router_mlp.norm.weight": "zaya_block.router.rmsnorm_eda.weight",
    "mlp.gate.router_mlp.fc1.weight": "zaya_block.router.router_mlp.0.weight",
    "mlp.gate.router_mlp.fc1.bias": "zaya_block.router.router_mlp.0.bias",
    "mlp.gate.router_mlp.fc2.weight": "zaya_block.router.router_mlp.2.weight",
    "mlp.gate.router_mlp.fc2.bias": "zaya_block.router.router_mlp.2.bias",
    "mlp.gate.router_mlp.out_proj.weight": "zaya_block.router.router_mlp.4.weight",
}


def legacy_tensors(native: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """A native state dict in the legacy layout."""
    legacy = {"model.embed_tokens.weight": native["model.embed_tokens.weight"], "model.final_norm.weight": native["model.norm.weight"]}
    for kind in ("scale", "bias"):
        legacy[f"model.layers.0.res_scale.hidden_states_{kind}"] = native[f"model.input_hidden_states_{kind}"]
    for name, tensor in native.items():
        if not name.startswith("model.layers."):
            continue
        _, _, index, part = name.split(".", 3)
        attention, experts, following = (f"model.layers.{2 * int(index) + offset}" for offset in range(3))
        if part in LEGACY_ATTENTION:
            legacy[f"{attention}.{LEGACY_ATTENTION[part]}"] = tensor
        elif part in LEGACY_EXPERTS:
            legacy[f"{experts}.{LEGACY_EXPERTS[part]}"] = tensor
        elif part.startswith("post_attention_residual_scale."):
            legacy[f"{experts}.res_scale.{part.split('.')[1]}"] = tensor
        elif part.startswith("post_mlp_residual_scale."):
            legacy[f"{following if int(index) + 1 < num_layers else 'model'}.res_scale.{part.split('.')[1]}"] = tensor
        elif part.startswith("mlp.experts."):
            stage = {"gate_up_proj": "linear_fc1", "down_proj": "linear_fc2"}[part.removeprefix("mlp.experts.")]
            for expert, matrix in enumerate(tensor):
                legacy[f"{experts}.zaya_block.experts.local_experts.{expert}.{stage}.weight"] = matrix
        else:
            raise AssertionError(name)
    return {name: tensor.clone() for name, tensor in legacy.items()}


def test_a_legacy_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    oracle = oracle_of(layer_types=[FULL, SLIDING, FULL, SLIDING], sliding_window=8)
    oracle.save_pretrained(tmp_path / "native")
    (tmp_path / "legacy").mkdir()
    native = {name: tensor for name, tensor in oracle.state_dict().items() if name != "lm_head.weight"}
    save_file(legacy_tensors(native, BASE["num_hidden_layers"]), tmp_path / "legacy" / "model.safetensors")
    (tmp_path / "legacy" / "config.json").write_text(json.dumps(legacy_config(oracle.config.to_dict())))
    ids = random_ids(BASE["vocab_size"])
    from_native, from_legacy = load(tmp_path / "native"), load(tmp_path / "legacy")
    assert torch.equal(one_shot(from_native, ids), one_shot(from_legacy, ids))
    assert_equals_oracle(from_legacy, oracle_logits(oracle, ids), ids)


@pytest.mark.parametrize("context", [1, 2, 3, 7, 8, 9, 31, 32, 33])
def test_planned_bytes_are_rows_and_two_states_a_layer(context: int) -> None:
    layout = layout_from_config({**BASE, "model_type": "zaya", "layer_types": [FULL, SLIDING] * 2, "sliding_window": 8})
    rows = 2 * context + 2 * min(context, 8)  # two full layers, two windows
    conv, delayed = (4 + 2) * 16 * 2, 2 * 16 // 2
    assert layout.bytes(context, precision="bf16") == 2 * (rows * 2 * 2 * 16 + 4 * (conv + delayed))


def test_states_are_what_transformers_caches(tmp_path: Path) -> None:
    """The tail is of vectors before the convolution; what is delayed is the projected value, not the hidden state."""
    oracle = oracle_of()
    oracle.save_pretrained(tmp_path)
    ids = random_ids(BASE["vocab_size"], sequences=1, tokens=11)
    cache = transformers.DynamicCache(config=oracle.config)
    with torch.no_grad():
        oracle(input_ids=ids, past_key_values=cache)
    paged = Paged(load(tmp_path), 1)
    for part in ids[0].split([1, 7, 3]):
        paged.step([part])
    after = PagedStep(paged.cache, paged.sequences, [0])
    for index in range(BASE["num_hidden_layers"]):
        torch.testing.assert_close(after.state(index, "conv"), cache.layers[index].conv_states[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(after.state(index, "delayed_value"), cache.layers[index].recurrent_states[0], atol=1e-5, rtol=1e-5)


def test_bfloat16_keeps_the_residual_stream_in_float32(tmp_path: Path) -> None:
    """And so is no further from float32 than transformers in bfloat16 is."""
    oracle = oracle_of()
    for layer in oracle.model.layers:
        layer.mlp.gate.balancing_biases[-1] = -1.0  # the one value that transformers loads as it was saved
    oracle.to(torch.bfloat16).save_pretrained(tmp_path)
    ids = random_ids(BASE["vocab_size"])
    exact, rounded = (
        oracle_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager"), ids)
        for dtype in (torch.float32, torch.bfloat16)
    )
    model = load(tmp_path, torch.bfloat16)
    assert model.blocks[0].after_mlp.residual_scale.dtype == model.blocks[0].router.balance.dtype == torch.float32
    streams: list[torch.dtype] = []
    model.blocks[1].after_attention.register_forward_hook(lambda module, inputs, output: streams.extend([inputs[1].dtype, output[0].dtype]))
    theirs, ours = divergence(exact, rounded), divergence(exact, one_shot(model, ids))
    assert set(streams) == {torch.float32}
    assert ours < 1.5 * theirs


def divergence(reference: Tensor, logits: Tensor) -> float:
    """Mean KL divergence in nats: [..., vocab] each."""
    p, q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_rotation_falls_back_to_the_two_released_frequencies() -> None:
    """Released files hold both entries and a stray `rope_type`; either may be left out."""
    stray = {FULL: {"rope_theta": 5e6, "partial_rotary_factor": 0.5, "rope_type": "default"}, "rope_type": "default"}
    for given in ({}, {"rope_parameters": stray}):
        rope = ZayaConfig.read({**BASE, **given}).rope
        assert [rope[kind]["rope_theta"] for kind in (FULL, SLIDING)] == [5e6, 1e4]
        assert [rope[kind]["partial_rotary_factor"] for kind in (FULL, SLIDING)] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("field", "value"), [("num_experts_per_tok", 2), ("hidden_act", "gelu"), ("num_experts", None), ("rope_parameters", [1])]
)
def test_what_is_not_known_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        ZayaConfig.read({**BASE, field: value})
    assert error.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("zaya_use_mod", False),
        ("zaya_use_eda", False),
        ("scale_residual_merge", False),
        ("clamp_temp", True),
        ("add_bias_linear", True),
        ("activation_func", "gelu"),
        ("rope_scaling", {"factor": 2.0}),
    ],
)
def test_legacy_variants_that_no_release_uses_are_refused(field: str, value: object) -> None:
    config = legacy_config(transformers.ZayaConfig(**BASE).to_dict())
    with pytest.raises(ConfigError) as error:
        ZayaConfig.read({**config, field: value})
    assert error.value.field == field


@pytest.mark.parametrize("name", ["ZAYA1-8B", "ZAYA1-8B-legacy"])
def test_released_configs_build_to_their_advertised_size(name: str) -> None:
    model = build_model(resolve(name).config, torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(8.84e9, rel=1e-3)
    assert model.weight_sources().keys() == model.state_dict().keys()

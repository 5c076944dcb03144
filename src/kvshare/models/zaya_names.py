"""Where ZAYA1's parameters lie in checkpoints, native and legacy.

The legacy schema counts attention and experts as layers of their own: block i is its layers 2i and 2i + 1. What it stores as the
`res_scale` of a layer is applied to the sum in front of that layer, so a block's scales lie one legacy layer further on.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from kvshare.checkpoints.source import Source
from kvshare.layers.causal_conv import depthwise_weight, grouped_bias, grouped_weight
from kvshare.models.zaya_config import ZayaConfig


def zaya_sources(parameters: Iterable[str], config: ZayaConfig) -> dict[str, Source]:
    """For every parameter of the model, by name, where it comes from."""
    combines = {
        "attention.conv.depthwise": depthwise_weight,
        "attention.conv.grouped": grouped_weight,
        "attention.conv.grouped_bias": partial(grouped_bias, group_width=config.head_dim),
    }
    sources = {}
    for name in parameters:
        if name in _MODEL_NAMES:
            sources[name] = Source((_MODEL_NAMES[name][config.legacy],))
            continue
        _, index, part = name.split(".", 2)
        if part in _EXPERTS:
            sources[name] = _experts(int(index), part, config)
            continue
        further, native, legacy = _places(part)
        if config.legacy:
            prefix = _legacy_prefix(2 * int(index) + further, config.num_layers)
            sources[name] = Source(tuple(prefix + each for each in legacy), combines.get(part))
        else:
            sources[name] = Source(tuple(f"model.layers.{index}.{each}" for each in native), combines.get(part))
    return sources


def _experts(index: int, part: str, config: ZayaConfig) -> Source:
    """All experts of a block: one tensor, or in the legacy schema one for each expert."""
    native, legacy = _EXPERTS[part]
    if not config.legacy:
        return Source((f"model.layers.{index}.mlp.experts.{native}",))
    experts = f"model.layers.{2 * index + 1}.zaya_block.experts.local_experts"
    return Source(tuple(f"{experts}.{expert}.{legacy}.weight" for expert in range(config.num_experts)), stack=config.num_experts)


def _legacy_prefix(layer: int, num_blocks: int) -> str:
    """Behind the last legacy layer, `res_scale` lies beside the final norm."""
    return "model." if layer == 2 * num_blocks else f"model.layers.{layer}."


def _places(part: str) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    """How many legacy layers behind the block's first a parameter lies, its native and its legacy names."""
    if part in _TENSORS:
        further, native, legacy = _TENSORS[part]
        return further, (native,), (legacy,)
    module, kind = part.rsplit(".", 1)
    further, native, legacy = _MODULES[module]
    return further, tuple(f"{name}.{kind}" for name in native), tuple(f"{name}.{kind}" for name in legacy)


_MODEL_NAMES = {  # native, legacy
    "embedding.weight": ("model.embed_tokens.weight",) * 2,
    "input_scale": ("model.input_hidden_states_scale", "model.layers.0.res_scale.hidden_states_scale"),
    "input_bias": ("model.input_hidden_states_bias", "model.layers.0.res_scale.hidden_states_bias"),
    "norm.weight": ("model.norm.weight", "model.final_norm.weight"),
    "head.weight": ("lm_head.weight",) * 2,
    "head_bias": ("lm_head.bias",) * 2,
}

_MODULES = {
    "attention_norm": (0, ("input_layernorm",), ("input_norm",)),
    "attention.project": (
        0,
        tuple(f"self_attn.qkv_proj.{name}" for name in ("q_proj", "k_proj", "v_proj_current", "v_proj_delayed")),
        tuple(f"self_attn.qkv.{name}" for name in ("linear_q", "linear_k", "val_proj1", "val_proj2")),
    ),
    "attention.output": (0, ("self_attn.o_proj",), ("self_attn.o_proj",)),
    "after_attention": (1, ("post_attention_residual_scale",), ("res_scale",)),
    "mlp_norm": (1, ("post_attention_layernorm",), ("input_norm",)),
    "router.down": (1, ("mlp.gate.down_proj",), ("zaya_block.router.down_proj",)),
    "router.norm": (1, ("mlp.gate.router_mlp.norm",), ("zaya_block.router.rmsnorm_eda",)),
    "router.first": (1, ("mlp.gate.router_mlp.fc1",), ("zaya_block.router.router_mlp.0",)),
    "router.second": (1, ("mlp.gate.router_mlp.fc2",), ("zaya_block.router.router_mlp.2",)),
    "router.scores": (1, ("mlp.gate.router_mlp.out_proj",), ("zaya_block.router.router_mlp.4",)),
    "after_mlp": (2, ("post_mlp_residual_scale",), ("res_scale",)),
}

_TENSORS = {
    "attention.conv.depthwise": (0, "self_attn.qkv_proj.conv_qk_depthwise.weight", "self_attn.qkv.conv_qk.0.weight"),
    "attention.conv.depthwise_bias": (0, "self_attn.qkv_proj.conv_qk_depthwise.bias", "self_attn.qkv.conv_qk.0.bias"),
    "attention.conv.grouped": (0, "self_attn.qkv_proj.conv_qk_grouped.weight", "self_attn.qkv.conv_qk.1.weight"),
    "attention.conv.grouped_bias": (0, "self_attn.qkv_proj.conv_qk_grouped.bias", "self_attn.qkv.conv_qk.1.bias"),
    "attention.temperature": (0, "self_attn.qk_norm.temp", "self_attn.qkv.temp"),
    "router.depth_scale": (1, "mlp.gate.router_states_scale", "zaya_block.router.router_states_scale"),
    "router.balance": (1, "mlp.gate.balancing_biases", "zaya_block.router.balancing_biases"),
}

_EXPERTS = {"experts.gate_up": ("gate_up_proj", "linear_fc1"), "experts.down": ("down_proj", "linear_fc2")}

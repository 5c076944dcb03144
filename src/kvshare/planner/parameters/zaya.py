"""Weights of ZAYA1, in its native and its legacy schema (a swapped order of scales aside, both hold the same)."""

from __future__ import annotations

from kvshare.layout import CacheLayout
from kvshare.layout.config import Fields
from kvshare.layout.rules.zaya import is_legacy
from kvshare.planner.parameters.counted import Parameters


def count(fields: Fields, layout: CacheLayout) -> Parameters:
    """Embedding (also the head), convolutional attention, routed experts with a router of three layers, residual scales."""
    layers, hidden, width = len(layout.layers), fields.integer("hidden_size"), fields.integer("head_dim")
    legacy = is_legacy(fields)
    expert = fields.integer("ffn_hidden_size") // 2 if legacy else fields.integer("moe_intermediate_size")  # legacy: gate and up together
    router = fields.integer("zaya_mlp_expansion") if legacy else fields.integer("router_hidden_size")
    experts = fields.integer("num_experts")
    queries, keys = fields.integer("num_attention_heads") * width, fields.integer("num_key_value_heads") * width
    channels = queries + keys
    stages = channels * fields.integer("cca_time0", 2) + channels * width * fields.integer("cca_time1", 2) + 2 * channels
    attention = hidden * (2 * queries + 2 * keys) + stages + keys // width
    routing = hidden * router + router + router + 2 * (router**2 + router) + router * (experts + 1)
    layer = attention + routing + 3 * experts * hidden * expert + 2 * hidden + 8 * hidden  # two norms, two residual scales of four
    if fields.get("attention_bias") or fields.get("add_bias_linear"):
        layer += channels + keys + hidden
    depth_scales = (layers - 1) * router  # routers average over depth, from the second layer on
    head = fields.integer("vocab_size") if fields.get("lm_head_bias") else 0
    return Parameters(fields.integer("vocab_size") * hidden + layers * layer + depth_scales + 3 * hidden + head)

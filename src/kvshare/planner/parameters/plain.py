"""Weights of Llama-like models: dense or with experts, with the small things in which the families differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvshare.layout import CacheLayout
from kvshare.layout.config import Fields
from kvshare.layout.rules.plain import head_dim
from kvshare.layout.rules.sharing import reader_projections
from kvshare.planner.parameters.counted import Parameters


@dataclass(frozen=True, slots=True)
class Features:
    """What a family has beyond Llama's block."""

    head_norms: bool = False  # RMS norms of each head's queries and keys
    wide_norms: bool = False  # RMS norms of all queries and all keys together
    qkv_bias: bool = False
    output_bias: bool = False
    sinks: bool = False
    tied: bool = False  # embedding and head are one table where the config does not say


FEATURES: Mapping[str, Features] = {
    **dict.fromkeys(("explicit", "llama", "mistral", "ministral", "mixtral", "granite", "phi3"), Features()),
    **dict.fromkeys(("qwen2", "qwen2_moe"), Features(qkv_bias=True)),
    **dict.fromkeys(("qwen3", "qwen3_moe", "laguna"), Features(head_norms=True)),
    **dict.fromkeys(("olmo2", "olmo3"), Features(wide_norms=True)),
    "gpt_oss": Features(qkv_bias=True, output_bias=True, sinks=True),
}


def count(fields: Fields, layout: CacheLayout) -> Parameters:
    """Embedding, layers, final norm, and the head unless it is the embedding."""
    family, hidden, vocabulary = FEATURES[layout.model_type], fields.integer("hidden_size"), fields.integer("vocab_size")
    layers = sum(
        _attention(fields, layout, index) + _feed_forward(fields, layout, index) + 2 * hidden for index in range(len(layout.layers))
    )
    head = 0 if fields.get("tie_word_embeddings", family.tied) else vocabulary * hidden
    return Parameters(vocabulary * hidden + layers + hidden + head)


def _attention(fields: Fields, layout: CacheLayout, index: int) -> int:
    family, hidden, width = FEATURES[layout.model_type], fields.integer("hidden_size"), head_dim(fields)
    owns = layout.owner[index] == index
    listed = "num_attention_heads_per_layer"
    heads = fields.per_layer(listed if fields.has(listed) else "num_attention_heads", len(layout.layers))[index]
    queries, keys = heads * width, layout.streams_of(index)[0].heads * width
    both = 2 * keys if owns else 0  # a reader projects no keys and no values
    bias = bool(fields.get("attention_bias"))
    total = hidden * (queries + both) + queries * hidden
    total += queries + both if family.qkv_bias or bias else 0
    total += hidden if family.output_bias or bias else 0
    total += width * (2 if owns else 1) if family.head_norms else 0
    total += queries + keys * owns if family.wide_norms else 0
    total += heads if family.sinks else 0
    if not owns and "k" in reader_projections(fields):  # (one of values is folded into the output projection)
        total += keys * width
    if layout.model_type == "laguna":  # output gate: one number a head, or one a channel
        total += hidden * (queries if fields.get("gating") == "per-element" else heads)
    return total


def _feed_forward(fields: Fields, layout: CacheLayout, index: int) -> int:
    hidden, name = fields.integer("hidden_size"), layout.model_type
    dense = 0 if name == "qwen2_moe" and not fields.has("intermediate_size") else 3 * hidden * fields.integer("intermediate_size")
    if name in ("mixtral", "gpt_oss"):
        experts = fields.integer("num_local_experts")
        if name == "mixtral":
            return experts * (dense + hidden)
        width = fields.integer("intermediate_size")
        return experts * (dense + 2 * width + hidden) + experts * hidden + experts  # biases everywhere
    if name in ("qwen2_moe", "qwen3_moe"):
        step, dense_layers = fields.integer("decoder_sparse_step", 1), fields.get("mlp_only_layers", [])
        if index in dense_layers or (index + 1) % step:
            return dense
        experts = fields.integer("num_experts")
        routed = experts * (3 * hidden * fields.integer("moe_intermediate_size") + hidden)
        return routed + (3 * hidden * fields.integer("shared_expert_intermediate_size") + hidden if name == "qwen2_moe" else 0)
    if name == "laguna":
        kinds = fields.list_of("mlp_layer_types", len(layout.layers), str)
        if (kinds[index] == "dense") if kinds else index == 0:
            return dense
        experts = fields.integer("num_experts")
        shared = 3 * hidden * fields.integer("shared_expert_intermediate_size")
        return experts * (3 * hidden * fields.integer("moe_intermediate_size") + hidden + 1) + shared
    return dense

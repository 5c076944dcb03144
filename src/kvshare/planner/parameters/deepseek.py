"""Weights of DeepSeek V3, V3.2 and V4."""

from __future__ import annotations

from kvshare.layout import CacheLayout
from kvshare.layout.config import Fields
from kvshare.planner.parameters.counted import Parameters


def _embedding_and_head(fields: Fields) -> int:
    tied = fields.get("tie_word_embeddings", False)
    return fields.integer("vocab_size") * fields.integer("hidden_size") * (1 if tied else 2)


def _experts(fields: Fields) -> int:
    """Routed experts, their gate, and the shared ones."""
    hidden, expert = fields.integer("hidden_size"), 3 * fields.integer("hidden_size") * fields.integer("moe_intermediate_size")
    routed = fields.integer("n_routed_experts")
    return routed * (expert + hidden) + fields.integer("n_shared_experts", 1) * expert


def count_latent(fields: Fields, layout: CacheLayout) -> Parameters:
    hidden, heads, count = fields.integer("hidden_size"), fields.integer("num_attention_heads"), len(layout.layers)
    rank, rotated, plain = fields.integer("kv_lora_rank"), fields.integer("qk_rope_head_dim"), fields.integer("qk_nope_head_dim")
    query_rank, value = fields.integer("q_lora_rank"), fields.integer("v_head_dim")
    attention = query_rank * (hidden + 1 + heads * (plain + rotated)) + hidden * (rank + rotated) + rank
    attention += rank * heads * (plain + value) + heads * value * hidden
    if fields.has("index_head_dim"):
        index_heads, width = fields.integer("index_n_heads"), fields.integer("index_head_dim")
        attention += query_rank * index_heads * width + hidden * width + 2 * width + hidden * index_heads
    dense = min(count, fields.integer("first_k_dense_replace", 3, least=0))
    feed_forward = dense * 3 * hidden * fields.integer("intermediate_size") + (count - dense) * _experts(fields)
    return Parameters(_embedding_and_head(fields) + count * (attention + 2 * hidden) + feed_forward + hidden)


def count_compressed(fields: Fields, layout: CacheLayout) -> Parameters:
    hidden, heads, width = fields.integer("hidden_size"), fields.integer("num_attention_heads"), fields.integer("head_dim")
    query_rank, streams = fields.integer("q_lora_rank"), fields.integer("hc_mult", 4)
    groups, output_rank = fields.integer("o_groups"), fields.integer("o_lora_rank")
    attention = heads + query_rank * (hidden + 1 + heads * width) + width * (hidden + 1)
    attention += heads * width * output_rank + groups * output_rank * hidden
    mixes = (2 + streams) * streams
    mixing = 2 * (mixes * streams * hidden + mixes + 3)  # before attention and before the experts
    total = len(layout.layers) * (attention + mixing + _experts(fields) + 2 * hidden)
    for layer in layout.layers:
        if layer.kind in ("csa", "hca"):
            total += _compressor(hidden, width, layer.stream("entry").tokens_per_row, overlaps=layer.kind == "csa")
        if layer.kind == "csa":
            index_heads, index_width = fields.integer("index_n_heads"), fields.integer("index_head_dim")
            total += _compressor(hidden, index_width, layer.stream("index").tokens_per_row, overlaps=True)
            total += query_rank * index_heads * index_width + hidden * index_heads
    head_mixing = streams * streams * hidden + streams + 1
    return Parameters(_embedding_and_head(fields) + total + head_mixing + hidden)


def _compressor(hidden: int, width: int, rate: int, overlaps: bool) -> int:
    """Projections of values and gates (twice as wide where entries overlap), position biases, a norm."""
    columns = 2 * width if overlaps else width
    return columns * (2 * hidden + rate) + width

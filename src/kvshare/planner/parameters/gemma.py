"""Weights of Gemma 2, 3, 3n and 4."""

from __future__ import annotations

from kvshare.layout import CacheLayout
from kvshare.layout.config import Fields
from kvshare.planner.parameters.counted import Parameters


def _attention(fields: Fields, layout: CacheLayout, index: int, head_norms: bool = True, key_is_value: bool = False) -> int:
    """Projections and head norms; a reader has neither keys nor values to project."""
    hidden, stream = fields.integer("hidden_size"), layout.streams_of(index)[0]
    queries = fields.integer("num_attention_heads") * stream.width
    total = 2 * hidden * queries + (stream.width if head_norms else 0)
    if layout.owner[index] == index:
        total += (1 if key_is_value else 2) * hidden * stream.heads * stream.width + (stream.width if head_norms else 0)
    return total


def _embedding(fields: Fields) -> int:
    table = fields.integer("vocab_size", 262_144) * fields.integer("hidden_size")
    return table if fields.get("tie_word_embeddings", True) else 2 * table


def count_gemma3(fields: Fields, layout: CacheLayout) -> Parameters:
    hidden, norms = fields.integer("hidden_size"), layout.model_type != "gemma2"
    layer = 3 * hidden * fields.integer("intermediate_size") + 4 * hidden
    attention = sum(_attention(fields, layout, index, norms) for index in range(len(layout.layers)))
    return Parameters(_embedding(fields) + len(layout.layers) * layer + attention + hidden)


def _per_layer_embeddings(fields: Fields, count: int) -> tuple[int, int]:
    """The table, and the weights that project and gate what is read from it."""
    width, hidden = fields.integer("hidden_size_per_layer_input", 256, least=0), fields.integer("hidden_size")
    if not width:
        return 0, 0
    table = fields.integer("vocab_size_per_layer_input", 262_144) * count * width
    return table, hidden * count * width + width + count * (2 * width * hidden + hidden)


def count_gemma3n(fields: Fields, layout: CacheLayout) -> Parameters:
    hidden, count = fields.integer("hidden_size"), len(layout.layers)
    streams, rank = fields.integer("altup_num_inputs", 4), fields.integer("laurel_rank", 64)
    widths = fields.per_layer("intermediate_size", count)
    altup = streams**2 + streams**3 + streams * hidden + 2 * hidden  # correct, predict, router, its norm, output scale
    laurel = 2 * rank * hidden + hidden
    layers = sum(_attention(fields, layout, index) + 3 * hidden * widths[index] + 4 * hidden + altup + laurel for index in range(count))
    table, projections = _per_layer_embeddings(fields, count)
    return Parameters(_embedding(fields) + layers + projections + 2 * (streams - 1) * hidden**2 + hidden, table)


def count_gemma4(fields: Fields, layout: CacheLayout) -> Parameters:
    hidden, count = fields.integer("hidden_size"), len(layout.layers)
    layers = 0
    for index, layer in enumerate(layout.layers):
        doubled = fields.get("use_double_wide_mlp") and layer.owner != index
        layers += _attention(fields, layout, index, key_is_value=layer.kind == "full" and bool(fields.get("attention_k_eq_v")))
        layers += 3 * hidden * fields.integer("intermediate_size") * (2 if doubled else 1) + 4 * hidden
        if fields.get("enable_moe_block"):
            experts = fields.integer("num_experts")
            layers += experts * (3 * hidden * fields.integer("moe_intermediate_size") + hidden + 1)  # experts, router, scale of each
            layers += 4 * hidden  # router's scale and three norms
    table, projections = _per_layer_embeddings(fields, count)
    return Parameters(_embedding(fields) + layers + projections + hidden, table)

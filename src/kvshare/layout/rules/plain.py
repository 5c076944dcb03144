"""Ordinary grouped-query attention: every layer keeps its own keys and values (Llama, Qwen3, Mistral, SmolLM2), or those that a map names."""

from __future__ import annotations

from kvshare.errors import ConfigError
from kvshare.layout.cache_layout import CacheLayout, LayerCache, Stream
from kvshare.layout.config import Fields

_WINDOWED = {"sliding_attention": True, "full_attention": False}


def key_value_streams(heads: int, width: int, window: int | None) -> tuple[Stream, Stream]:
    return Stream("k", heads, width, window=window), Stream("v", heads, width, window=window)


def head_dim(fields: Fields) -> int:
    """`head_dim`, or hidden size over query heads where the config leaves it out."""
    if fields.has("head_dim"):
        return fields.integer("head_dim")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if hidden % heads:
        raise ConfigError("head_dim", f"missing, and hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    return hidden // heads


def grouped_queries(fields: Fields, kv_form: str) -> CacheLayout:
    """Keys and values in every layer; `layer_types` and `sliding_window` decide which keep a window."""
    count = fields.integer("num_hidden_layers")
    heads = fields.integer("num_key_value_heads", fields.integer("num_attention_heads"))
    types = fields.list_of("layer_types", count, str)
    window = fields.integer("sliding_window", None)
    if fields.get("use_sliding_window") is False:
        window = None
    layers = []
    for index in range(count):
        slides = fields.choice("layer_types", types[index], _WINDOWED) if types else window is not None
        if slides and window is None:
            raise ConfigError("sliding_window", f"missing, but layer {index} is {types[index]}" if types else "missing")
        streams = key_value_streams(heads, head_dim(fields), window if slides else None)
        layers.append(LayerCache("sliding" if slides else "full", index, streams))
    return CacheLayout(tuple(layers), fields.get("model_type", "explicit"), fields.integer("max_position_embeddings", None))

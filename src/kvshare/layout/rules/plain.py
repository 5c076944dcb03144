"""Ordinary grouped-query attention (Llama, Qwen, Mistral, Laguna, OpenELM, ...): keys and values in every layer, or where a map says.

`layer_types` says which layers keep a window. Where a config has none, each architecture has its own rule for what `sliding_window` means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvshare.errors import ConfigError
from kvshare.layout.cache_layout import CacheLayout, LayerCache, Stream
from kvshare.layout.config import Fields
from kvshare.layout.rules.sharing import explicit_owners, with_owners

_SLIDES = {"sliding_attention": True, "full_attention": False}

_Pattern = Callable[[Fields, int], bool]
"""Whether a layer keeps a window, for configs without `layer_types`."""


def _every_layer(fields: Fields, index: int) -> bool:
    return fields.has("sliding_window")


def _if_used(fields: Fields, index: int) -> bool:
    return bool(fields.get("use_sliding_window"))


def _behind_max_window_layers(fields: Fields, index: int) -> bool:
    return _if_used(fields, index) and index >= fields.integer("max_window_layers", least=0)


def _alternating_before_max_window_layers(fields: Fields, index: int) -> bool:
    return _if_used(fields, index) and index % 2 == 0 and index < fields.integer("max_window_layers", least=0)


def _no_layer(fields: Fields, index: int) -> bool:
    if fields.has("sliding_window"):
        raise ConfigError("sliding_window", f"{fields.get('sliding_window')!r}, but layer_types does not say which layers keep a window")
    return False


PATTERNS: Mapping[str | None, _Pattern] = {
    **dict.fromkeys(("llama", "granite", "olmo2", "openelm", None), _no_layer),
    **dict.fromkeys(("mistral", "ministral", "mixtral", "phi3", "starcoder2"), _every_layer),
    **dict.fromkeys(("qwen2", "qwen3"), _behind_max_window_layers),
    "qwen2_moe": _alternating_before_max_window_layers,
    "qwen3_moe": _if_used,
    "laguna": lambda fields, index: False,
    "gpt_oss": lambda fields, index: index % 2 == 0,
    "olmo3": lambda fields, index: index % 4 != 3,
}


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


def windows(fields: Fields, count: int) -> list[int | None]:
    """Each layer's window, None where it keeps all rows."""
    types = fields.list_of("layer_types", count, str)
    if types is not None:
        slides = [fields.choice("layer_types", name, _SLIDES) for name in types]
    else:
        slides = [PATTERNS[fields.get("model_type")](fields, index) for index in range(count)]
    if any(slides) and fields.get("use_sliding_window") is False:
        raise ConfigError("use_sliding_window", f"false, but layer_types says that layer {slides.index(True)} keeps a window")
    return [fields.integer("sliding_window") if slide else None for slide in slides]


def grouped_queries(fields: Fields, kv_form: str) -> CacheLayout:
    """Keys and values in every layer that `kv_sharing` does not make a reader."""
    count = fields.integer("num_hidden_layers")
    heads = fields.per_layer("num_key_value_heads" if fields.has("num_key_value_heads") else "num_attention_heads", count)
    _check_query_heads(fields, heads)
    width = head_dim(fields)
    layers = [
        LayerCache("full" if window is None else "sliding", index, key_value_streams(heads[index], width, window))
        for index, window in enumerate(windows(fields, count))
    ]
    owners = explicit_owners(fields, count) or range(count)
    return CacheLayout(
        with_owners(layers, owners, "kv_sharing"),
        fields.get("model_type", "explicit"),
        fields.optional_integer("max_position_embeddings"),
        tuple(fields.warnings),
    )


def _check_query_heads(fields: Fields, kv_heads: list[int]) -> None:
    name = "num_attention_heads_per_layer" if fields.has("num_attention_heads_per_layer") else "num_attention_heads"
    if not fields.has(name):
        return
    for index, (queries, keys) in enumerate(zip(fields.per_layer(name, len(kv_heads)), kv_heads, strict=True)):
        if queries % keys:
            raise ConfigError("num_key_value_heads", f"layer {index} has {queries} query heads, no multiple of its {keys} key-value heads")


_OPENELM_NAMES = {
    "num_transformer_layers": "num_hidden_layers",
    "num_kv_heads": "num_key_value_heads",
    "num_query_heads": "num_attention_heads",
    "max_context_length": "max_position_embeddings",
}


def openelm(fields: Fields, kv_form: str) -> CacheLayout:
    """Keys and values in every layer, with a number of heads for each, under names of its own."""
    renamed: dict[str, Any] = {_OPENELM_NAMES.get(name, name): value for name, value in fields.config.items()}
    return grouped_queries(Fields(renamed), kv_form)


_STRUCTURAL = (
    "kv_lora_rank",
    "compress_ratios",
    "compress_rates",
    "cca",
    "cca_time0",
    "num_kv_shared_layers",
    "attention_k_eq_v",
    "layer_types",
)
"""Fields of caches that are not plain: with one of them, a config that does not name its architecture is not guessed at."""


def unnamed(fields: Fields, kv_form: str) -> CacheLayout:
    """A config without `model_type` whose fields are those of plain grouped-query attention; the layout's warning says what was assumed."""
    for name in _STRUCTURAL:
        if fields.has(name):
            raise ConfigError(
                "model_type", f"missing, and {name} says that this is not plain grouped-query attention: name the architecture"
            )
    for name in ("num_hidden_layers", "num_key_value_heads"):
        if not fields.has(name):
            raise ConfigError("model_type", f"missing, and without {name} plain grouped-query attention cannot be assumed either")
    fields.warnings.append(
        "model_type is missing: assumed plain grouped-query attention, keys and values of every token in every layer, nothing shared"
    )
    return grouped_queries(fields, kv_form)

"""Gemma 3, 3n and 4: windows by layer type, the last layers reading an earlier layer of the same type, keys that equal values.

Gemma 4 names widths in two schemas: `global_head_dim` and `num_global_key_value_heads` in released configs,
`per_layer_config` in those that transformers saves. Both are read here.
"""

from __future__ import annotations

from kvshare.errors import ConfigError
from kvshare.layout.cache_layout import CacheLayout, LayerCache, Stream
from kvshare.layout.config import Fields
from kvshare.layout.rules.plain import key_value_streams

_SLIDING, _FULL = "sliding_attention", "full_attention"
_TYPES = {_SLIDING: "sliding", _FULL: "full"}


def layer_types(fields: Fields, count: int) -> list[str]:
    """The attention type of each layer; Gemma 3 may give a period (`sliding_window_pattern`) instead of a list."""
    types = fields.list_of("layer_types", count, str)
    if types is None:
        period = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 6))
        types = [_FULL if (index + 1) % period == 0 else _SLIDING for index in range(count)]
    for name in types:
        fields.choice("layer_types", name, _TYPES)
    return types


def geometry(fields: Fields, index: int, layer_type: str) -> tuple[int, int]:
    """KV heads and head width of one layer."""
    heads, width = fields.integer("num_key_value_heads"), fields.integer("head_dim", 256)
    if layer_type == _FULL:
        width = fields.integer("global_head_dim", 512 if str(fields.get("model_type")).startswith("gemma4") else width)
        if fields.get("attention_k_eq_v"):
            heads = fields.integer("num_global_key_value_heads", heads)
    own = (fields.get("per_layer_config") or {}).get(str(index), {})
    return own.get("num_key_value_heads", heads), own.get("head_dim", width)


def shared_owner(types: list[str], index: int, first_shared: int) -> int:
    """The last layer before `first_shared` of the same attention type: what a sharing layer reads (not "layer L - k")."""
    for owner in reversed(range(first_shared)):
        if types[owner] == types[index]:
            return owner
    raise ConfigError("num_kv_shared_layers", f"layer {index} ({types[index]}) would share, but none of the first {first_shared} layers has that type")


def shared_by_type(fields: Fields, kv_form: str) -> CacheLayout:
    """Gemma's rule: the last `num_kv_shared_layers` layers read the last owner of their own attention type."""
    count = fields.integer("num_hidden_layers")
    types = layer_types(fields, count)
    shared = fields.integer("num_kv_shared_layers", 0, least=0)
    if shared >= count:
        raise ConfigError("num_kv_shared_layers", f"{shared} of {count} layers would share: at least one must own a cache")
    layers = []
    for index, layer_type in enumerate(types):
        if index >= count - shared:
            layers.append(LayerCache(_TYPES[layer_type], shared_owner(types, index, count - shared)))
            continue
        heads, width = geometry(fields, index, layer_type)
        window = fields.integer("sliding_window") if layer_type == _SLIDING else None
        streams: tuple[Stream, ...] = key_value_streams(heads, width, window)
        if layer_type == _FULL and fields.get("attention_k_eq_v"):
            streams = key_equals_value_streams(fields, heads, width, kv_form)
        layers.append(LayerCache(_TYPES[layer_type], index, streams))
    return CacheLayout(tuple(layers), fields.get("model_type"), fields.integer("max_position_embeddings", None))


def key_equals_value_streams(fields: Fields, heads: int, width: int, kv_form: str) -> tuple[Stream, ...]:
    """The three forms of a layer whose keys are K = RoPE(V * k_norm.weight): both; V and the rotated dims of K; V alone."""
    if kv_form == "plain":
        return key_value_streams(heads, width, None)
    if kv_form == "v-only":
        return (Stream("v", heads, width),)
    rope = (fields.get("rope_parameters") or {}).get(_FULL, {})
    rotated = int(width * rope.get("partial_rotary_factor", 0.25))
    return Stream("v", heads, width), Stream("k_rotated", heads, rotated)

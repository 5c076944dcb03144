"""Gemma 2, 3, 3n and 4: windows by layer type, the last layers reading an earlier layer of the same type, keys that equal values.

Gemma 4 names widths in two schemas: `global_head_dim` and `num_global_key_value_heads` in released configs,
`per_layer_config` in those that transformers saves. Both are read here, and must agree where both speak.
"""

from __future__ import annotations

from typing import Any

from kvshare.errors import ConfigError
from kvshare.layout.cache_layout import CacheLayout, LayerCache, Stream
from kvshare.layout.config import Fields
from kvshare.layout.rules.plain import key_value_streams
from kvshare.layout.rules.sharing import explicit_owners, with_owners

_SLIDING, _FULL = "sliding_attention", "full_attention"
_TYPES = {_SLIDING: "sliding", _FULL: "full"}
_PERIODS = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "gemma4": 6}  # every n-th layer is full, where the config lists no types
_DEFAULT_KV_HEADS = {"gemma2": 4, "gemma3": 4, "gemma3n": 2, "gemma4": 4}  # of the configuration classes: Gemma 3 4B relies on it
_GLOBAL_WIDTH = 512  # Gemma 4's full layers, where the config does not say


def family(fields: Fields) -> str:
    """`gemma2`, `gemma3`, `gemma3n` or `gemma4`."""
    return fields.get("model_type").partition("_")[0]


def layer_types(fields: Fields, count: int) -> list[str]:
    """The attention type of each layer; without a list, a period (Gemma 3 names it `sliding_window_pattern`)."""
    types = fields.list_of("layer_types", count, str)
    if types is None:
        period = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", _PERIODS[family(fields)]))
        types = [_FULL if (index + 1) % period == 0 else _SLIDING for index in range(count)]
    for name in types:
        fields.choice("layer_types", name, _TYPES)
    if family(fields) == "gemma4" and types[-1] != _FULL:
        fields.warnings.append("layer_types ends in a sliding layer: assumed full, as transformers does for Gemma 4")
        types = [*types[:-1], _FULL]
    return types


def window(fields: Fields) -> int:
    """Rows that a sliding layer keeps. Attention in both directions reads half of the configured window on either side."""
    both = fields.get("use_bidirectional_attention", False)
    rows = fields.integer("sliding_window")
    if family(fields) == "gemma4":
        fields.choice("use_bidirectional_attention", str(both), {"False": None, "vision": None, "all": None})
        both = both == "all"
    return rows // 2 + 1 if both and family(fields) != "gemma3n" else rows


def geometry(fields: Fields, index: int, layer_type: str) -> tuple[int, int]:
    """KV heads and head width of one layer."""
    heads = fields.assume(
        "num_key_value_heads", _DEFAULT_KV_HEADS[family(fields)], "the default of this architecture's configuration class"
    )
    width = fields.integer("head_dim", 256)
    own = per_layer_entry(fields, index)
    if layer_type == _FULL and family(fields) == "gemma4":
        global_heads = fields.optional_integer("num_global_key_value_heads") if fields.get("attention_k_eq_v") else None
        _check_agreement(index, "head_dim", fields.optional_integer("global_head_dim"), own)
        _check_agreement(index, "num_key_value_heads", global_heads, own)
        heads, width = global_heads or heads, fields.integer("global_head_dim", width if fields.has("per_layer_config") else _GLOBAL_WIDTH)
    entry = Fields(own)
    return entry.integer("num_key_value_heads", heads), entry.integer("head_dim", width)


def per_layer_entry(fields: Fields, index: int) -> dict[str, Any]:
    """What `per_layer_config` says of one layer. transformers pads its keys with zeros where there are ten layers or more ("03")."""
    entries = fields.mapping("per_layer_config")
    unknown = [key for key in entries if not key.isdecimal()]
    if unknown:
        raise ConfigError("per_layer_config", f"{unknown[0]!r} is not the number of a layer")
    return next((entry for key, entry in entries.items() if int(key) == index), {})


def _check_agreement(index: int, name: str, value: int | None, own: dict[str, Any]) -> None:
    if value is not None and own.get(name, value) != value:
        raise ConfigError("per_layer_config", f"layer {index} has {name} {own[name]}, but the config's field for full layers says {value}")


def last_of_type(types: list[str], index: int, first_shared: int) -> int:
    """The last layer before `first_shared` of the same attention type: what a sharing layer reads (not "layer L - k")."""
    for owner in reversed(range(first_shared)):
        if types[owner] == types[index]:
            return owner
    raise ConfigError(
        "num_kv_shared_layers", f"layer {index} ({types[index]}) would share, but none of the first {first_shared} layers has that type"
    )


def owners(fields: Fields, types: list[str]) -> list[int]:
    """The owner of each layer: the last `num_kv_shared_layers` read the last owner of their type, unless `kv_sharing` maps them."""
    count = len(types)
    # the configuration class of 3n would fill in 15, which suits only one of the two released models
    shared = (
        fields.integer("num_kv_shared_layers", least=0)
        if family(fields) == "gemma3n"
        else fields.integer("num_kv_shared_layers", 0, least=0)
    )
    if shared >= count:
        raise ConfigError("num_kv_shared_layers", f"{shared} of {count} layers would share: at least one must own a cache")
    first = count - shared
    by_type = [index if index < first else last_of_type(types, index, first) for index in range(count)]
    explicit = explicit_owners(fields, count)
    if explicit is not None and shared and explicit != by_type:
        raise ConfigError("kv_sharing", f"contradicts num_kv_shared_layers {shared}: set that to 0 to use a map of your own")
    return by_type if explicit is None else explicit


def shared_by_type(fields: Fields, kv_form: str) -> CacheLayout:
    """Keys and values, in sliding layers of a window; the last `num_kv_shared_layers` layers read the last owner of their own type."""
    types = layer_types(fields, fields.integer("num_hidden_layers"))
    layers = []
    for index, layer_type in enumerate(types):
        heads, width = geometry(fields, index, layer_type)
        if layer_type == _FULL and family(fields) == "gemma4" and fields.get("attention_k_eq_v"):
            streams = key_equals_value_streams(fields, heads, width, kv_form)
        else:
            streams = key_value_streams(heads, width, window(fields) if layer_type == _SLIDING else None)
        layers.append(LayerCache(_TYPES[layer_type], index, streams))
    field = "kv_sharing" if fields.has("kv_sharing") else "num_kv_shared_layers"
    return CacheLayout(
        with_owners(layers, owners(fields, types), field),
        fields.get("model_type"),
        fields.optional_integer("max_position_embeddings"),
        tuple(dict.fromkeys(fields.warnings)),
    )


def key_equals_value_streams(fields: Fields, heads: int, width: int, kv_form: str) -> tuple[Stream, ...]:
    """The three forms of a layer whose keys are K = RoPE(V * k_norm.weight): both; V and the rotated dims of K; V alone."""
    if kv_form == "plain":
        return key_value_streams(heads, width, None)
    if kv_form == "v-only":
        return (Stream("v", heads, width),)
    rotated = int(width * fields.mapping("rope_parameters").get(_FULL, {}).get("partial_rotary_factor", 0.25))
    return Stream("v", heads, width), Stream("k_rotated", heads, rotated)


def drafter(fields: Fields, kv_form: str) -> CacheLayout:
    """Gemma 4's drafter: no layer has keys or values of its own; each reads the target's last owner of its attention type."""
    count = fields.integer("num_hidden_layers")
    shared = fields.integer("num_kv_shared_layers", 0, least=0)
    if shared not in (0, count):
        raise ConfigError("num_kv_shared_layers", f"{shared} of {count} layers: a drafter's layers all read the target's cache")
    types = fields.list_of("layer_types", count, str) or [_SLIDING] * (count - 1) + [_FULL]
    layers = tuple(LayerCache(fields.choice("layer_types", name, _TYPES), index) for index, name in enumerate(types))
    note = "a drafter: it stores nothing, and reads the cache of the model that it drafts for"
    return CacheLayout(layers, fields.get("model_type"), fields.optional_integer("max_position_embeddings"), (note,), external=True)

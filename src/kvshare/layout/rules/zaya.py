"""ZAYA1: compressed convolutional attention. Each layer keeps keys and values, and two small states that do not grow.

Attention sees a causal convolution over queries and keys, and half of the values belong to the token before: so a sequence carries,
in every layer, the convolution's last inputs and the last token's delayed value. (Zyphra's own code keeps that token's hidden vector
instead, 2048 numbers where 128 do; kvshare stores what transformers stores.)

Two schemas exist. The legacy one counts attention and experts as layers of their own, so it has twice as many, and its windows do not
count the query itself.
"""

from __future__ import annotations

from kvshare.errors import ConfigError
from kvshare.layout.cache_layout import CacheLayout, LayerCache, State
from kvshare.layout.config import Fields
from kvshare.layout.rules.plain import key_value_streams

_SLIDES = {"hybrid": False, "hybrid_sliding": True}
_STATE_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def is_legacy(fields: Fields) -> bool:
    """Whether the config has the schema in which attention and experts alternate as layers."""
    return any(fields.has(name) for name in ("cca", "zaya_use_eda", "zaya_mlp_expansion"))


def convolutional(fields: Fields, kv_form: str) -> CacheLayout:
    """Keys and values in every attention layer, the tail of its convolution and its delayed value."""
    legacy = is_legacy(fields)
    windows = _legacy_windows(fields) if legacy else _windows(fields)
    queries, heads, width = fields.integer("num_attention_heads"), fields.integer("num_key_value_heads"), fields.integer("head_dim")
    if queries % heads:
        raise ConfigError("num_key_value_heads", f"{queries} query heads are no multiple of {heads} key-value heads")
    if legacy and fields.integer("num_query_groups", heads) != heads:
        raise ConfigError("num_query_groups", f"{fields.get('num_query_groups')} contradicts num_key_value_heads {heads}")
    if heads * width % 2:
        raise ConfigError("head_dim", f"{heads} heads of {width} cannot be halved into current and delayed values")
    dtype = fields.choice("mamba_cache_dtype", fields.get("mamba_cache_dtype", "bfloat16"), _STATE_DTYPES) if legacy else "bf16"
    tail = fields.integer("cca_time0", 2) + fields.integer("cca_time1", 2) - 2  # tokens that the two stages look back
    states = (State("conv", ((queries + heads) * width, tail), dtype), State("delayed_value", (heads * width // 2,), dtype))
    layers = tuple(LayerCache("cca", index, key_value_streams(heads, width, window), states) for index, window in enumerate(windows))
    return CacheLayout(layers, fields.get("model_type"), fields.optional_integer("max_position_embeddings"), tuple(fields.warnings))


def _windows(fields: Fields) -> list[int | None]:
    count = fields.integer("num_hidden_layers")
    types = fields.list_of("layer_types", count, str)
    if types is None:
        if fields.has("sliding_window"):
            raise ConfigError("layer_types", "missing, but sliding_window is set: which layers keep a window must be listed")
        return [None] * count
    return [fields.integer("sliding_window") if fields.choice("layer_types", name, _SLIDES) else None for name in types]


def _legacy_windows(fields: Fields) -> list[int | None]:
    count = fields.integer("num_hidden_layers")
    if count % 2:
        raise ConfigError("num_hidden_layers", f"{count}: in the legacy schema attention and experts alternate, so it is even")
    fields.warnings.append(f"legacy schema: {count} alternating layers are {count // 2} layers of attention with experts")
    previous = fields.list_of("swa_layers", count, int)  # tokens before the query, 0 for full attention
    if previous is None:
        every = fields.optional_integer("sliding_window")
        return [None if every is None else every + 1] * (count // 2)
    return [tokens + 1 if tokens else None for tokens in previous[::2]]

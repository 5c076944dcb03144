"""DeepSeek V3 and V3.2 (latent attention), V4 (a window beside compressed entries) and V4.1 (entries that other layers read).

Native row sizes are those of the formats that DeepSeek's own inference code writes and the engines store.
"""

from __future__ import annotations

from kvshare.errors import ConfigError
from kvshare.layout.cache_layout import CacheLayout, LayerCache, State, Stream
from kvshare.layout.config import Fields
from kvshare.layout.rows import BlockRow

_CSA, _HCA, _SWA = "compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"
_TYPE_OF_RATIO = {0: _SWA, 4: _CSA, 128: _HCA}
_KINDS = {_SWA: "swa", _CSA: "csa", _HCA: "hca"}


def latent(fields: Fields, kv_form: str) -> CacheLayout:
    """V3: one compressed latent and a rotated key a token, shared by all heads. V3.2 adds an indexer that selects `index_topk` of them."""
    indexed = fields.has("index_head_dim")
    if fields.get("model_type") == "deepseek_v32" and not indexed:
        raise ConfigError("index_head_dim", "missing: V3.2 selects tokens with an indexer")
    if not fields.has("model_type"):
        fields.warnings.append(
            "model_type is missing: assumed deepseek_v32, because kv_lora_rank and index_head_dim are those of its cache"
        )
    rank, rotated = fields.integer("kv_lora_rank"), fields.integer("qk_rope_head_dim")
    native = BlockRow(8, 128, scale_bytes=4, exact=rotated)
    streams = [Stream("latent", 1, rank + rotated, top_k=fields.integer("index_topk") if indexed else None, native=native)]
    if indexed:
        width = fields.integer("index_head_dim")
        streams.append(Stream("index", 1, width, native=BlockRow(8, 128, scale_bytes=4)))
    count = fields.integer("num_hidden_layers")
    layers = tuple(LayerCache("latent", index, tuple(streams)) for index in range(count))
    name = fields.get("model_type", "deepseek_v32")
    return CacheLayout(layers, name, fields.optional_integer("max_position_embeddings"), tuple(fields.warnings))


def _attention_types(fields: Fields, count: int) -> list[str]:
    types = fields.list_of("layer_types", count, str)
    for name in types or ():
        fields.choice("layer_types", name, _KINDS)
    ratios = compress_ratios(fields, count) if fields.has("compress_ratios") else None
    if ratios is None and types is None:
        raise ConfigError(
            "compress_ratios", "missing (and so is layer_types): which layers compress, and how much, differs between released models"
        )
    if ratios is None:
        return types or []
    for index, ratio in enumerate(ratios):
        if ratio not in _TYPE_OF_RATIO:
            raise ConfigError("compress_ratios", f"layer {index} has {ratio}: known are {', '.join(map(str, _TYPE_OF_RATIO))}")
    named = [_TYPE_OF_RATIO[ratio] for ratio in ratios]
    if types is not None and types != named:
        raise ConfigError("layer_types", "contradicts compress_ratios")
    return named


def compress_ratios(fields: Fields, count: int) -> list[int]:
    """Tokens a compressed entry, by layer, 0 for none. Entries behind the last layer belong to draft layers and must be 0."""
    value = fields.get("compress_ratios")
    if not isinstance(value, list) or not all(isinstance(ratio, int) and ratio >= 0 for ratio in value):
        raise ConfigError("compress_ratios", "must be a list of whole numbers, one for each layer")
    if len(value) < count or any(value[count:]):
        raise ConfigError("compress_ratios", f"has {len(value)} entries for {count} layers (num_hidden_layers); only zeros may follow")
    return value[:count]


def compressed(fields: Fields, kv_form: str) -> CacheLayout:
    """V4: every layer keeps a window of key-value vectors (K = V) and, unless it is a plain window layer, compressed entries.

    CSA layers write an entry for each 4 tokens and select entries with an indexer; HCA layers write one for each 128 and read all.
    """
    count, width, index_width = fields.integer("num_hidden_layers"), fields.integer("head_dim"), fields.integer("index_head_dim")
    rotated = fields.integer("qk_rope_head_dim", int(width * float(fields.get("partial_rotary_factor", 0.125))))
    if fields.integer("num_key_value_heads", 1) != 1:
        raise ConfigError(
            "num_key_value_heads", f"{fields.get('num_key_value_heads')}, but one vector serves all heads as key and as value"
        )
    native = BlockRow(8, 64, exact=rotated, align=8)
    rates = {_CSA: 4, _HCA: 128, **fields.mapping("compress_rates")}
    layers = []
    for index, name in enumerate(_attention_types(fields, count)):
        streams = [Stream("kv", 1, width, window=fields.integer("sliding_window"), native=native)]
        states: tuple[State, ...] = ()
        if name == _CSA:
            rate, top_k = rates[_CSA], fields.integer("index_topk")
            streams.append(Stream("entry", 1, width, tokens_per_row=rate, top_k=top_k, native=native))
            streams.append(Stream("index", 1, index_width, tokens_per_row=rate, native=BlockRow(4, 32)))
            states = (*_open_rows("open", 2 * rate, 2 * width), *_open_rows("open_index", 2 * rate, 2 * index_width))
        elif name == _HCA:
            streams.append(Stream("entry", 1, width, tokens_per_row=rates[_HCA], native=native))
            states = _open_rows("open", rates[_HCA], width)
        layers.append(LayerCache(_KINDS[name], index, tuple(streams), states))
    return CacheLayout(tuple(layers), fields.get("model_type"), fields.optional_integer("max_position_embeddings"), tuple(fields.warnings))


def _open_rows(name: str, rows: int, width: int) -> tuple[State, State]:
    """What a compressor has projected of tokens whose entry is not complete (CSA: the block before too, which the next entry overlaps)."""
    return State(f"{name}_kv", (rows, width), "fp32"), State(f"{name}_gate", (rows, width), "fp32")


def cross_layer(fields: Fields, kv_form: str) -> CacheLayout:
    """V4.1: every layer keeps its own window; a few (`kv_source_layer_ids`) write entries and indexer keys for those behind them.

    A layer's `compress_ratios` entry names the ratio of the entries that it *reads*: those of the last source at or before it.
    Layers of `index_source_layer_ids` run an indexer over its keys; the others read the entries that the last such layer selected.
    A source of ratio 1 projects token by token and so leaves no block open.
    """
    count, width, index_width = fields.integer("num_hidden_layers"), fields.integer("head_dim"), fields.integer("index_head_dim")
    ratios = compress_ratios(fields, count)
    sources, indexers = _layer_ids(fields, "kv_source_layer_ids", count), _layer_ids(fields, "index_source_layer_ids", count)
    if not set(sources) <= set(indexers):
        raise ConfigError("index_source_layer_ids", f"lacks {sorted(set(sources) - set(indexers))}, which kv_source_layer_ids names")
    candidates = fields.integer("candidate_topk_blocks", 0, least=0) * fields.integer("candidate_block_size", 0, least=0)
    candidate_source = fields.integer("candidate_source_layer_id", count, least=0)
    layers = []
    for index, ratio in enumerate(ratios):
        streams = [Stream("kv", 1, width, window=fields.integer("sliding_window"), native=BlockRow(8, 32))]
        states: tuple[State, ...] = ()
        borrowed: tuple[tuple[int, Stream], ...] = ()
        if ratio:
            source = max((layer for layer in sources if layer <= index), default=None)
            if source is None or ratios[source] != ratio:
                raise ConfigError(
                    "compress_ratios", f"layer {index} reads entries of ratio {ratio}, but its source (layer {source}) does not write them"
                )
            entry = Stream("entry", 1, width, ratio, top_k=fields.integer("index_topk"), native=BlockRow(4, 16))
            limit = candidates if candidates and index > candidate_source else None
            keys = Stream("index", 1, index_width, ratio, top_k=limit, native=BlockRow(4, 32))
            read = (entry, keys) if index in indexers else (entry,)
            if source == index:
                streams.extend(read)
                states = _open_rows("open", ratio, width) if ratio > 1 else ()
            else:
                borrowed = tuple((source, stream) for stream in read)
        layers.append(LayerCache("csa2" if ratio else "swa", index, tuple(streams), states, borrowed))
    fields.warnings.append(
        "which layer reads which is inferred from kv_source_layer_ids and compress_ratios (the last source at or before it); in the native "
        "format this gives the 890 bytes a token that V4.1's authors state. Engram tables, draft layers and vision are not counted"
    )
    return CacheLayout(tuple(layers), fields.get("model_type"), fields.optional_integer("max_position_embeddings"), tuple(fields.warnings))


def _layer_ids(fields: Fields, name: str, count: int) -> list[int]:
    value = fields.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(layer, int) and 0 <= layer < count for layer in value):
        raise ConfigError(name, f"must list layers from 0 to {count - 1}, not {value!r}")
    return value

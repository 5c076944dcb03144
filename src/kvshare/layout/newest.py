"""The newest rows of an owner in 16 bits beside its encoded ones: what `rot4+32` stores.

A query at position p reads rows p - 31 ... p in 16 bits and older ones encoded. That asks for two streams: the encoded one holds every row,
as if there were no other (a row must be there once it is 32 old), and one with a window of 32 rows holds the newest in 16 bits. Windows are
what the arena, the plan and the kernels have anyway, so nothing else knows of it; and because which rows a query reads exactly depends on
its position alone, one shot, chunks and single tokens still give the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvshare.errors import ConfigError

if TYPE_CHECKING:
    from kvshare.layout.cache_layout import LayerCache, Stream

_WHOLE = ("k", "v", "kv", "latent")  # streams of whole keys and values, a row a token


def with_newest(layer: LayerCache, index: int, count: int) -> LayerCache:
    """`layer`, which is layer `index`, with the newest `count` rows of its keys and values in 16 bits; itself if it has them already.

    Compressed entries and indexer keys stay encoded. Raises `ConfigError` where keys are not stored whole, or each query selects its rows.
    """
    if not count or any(stream.newest_of for stream in layer.streams):
        return layer
    names = {stream.name for stream in layer.streams}
    if not names & set(_WHOLE) or ("v" in names and "k" not in names):
        raise ConfigError(
            "kv_dtype",
            f"layer {index} stores {', '.join(sorted(names))} and so cannot keep its newest {count} rows beside encoded ones: "
            "store whole keys (kv_layout plain), or leave the + away",
        )
    if any(stream.top_k and stream.name in _WHOLE for stream in layer.streams):
        raise ConfigError("kv_dtype", f"layer {index} reads the rows that an indexer selects, new or old: leave the +{count} away")
    older, newest = zip(*(_divided(stream, count) for stream in layer.streams), strict=True)
    return replace(layer, streams=(*older, *(stream for stream in newest if stream is not None)))


def _divided(stream: Stream, count: int) -> tuple[Stream, Stream | None]:
    """The stream of encoded rows, and that of the newest; a window of no more than these is one stream, in 16 bits."""
    if stream.name not in _WHOLE or stream.tokens_per_row != 1:
        return stream, None
    if stream.window is not None and stream.window <= count:
        return replace(stream, newest_of=stream.name), None
    return replace(stream, behind=count), replace(stream, name=f"{stream.name}_newest", window=count, newest_of=stream.name, native=None)

"""Readers and owners as data: checks a map (one owner for each layer) against what the layers would store, and applies it."""

from __future__ import annotations

from collections.abc import Sequence

from kvshare.errors import ConfigError
from kvshare.layout.cache_layout import LayerCache, Stream
from kvshare.layout.config import Fields


def explicit_owners(fields: Fields, count: int) -> list[int] | None:
    """`kv_sharing`: for each layer the layer whose rows it reads (cross-layer attention, YOCO, any learned map), or None."""
    owners = fields.list_of("kv_sharing", count, int)
    if owners is not None and any(isinstance(owner, bool) for owner in owners):
        raise ConfigError("kv_sharing", "must hold layer numbers, not booleans")
    return owners


PROJECTIONS = ("k", "v")
"""What a reader may see its owner's rows through: A_k on its rotated queries, A_v on what attention sums up."""


def reader_projections(fields: Fields) -> frozenset[str]:
    """`kv_sharing_projections`: which of `PROJECTIONS` every reader of a `kv_sharing` map has a matrix for; none where it is left out."""
    names = fields.get("kv_sharing_projections", [])
    if not isinstance(names, list):
        raise ConfigError("kv_sharing_projections", f"must be a list of some of {', '.join(PROJECTIONS)}, not {names!r}")
    for name in names:
        fields.choice("kv_sharing_projections", name, dict.fromkeys(PROJECTIONS))
    if names and not fields.has("kv_sharing"):
        raise ConfigError("kv_sharing_projections", "without kv_sharing there is no reader that could have them")
    return frozenset(names)


def with_owners(layers: Sequence[LayerCache], owners: Sequence[int], field: str) -> tuple[LayerCache, ...]:
    """`layers`, each described as if it stored its own rows, with those that `owners` makes readers emptied.

    Raises `ConfigError` (naming `field`) where a layer would read a later layer, another reader, or rows of other heads, width or window.
    """
    result = []
    for index, (layer, owner) in enumerate(zip(layers, owners, strict=True)):
        if owner == index:
            result.append(layer)
            continue
        if not 0 <= owner < len(layers):
            raise ConfigError(field, f"layer {index} reads layer {owner}, but there are layers 0 to {len(layers) - 1}")
        if owner > index:
            raise ConfigError(field, f"layer {index} reads layer {owner}, which runs after it")
        if owners[owner] != owner:
            raise ConfigError(
                field, f"layer {index} reads layer {owner}, which stores nothing but reads layer {owners[owner]}: name that one"
            )
        for mine, theirs in zip(layer.streams, layers[owner].streams, strict=True):
            if not mine.holds_same_rows(theirs):
                raise ConfigError(field, f"layer {index} ({_words(mine)}) cannot read layer {owner} ({_words(theirs)}): their rows differ")
        result.append(LayerCache(layer.kind, owner))
    return tuple(result)


def _words(stream: Stream) -> str:
    window = "all rows" if stream.window is None else f"a window of {stream.window}"
    return f"{stream.heads} heads of {stream.width}, {window}"

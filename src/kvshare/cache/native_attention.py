"""Which owners' rows the kernels can attend to where they lie, and the kernel bound to each."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvshare import kernels
from kvshare.cache.arena import Arena
from kvshare.cache.codecs import Codec
from kvshare.kernels.paged_attention import AttendedRows, PagedAttention
from kvshare.kernels.row_kind import WIDEST, kind_and_balance, row_kind
from kvshare.layout import CacheLayout, LayerCache, Stream


class NativeAttention:
    """Kernels by owner and type of queries, bound to an arena when they are first asked for."""

    def __init__(self, layout: CacheLayout, codecs: Mapping[tuple[int, str], Codec]):
        self.layout, self.codecs = layout, codecs
        self._tables = list(codecs)  # in the order of a sequence's tables
        self._bound: dict[tuple[int, torch.dtype], tuple[Arena, PagedAttention | None]] = {}

    def of(self, owner: int, arena: Arena, dtype: torch.dtype) -> PagedAttention | None:
        """The kernel for an owner's rows in this arena and queries of `dtype`; None where only torch can read them."""
        arena_bound, kernel = self._bound.get((owner, dtype), (None, None))
        if arena_bound is not arena:
            kernel = self._bind(owner, arena, dtype)
            self._bound[owner, dtype] = (arena, kernel)
        return kernel

    def read_by_torch(self, dtype: torch.dtype) -> str:
        """The rows ("bf16") that kernels know but do not read for queries of `dtype`; empty where there are none, or no kernels."""
        for owner in self.layout.owners if kernels.available() else ():
            for stream in (each for pair in keys_and_values(self.layout.layers[owner]) for each in pair):
                kind, _ = kind_and_balance(self.codecs[owner, stream.name])
                if kind is not None and not kind.takes(dtype):
                    return kind.name.lower()
        return ""

    def _bind(self, owner: int, arena: Arena, dtype: torch.dtype) -> PagedAttention | None:
        streams = keys_and_values(self.layout.layers[owner])
        if not streams or not kernels.available() or arena.pages.device.type != "cpu":
            return None
        attended, balance = [], None
        for k, v in streams:
            (keys, balance), values = kind_and_balance(self.codecs[owner, k.name]), row_kind(self.codecs[owner, v.name])
            if keys is None or values is None or not (keys.takes(dtype) and values.takes(dtype)) or max(k.width, v.width) > WIDEST:
                return None
            tables = self._tables.index((owner, k.name)), self._tables.index((owner, v.name))
            attended.append(AttendedRows(keys, values, tables, k.window, k.behind))
        k, v = streams[0]
        return PagedAttention(arena, k.heads, (k.width, v.width), attended, dtype, balance)


def keys_and_values(layer: LayerCache) -> list[tuple[Stream, Stream]]:
    """Keys and values of a layer that stores them whole, a row a token, or one vector that is both; behind them those of its newest rows.

    Empty for every other kind of layer.
    """
    if layer.borrowed or any(stream.tokens_per_row != 1 or stream.top_k for stream in layer.streams):
        return []
    names = {stream.source for stream in layer.streams}
    if names == {"k", "v"}:
        pairs = list(zip(*([s for s in layer.streams if s.source == name] for name in ("k", "v")), strict=True))
        return pairs if all((k.heads, k.window, k.behind) == (v.heads, v.window, v.behind) for k, v in pairs) else []
    return [(stream, stream) for stream in layer.streams] if names in ({"kv"}, {"latent"}) else []

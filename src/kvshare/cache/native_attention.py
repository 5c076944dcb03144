"""Which owners' rows the kernels can attend to where they lie, and the kernel bound to each."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvshare import kernels
from kvshare.cache.arena import Arena
from kvshare.cache.codecs import Codec
from kvshare.cache.codecs.raw import RawCodec
from kvshare.kernels.paged_attention import WIDEST, PagedAttention
from kvshare.layout import CacheLayout, LayerCache, Stream


class NativeAttention:
    """Kernels by owner, bound to an arena when they are first asked for."""

    def __init__(self, layout: CacheLayout, codecs: Mapping[tuple[int, str], Codec]):
        self.layout, self.codecs = layout, codecs
        self._bound: dict[int, tuple[Arena, PagedAttention | None]] = {}

    def of(self, owner: int, arena: Arena) -> PagedAttention | None:
        """The kernel for an owner's rows in this arena; None where only torch can read them."""
        arena_bound, kernel = self._bound.get(owner, (None, None))
        if arena_bound is not arena:
            kernel = self._bind(owner, arena)
            self._bound[owner] = (arena, kernel)
        return kernel

    def _bind(self, owner: int, arena: Arena) -> PagedAttention | None:
        streams = keys_and_values(self.layout.layers[owner])
        if streams is None or not kernels.available() or arena.pages.device.type != "cpu":
            return None
        k, v = streams
        codecs = self.codecs[owner, k.name], self.codecs[owner, v.name]
        dtypes = {codec.dtype for codec in codecs if isinstance(codec, RawCodec)}
        if not all(isinstance(codec, RawCodec) for codec in codecs) or not dtypes <= {torch.bfloat16, torch.float32} or v.width > WIDEST:
            return None
        return PagedAttention(arena, k.heads, k.width, v.width, dtypes.pop())


def keys_and_values(layer: LayerCache) -> tuple[Stream, Stream] | None:
    """The streams of a layer that stores whole keys and values, a row a token, or one vector that is both. None for every other kind."""
    streams = {stream.name: stream for stream in layer.streams}
    if layer.borrowed or any(stream.tokens_per_row != 1 or stream.top_k for stream in layer.streams):
        return None
    if set(streams) == {"k", "v"}:
        k, v = streams["k"], streams["v"]
        return (k, v) if (k.heads, k.window) == (v.heads, v.window) else None
    if len(streams) == 1 and set(streams) <= {"kv", "latent"}:
        return layer.streams[0], layer.streams[0]
    return None

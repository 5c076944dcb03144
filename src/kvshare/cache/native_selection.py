"""Which indexers' keys the kernels can score where they lie, and the kernel bound to each."""

from __future__ import annotations

from collections.abc import Mapping

from kvshare import kernels
from kvshare.cache.arena import Arena
from kvshare.cache.codecs import Codec
from kvshare.kernels.row_kind import WIDEST, row_kind
from kvshare.kernels.row_selection import RowSelection
from kvshare.layout import CacheLayout


class NativeSelection:
    """Kernels by owner, bound to an arena when they are first asked for."""

    def __init__(self, layout: CacheLayout, codecs: Mapping[tuple[int, str], Codec]):
        self.layout, self.codecs = layout, codecs
        self._bound: dict[int, tuple[Arena, RowSelection | None]] = {}

    def of(self, owner: int, arena: Arena) -> RowSelection | None:
        """The kernel for an owner's stream "index" in this arena; None where only torch can read it."""
        arena_bound, kernel = self._bound.get(owner, (None, None))
        if arena_bound is not arena:
            kernel = self._bind(owner, arena)
            self._bound[owner] = (arena, kernel)
        return kernel

    def _bind(self, owner: int, arena: Arena) -> RowSelection | None:
        stream = next((stream for stream in self.layout.layers[owner].streams if stream.name == "index"), None)
        if stream is None or not kernels.available() or arena.pages.device.type != "cpu":
            return None
        kind = row_kind(self.codecs[owner, "index"])
        if kind is None or stream.heads != 1 or stream.width % 2 or stream.width > WIDEST or stream.window is not None:
            return None
        return RowSelection(arena, stream, kind)

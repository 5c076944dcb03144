"""Which owners' rows many queries can attend to where they lie, and the kernel bound to each."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kvshare import kernels
from kvshare.cache.arena import Arena
from kvshare.cache.codecs import Codec
from kvshare.cache.native_attention import keys_and_values
from kvshare.cache.tables import PageTable
from kvshare.kernels.native import module
from kvshare.kernels.row_kind import WIDEST, RowKind, kind_and_balance, row_kind
from kvshare.kernels.step_spans import StepSpans
from kvshare.kernels.tile_attention import Rows, TileAttention, TileSpan
from kvshare.layers.key_from_value import KeyFromValue
from kvshare.layout import CacheLayout, LayerCache, Stream

MANY_HEADS = 32
"""Query heads of one KV head from which on a single query, too, is bound by multiplying and not by reading."""

MANY_HEADS_OF_AMX = 16
"""The same for rows of bfloat16 with AMX, by count: vectors multiply 16 heads with 64 / 16 = 4 bytes a cycle, tiles with about 16."""


class TiledRows:
    """The rows that one owner's queries attend to: one kind, or several in one softmax."""

    def __init__(self, owner: int, kinds: list[tuple[Stream, Stream]], kernel: TileAttention, tables: list[tuple[int, int]], plain: bool):
        """`tables`: which of a sequence's tables hold the keys and the values of each kind. `plain`: all of them are bfloat16."""
        self.owner, self.kinds, self.kernel, self._tables, self._plain = owner, kinds, kernel, tables, plain

    def takes(self, count: int, query_heads: int, entries: Tensor | None) -> bool:
        """Whether the kernel is the way for `count` queries of one sequence, rather than the one for single queries."""
        selected = entries is not None and any(k.top_k for k, _ in self.kinds)
        many = MANY_HEADS_OF_AMX if self._plain and kernels.isa() == "amx" else MANY_HEADS
        return count > 1 or selected or len(self.kinds) > 1 or query_heads >= many * self.kernel.kv_heads

    def span(self, start: int, count: int, tables: Mapping[tuple[int, str], PageTable], entries: Tensor | None) -> TileSpan:
        """Queries `start : start + count` of the batch, of the sequence whose tables these are."""
        chosen = None if entries is None else entries[start : start + count]
        rows = [Rows(tables[self.owner, k.name], tables[self.owner, v.name], chosen if k.top_k else None) for k, v in self.kinds]
        return TileSpan(start, count, rows)

    def attend_singles(
        self,
        q: Tensor,  # bfloat16 [tokens, query_heads, key_width]
        out: Tensor,  # bfloat16 [tokens, query_heads, value_width]: the rows of single queries are written
        spans: StepSpans,
        entries: Tensor | None,  # int64 [tokens, n] of each query, as `TileAttention.Rows` has them
        *,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
        rebuild: KeyFromValue | None,
    ) -> None:
        """Attention of those queries that are their sequence's only ones in `spans`. Raises `IndexError` where pages are missing."""
        chosen = [entries if k.top_k else None for k, _ in self.kinds]
        self.kernel.attend_singles(q, out, spans, self._tables, chosen, scale=scale, softcap=softcap, sinks=sinks, rebuild=rebuild)


class TiledAttention:
    """Kernels by owner, bound to an arena when they are first asked for."""

    def __init__(self, layout: CacheLayout, codecs: Mapping[tuple[int, str], Codec]):
        self.layout, self.codecs = layout, codecs
        self._tables = list(codecs)  # in the order of a sequence's tables
        self._bound: dict[int, tuple[Arena, TiledRows | None]] = {}

    def of(self, owner: int, arena: Arena) -> TiledRows | None:
        """The kernel for an owner's rows in this arena; None where only torch can read them."""
        arena_bound, rows = self._bound.get(owner, (None, None))
        if arena_bound is not arena:
            rows = self._bind(owner, arena)
            self._bound[owner] = (arena, rows)
        return rows

    def _bind(self, owner: int, arena: Arena) -> TiledRows | None:
        kinds = attended_kinds(self.layout.layers[owner])
        if not kinds or not kernels.available() or arena.pages.device.type != "cpu":
            return None
        bound, balance = [], None
        for k, v in kinds:
            (of_keys, balance), of_values = kind_and_balance(self.codecs[owner, k.name]), row_kind(self.codecs[owner, v.name])
            if of_keys is None or of_values is None or max(k.width, v.width) > WIDEST:
                return None
            bound.append((k, of_keys, v, of_values))
        rebuilds = is_rebuilt(self.layout.layers[owner])
        if rebuilds and any(kind.rotated for _, *both in bound for kind in (both[0], both[2])):
            return None  # weights and rotations of keys are those of the numbers before
        if len({(of_keys.rotated, of_values.rotated) for _, of_keys, _, of_values in bound}) > 1:
            return None
        tables = [(self._tables.index((owner, k.name)), self._tables.index((owner, v.name))) for k, v in kinds]
        most_rows = self._most_rebuilt(arena, *bound[0][2:]) if rebuilds else 0
        plain = all(kind.name == "BF16" for _, of_keys, _, of_values in bound for kind in (of_keys, of_values))
        return TiledRows(owner, kinds, TileAttention(arena, bound, balance, rebuilds=rebuilds, most_rows=most_rows), tables, plain)

    def _most_rebuilt(self, arena: Arena, values: Stream, kind: RowKind) -> int:
        """Values that one sequence can have in each of the layers that rebuild keys: their pages are the arena's."""
        owners = [owner for owner in self.layout.owners if is_rebuilt(self.layout.layers[owner])]
        return arena.num_pages // len(owners) * (arena.page_bytes // (values.heads * module().head_bytes(kind.native, values.width)))


def attended_kinds(layer: LayerCache) -> list[tuple[Stream, Stream]]:
    """Keys and values of each kind of row in a layer, of even and equal widths; none where kernels cannot read them.

    Where keys are rebuilt, their rotated part stands for them, or the values themselves.
    """
    streams = [stream for stream in layer.streams if stream.name != "index"]
    names = {stream.source for stream in streams}
    if layer.borrowed:
        return []
    if names == {"k", "v"}:
        kinds = keys_and_values(layer)
    elif is_rebuilt(layer):
        kinds = [(layer.stream("k_rotated" if "k_rotated" in names else "v"), layer.stream("v"))]
    else:
        kinds = [(stream, stream) for stream in streams] if names <= {"kv", "entry", "latent"} else []
    shapes = {(k.heads, k.width, v.width) for k, v in kinds}
    return kinds if len(shapes) == 1 and not any(width % 2 for _, *widths in shapes for width in widths) else []


def is_rebuilt(layer: LayerCache) -> bool:
    """Whether a layer stores values, and keys are made from them."""
    return not layer.borrowed and {stream.name for stream in layer.streams} in ({"v"}, {"v", "k_rotated"})

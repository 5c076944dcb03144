"""Attention of many queries straight from the arena's pages: prompts, and many heads on one row. Its twin is `kvshare.layers.attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvshare.cache.arena import Arena
from kvshare.kernels.native import module
from kvshare.kernels.row_kind import RowKind, stream_shape
from kvshare.kernels.step_spans import StepSpans

if TYPE_CHECKING:
    from kvshare.cache.tables import PageTable
    from kvshare.layers.key_from_value import KeyFromValue
    from kvshare.layout import Stream


class Rows(NamedTuple):
    """Rows of a sequence in one kind: all that a query's position lets it see, or `chosen` ones."""

    keys: PageTable
    values: PageTable
    chosen: Tensor | None = None  # int64 [queries, n] of each query, ascending, -1 behind the last


class TileSpan(NamedTuple):
    """Rows `start : start + num_queries` of the batch: the queries of one sequence, at ascending positions, and what they attend to."""

    start: int
    num_queries: int
    rows: Sequence[Rows]  # of each kind


class TileAttention:
    """Attention of bfloat16 queries to the rows of one owner, of one kind or of several in one softmax.

    A kind is a stream of keys and one of values, or one that is both. Queries of a KV head stand in the lanes of vectors, 64 at a
    time, and meet 96 rows at a time (a running softmax over tiles: Dao et al. 2022, "FlashAttention"). Encoded rows are decoded tile
    by tile, to bfloat16; rotated ones stay rotated, while queries are rotated and results rotated back, each rounded to bfloat16.

    Queries that select rows share none: each attends to its own, the heads of its token together.

    Tiles begin at the same rows for every query: how a prompt is cut in chunks changes the result only where a sequence has so few
    queries that its rows are shared among threads; neither the batch nor the number of threads changes a bit.
    """

    def __init__(
        self,
        arena: Arena,
        kinds: Sequence[tuple[Stream, RowKind, Stream, RowKind]],
        balance: Tensor | None = None,  # [kv_heads, key_width], powers of two
        *,
        rebuilds: bool = False,
        most_rows: int = 0,
    ):
        """`kinds`: keys and how they are encoded, values and how they are. Heads, widths (even) and rotation are the same in all.

        `balance` is what keys were divided by before they were encoded: queries are multiplied by it. With `rebuilds` keys follow from the
        values, a tile at a time; their stream is that of the values, or holds the part of them that a rotation moved. `most_rows` is then
        how many rows a sequence can have in this arena.
        """
        self.arena, self.balance = arena, balance
        k, _, v, _ = kinds[0]
        self.rebuilds, self._most_rows = rebuilds, most_rows
        self.kv_heads, self.key_width, self.value_width = k.heads, v.width if rebuilds else k.width, v.width
        streams = []
        for k, kind_of_keys, v, kind_of_values in kinds:
            shapes = stream_shape(arena, k.heads, k.width, kind_of_keys), stream_shape(arena, v.heads, v.width, kind_of_values)
            streams.append((*shapes, k is v, k.tokens_per_row, k.window or 0, k.behind))
        self._turns = rebuilds and kinds[0][0] is kinds[0][2]  # whether keys are rotated here
        self._native = module().TileAttention(arena.pages.data_ptr(), arena.page_bytes, streams, self.kv_heads, rebuilds)

    def attend(
        self,
        q: Tensor,  # bfloat16 [tokens, query_heads, key_width]
        out: Tensor,  # bfloat16 [tokens, query_heads, value_width]: the rows of `spans` are written
        positions: Tensor,  # int64 [tokens]
        spans: Sequence[TileSpan],
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,  # [query_heads]
        rebuild: KeyFromValue | None = None,  # where the kernel `rebuilds`
    ) -> None:
        assert positions.dtype == torch.int64
        assert positions.is_contiguous()
        q, sinks = self._prepared(q, out), None if sinks is None else sinks.float().contiguous()
        assert all(each.chosen is None or each.chosen.is_contiguous() for span in spans for each in span.rows)
        places = [(start, count, [_addresses(*each) for each in rows]) for start, count, rows in spans]
        self._native.attend(
            q.data_ptr(),
            out.data_ptr(),
            positions.data_ptr(),
            q.shape[1],
            places,
            scale,
            softcap or 0.0,
            0 if sinks is None else sinks.data_ptr(),
            self._rebuild(rebuild, spans),
        )

    def attend_singles(
        self,
        q: Tensor,  # bfloat16 [tokens, query_heads, key_width]
        out: Tensor,  # bfloat16 [tokens, query_heads, value_width]: the rows of single queries are written
        spans: StepSpans,
        tables: Sequence[tuple[int, int]],  # of keys and of values, as a sequence counts its tables, for each kind
        chosen: Sequence[Tensor | None],  # as in `Rows`, of all tokens, for each kind
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,  # [query_heads]
        rebuild: KeyFromValue | None = None,
    ) -> None:
        """The same for those queries that are their sequence's only ones in `spans`. Raises `IndexError` where pages are missing."""
        q, sinks = self._prepared(q, out), None if sinks is None else sinks.float().contiguous()
        assert all(each is None or each.is_contiguous() for each in chosen)
        rows = [(0, -1) if each is None else (each.data_ptr(), each.shape[1]) for each in chosen]
        kinds = [(*both, *each) for both, each in zip(tables, rows, strict=True)]
        limits = scale, softcap or 0.0, 0 if sinks is None else sinks.data_ptr()
        self._native.attend_singles(*spans.where, q.data_ptr(), out.data_ptr(), q.shape[1], kinds, *limits, self._rebuild_all(rebuild))

    def _prepared(self, q: Tensor, out: Tensor) -> Tensor:
        """Queries as the kernel takes them."""
        assert q.dtype == out.dtype == torch.bfloat16
        assert q.shape[1] % self.kv_heads == 0
        assert q.shape[2] == self.key_width
        assert out.shape[2] == self.value_width
        assert out.is_contiguous()
        if self.balance is not None:
            q = (q.unflatten(1, (self.kv_heads, -1)) * self.balance[:, None]).flatten(1, 2)
        return q.contiguous()

    def _rebuild_all(self, rebuild: KeyFromValue | None) -> tuple[int, int, int, int]:
        """What `_rebuild` gives, for all rows that a sequence may have."""
        if rebuild is None:
            return self._rebuild(None, ())
        weight, moving = rebuild.weight, rebuild.rotations.moving
        if not self._turns:
            return weight.data_ptr(), 0, 0, moving
        cos, sin = rebuild.rotations.table(self._most_rows)
        return weight.data_ptr(), cos.data_ptr(), sin.data_ptr(), moving

    def _rebuild(self, rebuild: KeyFromValue | None, spans: Sequence[TileSpan]) -> tuple[int, int, int, int]:
        """Addresses of the norm's weight, and of cosines and sines for every row where the kernel is to rotate; and how many pairs."""
        if not self.rebuilds:
            return 0, 0, 0, 0
        assert rebuild is not None
        weight, moving = rebuild.weight, rebuild.rotations.moving
        assert weight.dtype == torch.bfloat16
        assert weight.is_contiguous()
        ends = [rows.values.end_page * rows.values.rows_per_page for span in spans for rows in span.rows if rows.keys is rows.values]
        if not ends:
            return weight.data_ptr(), 0, 0, moving
        cos, sin = rebuild.rotations.table(max(ends))
        return weight.data_ptr(), cos.data_ptr(), sin.data_ptr(), moving


def _addresses(keys: PageTable, values: PageTable, chosen: Tensor | None) -> tuple[int, int, int, int, int, int]:
    address, count = (0, -1) if chosen is None else (chosen.data_ptr(), chosen.shape[1])
    return keys.pages.buffer_info()[0], keys.first_page, values.pages.buffer_info()[0], values.first_page, address, count

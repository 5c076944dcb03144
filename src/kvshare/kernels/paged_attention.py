"""Attention of decode steps straight from the arena's pages. Its twin in plain torch is `kvshare.layers.attention`, on gathered rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvshare.cache.arena import Arena
from kvshare.kernels.native import module
from kvshare.kernels.row_kind import RowKind, stream_shape
from kvshare.kernels.step_spans import StepSpans


class AttendedRows(NamedTuple):
    """One kind of row that queries attend to: how keys and values are spelled, and which rows of a sequence a query sees."""

    keys: RowKind
    values: RowKind
    tables: tuple[int, int] = (0, 1)  # of keys and of values, as a sequence counts its tables
    window: int | None = None  # the newest rows, the query's own included; None: all
    behind: int = 0  # but not the newest of these


class PagedAttention:
    """Attention to the rows of one owner: keys in one stream, values in another or the same; of one kind, or of several in one softmax.

    Rows hold `kv_heads` vectors one behind the other, spelled as `rows` say, and are decoded in registers: codes meet the
    query and the weights as integers. Rounded on the way, per head: the query, to 8 bits of its largest number, in INT8 of the largest of
    each 16 numbers, in INT4 of each 32 (INT9: to 16 bits); the weights of 32 rows, times their scales, to 8 bits of the largest of
    them (INT9: 16), up or down so that many small ones keep their sum: each is off by less than 1/255 of the largest; what minima of
    INT4 values meet, and they, to bfloat16; and what the rotated codecs call levels, to multiples of 1/127 of the largest level. With
    FP8 queries and weights become bfloat16. Instruction sets below AVX512 round nothing. Rotated rows stay rotated: the query is
    rotated instead, and the output back.

    Each sequence is cut in parts, which all threads share and whose sums are then merged (Dao et al. 2023, "Flash-Decoding"). The cut
    depends on the sequence's own length alone: neither the batch nor the number of threads changes a bit of the result.
    """

    def __init__(
        self,
        arena: Arena,
        kv_heads: int,
        widths: tuple[int, int],  # of keys and of values
        rows: Sequence[AttendedRows],  # of each kind; rotated and balanced alike
        dtype: torch.dtype,  # of queries and output, bfloat16 or float32; of plain rows, too
        balance: Tensor | None = None,  # [kv_heads, key width]: what keys were divided by before they were encoded
    ):
        assert dtype in (torch.bfloat16, torch.float32)
        assert all(each.keys.takes(dtype) and each.values.takes(dtype) for each in rows)
        assert len({(each.keys.rotated, each.values.rotated) for each in rows}) == 1
        self.arena, self.kv_heads, self.dtype = arena, kv_heads, dtype
        self.key_width, self.value_width = widths
        shapes = []
        for keys, values, tables, window, behind in rows:
            streams = stream_shape(arena, kv_heads, widths[0], keys, balance), stream_shape(arena, kv_heads, widths[1], values)
            shapes.append((*streams, *tables, window or 0, behind))
        self._native = module().PagedAttention(arena.pages.data_ptr(), arena.page_bytes, shapes, kv_heads, dtype == torch.bfloat16)

    def attend(
        self,
        q: Tensor,  # [tokens, query_heads, key_width]
        out: Tensor,  # [tokens, query_heads, value_width]: the rows of single queries are written
        spans: StepSpans,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,  # [query_heads]
    ) -> None:
        """Attention of those queries that are their sequence's only ones in `spans`. Raises `IndexError` where pages are missing."""
        heads = q.shape[1]
        assert q.dtype == out.dtype == self.dtype
        assert heads % self.kv_heads == 0
        assert q.shape[2] == self.key_width
        assert out.shape[2] == self.value_width
        assert out.is_contiguous()
        q = q.contiguous()
        sinks = None if sinks is None else sinks.float().contiguous()
        addresses = q.data_ptr(), out.data_ptr()
        self._native.attend(*spans.where, *addresses, heads, scale, softcap or 0.0, 0 if sinks is None else sinks.data_ptr())

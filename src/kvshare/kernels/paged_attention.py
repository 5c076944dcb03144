"""Attention of decode steps straight from the arena's pages. Its twin in plain torch is `kvshare.layers.attention`, on gathered rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvshare.cache.arena import Arena
from kvshare.kernels.native import module

if TYPE_CHECKING:
    from kvshare.cache.tables import PageTable

WIDEST = 2048  # numbers in one head's values


class Query(NamedTuple):
    """The query in row `row` of the batch, which sees rows `first:end` of the cached rows that the two tables lead to."""

    row: int
    first: int
    end: int
    keys: PageTable
    values: PageTable


class PagedAttention:
    """Attention to the rows of one owner: keys in one stream, values in another or the same.

    Rows hold `kv_heads` vectors of bfloat16 or float32 one behind the other. Each sequence is cut in parts, which all threads share
    and whose sums are then merged (Dao et al. 2023, "Flash-Decoding"). The cut depends on the sequence's own length alone: neither
    the batch nor the number of threads changes a bit of the result.
    """

    def __init__(self, arena: Arena, kv_heads: int, key_width: int, value_width: int, dtype: torch.dtype):
        self.arena, self.kv_heads, self.key_width, self.value_width, self.dtype = arena, kv_heads, key_width, value_width, dtype
        shapes = []
        for width in (key_width, value_width):
            row_bytes = kv_heads * width * dtype.itemsize
            shapes.append((row_bytes, arena.page_bytes // row_bytes, width))
        self._native = module().PagedAttention(arena.pages.data_ptr(), arena.page_bytes, *shapes, kv_heads, dtype == torch.bfloat16)

    def attend(
        self,
        q: Tensor,  # [tokens, query_heads, key_width], in the dtype of the rows
        out: Tensor,  # [tokens, query_heads, value_width]: the rows of `queries` are written
        queries: list[Query],
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,  # [query_heads]
    ) -> None:
        heads = q.shape[1]
        assert q.dtype == out.dtype == self.dtype
        assert heads % self.kv_heads == 0
        assert q.shape[2] == self.key_width
        assert out.shape[2] == self.value_width
        assert out.is_contiguous()
        q = q.contiguous()
        sinks = None if sinks is None else sinks.float().contiguous()
        places = [
            (row, first, end, keys.pages.buffer_info()[0], keys.first_page, values.pages.buffer_info()[0], values.first_page)
            for row, first, end, keys, values in queries
        ]
        self._native.attend(q.data_ptr(), out.data_ptr(), heads, places, scale, softcap or 0.0, 0 if sinks is None else sinks.data_ptr())

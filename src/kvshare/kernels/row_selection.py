"""An indexer's choice of rows straight from the arena's pages. Its twin in plain torch is `kvshare.layers.indexer`."""

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
    from kvshare.layout import Stream


class SelectionSpan(NamedTuple):
    """Rows `start : start + num_queries` of the batch: the queries of one sequence, at ascending positions, and its keys."""

    start: int
    num_queries: int
    keys: PageTable


class RowSelection:
    """Scores of an indexer's keys and the best of them, for bfloat16 queries.

    Products of bfloat16 numbers are summed up in float32, as the twin does in another order: where two scores differ by less than some
    2^-20 of the products' sizes, the twin may choose the other one. Encoded keys are decoded to bfloat16; rotated ones stay rotated,
    while queries are rotated and rounded once more. A score depends on its query and its key alone, and equal scores go to the earlier
    row, so that neither the batch, nor chunks, nor threads change a choice.
    """

    def __init__(self, arena: Arena, stream: Stream, kind: RowKind):
        assert stream.heads == 1
        assert stream.width % 2 == 0
        self.arena, self.stream = arena, stream
        shape = stream_shape(arena, 1, stream.width, kind)
        self._native = module().RowSelection(arena.pages.data_ptr(), arena.page_bytes, shape, stream.tokens_per_row)

    def select(
        self,
        q: Tensor,  # bfloat16 [tokens, index_heads, width]
        weights: Tensor,  # float32 [tokens, index_heads]
        positions: Tensor,  # int64 [tokens]
        spans: Sequence[SelectionSpan],  # which hold every token
        top_k: int,
    ) -> Tensor:  # int64 [tokens, top_k], ascending, -1 behind the last
        assert q.dtype == torch.bfloat16
        assert q.shape[2] == self.stream.width
        assert weights.dtype == torch.float32
        assert weights.shape == q.shape[:2]
        assert positions.is_contiguous()
        q, weights = q.contiguous(), weights.contiguous()
        chosen = torch.empty(len(q), top_k, dtype=torch.int64)
        places = [(start, count, keys.pages.buffer_info()[0], keys.first_page) for start, count, keys in spans]
        addresses = q.data_ptr(), weights.data_ptr(), positions.data_ptr()
        self._native.select(*addresses, q.shape[1], places, top_k, chosen.data_ptr())
        return chosen

    def select_singles(
        self,
        q: Tensor,  # bfloat16 [sequences, index_heads, width]
        weights: Tensor,  # bfloat16 or float32 [sequences, index_heads]
        spans: StepSpans,  # of one token a sequence
        table: int,  # of keys, as a sequence counts its tables
        top_k: int,
        scale: float,  # on weights
    ) -> Tensor:  # int64 [sequences, top_k], ascending, -1 behind the last
        """The same for the single queries of a step. Raises `IndexError` where pages are missing."""
        assert q.dtype == torch.bfloat16
        assert q.shape[2] == self.stream.width
        assert weights.shape == q.shape[:2]
        q, weights = q.contiguous(), weights.contiguous()
        chosen = torch.empty(len(q), top_k, dtype=torch.int64)
        given = weights.data_ptr(), weights.dtype == torch.bfloat16, scale, q.shape[1]
        self._native.select_singles(*spans.where, q.data_ptr(), *given, table, top_k, chosen.data_ptr())
        return chosen

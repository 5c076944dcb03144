"""New rows of all sequences of a step to their pages in one native call. Its twin in plain torch is `PagedStep`'s own loop."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from kvshare.cache.arena import Arena
from kvshare.kernels.native import module

if TYPE_CHECKING:
    from kvshare.cache.tables import SequenceCache


class NewRows:
    """Where the tokens of a step go, found once for all layers: `counts[s]` rows behind the `past[s]` that sequence s has."""

    def __init__(self, arena: Arena, caches: Sequence[SequenceCache], past: Sequence[int], counts: Sequence[int]):
        self._runs = [cache.page_runs for cache in caches]  # keeps what the addresses lead to alive
        self._places = array("q")
        for runs, first, count in zip(self._runs, past, counts, strict=True):
            self._places.extend((runs.buffer_info()[0], first, count))
        self._where = arena.pages.data_ptr(), arena.page_bytes, self._places.buffer_info()[0], len(self._runs)
        self._append = module().append_rows

    def write(self, table: int, rows_per_page: int, row_bytes: int, rows: Tensor) -> None:  # [rows of all sequences, ...]
        """The rows of one stream, which is the `table`-th of a sequence's; each in one piece, of `row_bytes` in all.

        Raises `IndexError` where pages were not reserved.
        """
        self._append(*self._where, table, row_bytes, rows_per_page, rows.data_ptr(), rows.stride(0) * rows.element_size())

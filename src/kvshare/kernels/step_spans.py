"""Where the tokens of a step stand, and the pages that hold their sequences' rows: what kernels are told of a step, once for all layers."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from kvshare.cache.arena import Arena
from kvshare.kernels.native import module


class TokenSpan(NamedTuple):
    """New tokens of one sequence: rows `row : row + num_tokens` of the batch, at positions `first ...`."""

    page_runs: array[int]  # as `SequenceCache.page_runs`: a sequence's tables are counted in this order
    first: int
    num_tokens: int
    row: int


class StepSpans:
    """The tokens of a step. Their rows may be appended, and single ones may attend (`kvshare.kernels.paged_attention`)."""

    def __init__(self, spans: Sequence[TokenSpan]):
        self._page_runs = [span.page_runs for span in spans]  # keeps what the addresses lead to alive
        self._numbers = array("q")
        for page_runs, *place in spans:
            self._numbers.extend((page_runs.buffer_info()[0], *place))
        self.where = self._numbers.buffer_info()[0], len(self._page_runs)
        """What native calls take: an address and how many spans lie there."""

    def append(
        self,
        arena: Arena,
        table: int,
        rows_per_page: int,
        row_bytes: int,
        rows: Tensor,  # [tokens, ...]
        tokens_per_row: int = 1,
    ) -> None:
        """Write the rows of all tokens to the sequences' `table`-th tables; each row in one piece, of `row_bytes` in all.

        Of `tokens_per_row` tokens only the last one's row is written.
        Its twin in plain torch is `PagedStep`'s own loop. Raises `IndexError` where pages were not reserved.
        """
        places = arena.pages.data_ptr(), arena.page_bytes, table, row_bytes, rows_per_page
        module().append_rows(*self.where, *places, rows.data_ptr(), rows.stride(0) * rows.element_size(), tokens_per_row)

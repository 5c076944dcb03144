"""One buffer, cut in equal pages, for every layer, stream and sequence. The arena knows bytes and pages, never what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

import torch
from torch import Tensor

from kvshare.errors import CapacityError
from kvshare.huge_pages import empty_huge


class Arena:
    """`num_pages` pages of `page_bytes` each, interchangeable between layers, windows and codecs.

    A page is handed out by `allocate` with one reference, may be shared with `retain`, and returns to the free list when
    `release` drops its last reference. Contents are undefined on allocation.
    """

    def __init__(self, num_pages: int, page_bytes: int, device: torch.device | str = "cpu"):
        self.page_bytes = page_bytes
        memory = (
            empty_huge(num_pages * page_bytes)
            if torch.device(device).type == "cpu"
            else torch.empty(num_pages * page_bytes, dtype=torch.uint8, device=device)
        )
        self.pages = memory.view(num_pages, page_bytes)  # untouched pages cost no memory
        self._free = list(range(num_pages))  # a heap: what is taken together lies together, in order, which processors read faster
        self._references = [0] * num_pages
        self.peak_pages = 0
        self._row_views: dict[int, Tensor] = {}

    @property
    def num_pages(self) -> int:
        return len(self._references)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return len(self._references) - len(self._free)

    @property
    def held_bytes(self) -> int:
        return self.num_held * self.page_bytes

    @property
    def peak_bytes(self) -> int:
        """Most bytes held at once since the last `reset_peak`, inside steps included."""
        return self.peak_pages * self.page_bytes

    def reset_peak(self) -> None:
        self.peak_pages = self.num_held

    def allocate(self, count: int) -> list[int]:
        """The first `count` free pages, in order, or `CapacityError` and none at all."""
        if count > len(self._free):
            raise CapacityError(
                f"the cache needs {count} more pages of {self.page_bytes:,} bytes, but only {len(self._free)} of {self.num_pages} are free"
            )
        taken = [heappop(self._free) for _ in range(count)]
        for page in taken:
            self._references[page] = 1
        self.peak_pages = max(self.peak_pages, self.num_held)
        return taken

    def retain(self, pages: Iterable[int]) -> None:
        """One more holder for pages that are already held."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free"
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one reference to each page; the last one frees it."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is released twice"
            self._references[page] -= 1
            if self._references[page] == 0:
                heappush(self._free, page)

    def is_shared(self, page: int) -> bool:
        return self._references[page] > 1

    def copy_page(self, source: int, target: int) -> None:
        self.pages[target].copy_(self.pages[source])

    def rows(self, row_bytes: int) -> Tensor:
        """The whole buffer seen as rows of `row_bytes`: uint8 [num_pages, rows_per_page, row_bytes]."""
        view = self._row_views.get(row_bytes)
        if view is None:
            count = self.page_bytes // row_bytes
            view = self._row_views[row_bytes] = self.pages[:, : count * row_bytes].unflatten(1, (count, row_bytes))
        return view

    def gather(self, pages: Sequence[int], row_bytes: int) -> Tensor:
        """All rows of some pages behind one another, uint8 [len(pages) * rows_per_page, row_bytes]: a view of one, a copy of several."""
        if len(pages) == 1:
            return self.rows(row_bytes)[pages[0]]
        count = self.page_bytes // row_bytes
        copied = self.pages.index_select(0, torch.tensor(pages, device=self.pages.device))[:, : count * row_bytes]
        return copied.reshape(len(pages) * count, row_bytes)

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless free and held pages make up the whole, each page once."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page stands twice in the free list"
        for page, references in enumerate(self._references):
            assert (page in free) == (references == 0), (
                f"page {page} has {references} references and is {'free' if page in free else 'held'}"
            )

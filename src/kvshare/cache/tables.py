"""Which pages hold the rows of one sequence: a table for each owner and stream, and pages for its states."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvshare.cache.arena import Arena
from kvshare.layout import CacheLayout, PrecisionChoice, Stream


@dataclass(slots=True)
class PageTable:
    """The pages of one (owner, stream): page `first_page + i` of its unbounded row space is the arena's page `pages[i]`."""

    owner: int
    stream: Stream
    rows_per_page: int
    first_page: int = 0
    pages: array[int] = field(default_factory=lambda: array("i"))  # 32-bit, in one piece: kernels read it where it lies

    @property
    def end_page(self) -> int:
        return self.first_page + len(self.pages)

    @property
    def tokens_placed(self) -> int:
        """The most tokens whose rows have a place."""
        return (self.end_page * self.rows_per_page + 1) * self.stream.tokens_per_row - 1

    @property
    def tokens_until_drop(self) -> int:
        """With so many tokens the first page holds only rows in front of the window."""
        assert self.stream.window is not None
        return ((self.first_page + 1) * self.rows_per_page + self.stream.window) * self.stream.tokens_per_row

    def missing_pages(self, num_tokens: int) -> int:
        """Pages to add before the rows of the first `num_tokens` tokens all have a place."""
        return max(0, -(-self.stream.num_rows(num_tokens) // self.rows_per_page) - self.end_page)

    def drop_dead_pages(self, num_tokens: int) -> Sequence[int]:
        """Forget the pages that hold only rows in front of the window after `num_tokens` tokens; returns them."""
        dead = self.stream.first_row(num_tokens) // self.rows_per_page - self.first_page
        if dead <= 0:
            return ()
        dropped, self.pages = self.pages[:dead], self.pages[dead:]
        self.first_page += dead
        return dropped


def page_runs(tables: Iterable[PageTable]) -> array[int]:
    """Of each table: the address of its pages, its first page, and how many it has. 64-bit; true until one of them changes."""
    return array("q", (number for t in tables for number in (t.pages.buffer_info()[0], t.first_page, len(t.pages))))


class SequenceCache:
    """One sequence's share of the arena.

    The order of a step is `reserve(n)`, the forward pass, `commit(n)`. Between steps the pages held are exactly
    `layout.held_pages(num_tokens)`.
    """

    def __init__(self, layout: CacheLayout, arena: Arena, precision: PrecisionChoice = "bf16"):
        self.layout, self.arena, self.precision = layout, arena, precision
        self.num_tokens = 0
        stored, page_bytes = layout.stored_in(precision), layout.page_bytes(precision)
        self.tables = {
            (owner, stream.name): PageTable(owner, stream, stored.rows_per_page(owner, stream, precision, page_bytes))
            for owner in layout.owners
            for stream in stored.layers[owner].streams
        }
        self.state_pages = array("i")  # 32-bit, in one piece, as those of tables
        self._tokens_placed = 0  # so many tokens have their places, in pages that nobody else holds
        self._tokens_until_drop = 0  # with fewer tokens nothing falls out of a window
        self._page_runs: array[int] | None = None

    @property
    def page_runs(self) -> array[int]:
        """`page_runs` of all tables, and behind them the state pages as one more; replaced when they change."""
        if self._page_runs is None:
            self._page_runs = page_runs(self.tables.values())
            self._page_runs.extend((self.state_pages.buffer_info()[0], 0, len(self.state_pages)))
        return self._page_runs

    def missing_pages(self, num_new_tokens: int) -> int:
        """Pages that `reserve(num_new_tokens)` would take: new ones, and copies of shared pages that would be written."""
        end = self.num_tokens + num_new_tokens
        if end <= self._tokens_placed:
            return 0
        states = 0 if self.state_pages else -(-self.layout.state_bytes // self.arena.page_bytes)
        return states + sum(table.missing_pages(end) for table in self.tables.values()) + len(self._shared_open_pages(end))

    def reserve(self, num_new_tokens: int) -> None:
        """Give every row of the next `num_new_tokens` tokens a place; all or nothing (`CapacityError`)."""
        end = self.num_tokens + num_new_tokens
        if end <= self._tokens_placed:
            return
        free = iter(self.arena.allocate(self.missing_pages(num_new_tokens)))
        for table in self._shared_open_pages(end):
            fresh, old = next(free), table.pages[-1]
            self.arena.copy_page(old, fresh)
            self.arena.release((old,))
            table.pages[-1] = fresh
        if not self.state_pages and self.layout.state_bytes:
            self.state_pages = array("i", (next(free) for _ in range(-(-self.layout.state_bytes // self.arena.page_bytes))))
            for page in self.state_pages:
                self.arena.pages[page].zero_()
        for table in self.tables.values():
            missing = table.missing_pages(end)
            if missing:
                table.pages.extend(next(free) for _ in range(missing))
        self._page_runs = None
        shared = any(table.pages and self.arena.is_shared(table.pages[-1]) for table in self.tables.values())
        self._tokens_placed = 0 if shared else min((table.tokens_placed for table in self.tables.values()), default=end)

    def commit(self, num_new_tokens: int) -> None:
        """The step has appended these tokens: free what fell out of its window."""
        self.num_tokens += num_new_tokens
        if self.num_tokens < self._tokens_until_drop:
            return
        windows = [table for table in self.tables.values() if table.stream.window is not None]
        for table in windows:
            self.arena.release(table.drop_dead_pages(self.num_tokens))
        self._page_runs = None
        self._tokens_until_drop = min((table.tokens_until_drop for table in windows), default=sys.maxsize)

    def fork(self) -> SequenceCache:
        """A second sequence with the same past: pages are shared and copied before either writes to them; states are copied at once."""
        child = SequenceCache(self.layout, self.arena, self.precision)
        child.state_pages = array("i", self.arena.allocate(len(self.state_pages)))
        for source, target in zip(self.state_pages, child.state_pages, strict=True):
            self.arena.copy_page(source, target)
        child.num_tokens = self.num_tokens
        self._tokens_placed = 0
        for key, table in self.tables.items():
            self.arena.retain(table.pages)
            child.tables[key].first_page, child.tables[key].pages = table.first_page, table.pages[:]
        return child

    def release(self) -> None:
        """Give every page back. The sequence starts from nothing if it is used again."""
        for table in self.tables.values():
            self.arena.release(table.pages)
            table.first_page, table.pages = 0, array("i")
        self.arena.release(self.state_pages)
        self.state_pages = array("i")
        self.num_tokens = self._tokens_placed = self._tokens_until_drop = 0
        self._page_runs = None

    @property
    def num_pages(self) -> int:
        return sum(self.page_runs[2::3])

    def _shared_open_pages(self, end: int) -> list[PageTable]:
        """The tables whose last page is partly filled, will be written before `end`, and has another holder."""
        return [
            table
            for table in self.tables.values()
            if table.pages
            and self.arena.is_shared(table.pages[-1])
            and table.stream.num_rows(self.num_tokens) < min(table.stream.num_rows(end), table.end_page * table.rows_per_page)
        ]

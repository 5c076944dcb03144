"""Who gets pages: admission of new sequences, and who gives way when the arena runs out. Knows counts, never contents."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from kvshare.cache.arena import Arena
from kvshare.cache.tables import SequenceCache
from kvshare.errors import CapacityError
from kvshare.layout import CacheLayout, PrecisionChoice


class PagePolicy:
    """Admission by the plan: a sequence starts only if its tokens so far, and those of everyone running, fit at their peak."""

    def __init__(self, layout: CacheLayout, arena: Arena, precision: PrecisionChoice, chunk: int):
        self.layout, self.arena, self.precision, self.chunk = layout, arena, precision, chunk
        self.peak_pages = lru_cache(4096)(self._peak_pages)

    def _peak_pages(self, tokens: int, batch: int = 1, chunk: int | None = None) -> int:
        return self.layout.peak_pages(tokens, batch, self.precision, chunk or self.chunk)

    def check_possible(self, tokens: int, batch: int) -> None:
        """Raise `CapacityError`, with the numbers, for a request that no empty arena could hold."""
        needed = self.peak_pages(tokens, batch)
        if needed > self.arena.num_pages:
            size = self.arena.page_bytes
            raise CapacityError(
                f"{batch} x {tokens:,} tokens need {needed * size:,} bytes of cache, but the arena has {self.arena.num_pages * size:,}: "
                f"up to {self.longest_context(batch):,} tokens fit; ask for fewer, or give the cache more memory"
            )

    def longest_context(self, batch: int = 1, limit: int | None = None) -> int:
        """Most tokens that `batch` sequences can have each."""
        low, high = 0, limit or self.layout.max_context or 1 << 24
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.peak_pages(middle, batch) <= self.arena.num_pages else (low, middle - 1)
        return low

    def can_admit(self, tokens: int, running: Iterable[tuple[int, SequenceCache]]) -> bool:
        """Whether a new sequence of `tokens` tokens fits beside the running ones ((tokens, cache) each) when all prompts have run."""
        promised = 0
        for count, cache in running:
            chunk = self.chunk if count - cache.num_tokens > 1 else 1  # behind its prompt a sequence holds no chunk beside its windows
            promised += max(0, self.peak_pages(count + 1, 1, chunk) - cache.num_pages)
        return self.peak_pages(tokens + 1) + promised <= self.arena.num_free

"""The step of a drafter: a model that owns no rows and reads those of the model it drafts for."""

from __future__ import annotations

from collections.abc import Sequence

from kvshare.cache.paged_step import PagedCache, PagedStep
from kvshare.cache.step import Span
from kvshare.cache.tables import SequenceCache


class DraftStep(PagedStep):
    """One query a sequence, which sees what the newest cached token sees. Nothing can be appended, no pages are needed.

    `positions` are those of the newest cached tokens. Drafters call `attend` with the target's layers.
    """

    def __init__(self, cache: PagedCache, caches: Sequence[SequenceCache]):
        """Raises `RuntimeError` for a sequence that has nothing cached yet."""
        super().__init__(cache, caches, [1] * len(caches))
        if min(self.past) == 0:
            raise RuntimeError("a drafter reads the target's cache, and one of these sequences has none yet")
        self.past = tuple(past - 1 for past in self.past)
        self.positions = self.positions - 1  # [sequences]
        self.spans = tuple(Span(span.start, span.end, span.first - 1, span.last - 1) for span in self.spans)
        self._is_tail = True

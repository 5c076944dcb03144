"""A model run by hand, over sequences in an arena of their own, with an eye on every page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from kvshare.cache.arena import Arena
from kvshare.cache.paged_step import PagedCache, PagedStep
from kvshare.cache.tables import SequenceCache
from kvshare.layout import CacheLayout, PrecisionChoice
from kvshare.models.model import Model


class WatchedStep(PagedStep):
    """A step that notices when an owner's pages change other than by the owner's own `append`."""

    def __init__(self, cache: PagedCache, caches: Sequence[SequenceCache], counts: Sequence[int], reader_rows: Sequence[int] | None = None):
        super().__init__(cache, caches, counts, reader_rows)
        self.broken: set[int] = set()  # owners whose pages somebody else wrote; shared with the step's tail
        self._seals = {owner: self._fingerprint(owner) for owner in self.layout.owners}

    def append(self, layer: int, rows: Mapping[str, Tensor]) -> None:
        self._compare(layer)
        super().append(layer, rows)
        self._seals[layer] = self._fingerprint(layer)

    def written_by_others(self) -> set[int]:
        """Owners whose pages were written by another layer than themselves. To be asked when the forward pass is over."""
        for owner in self.layout.owners:
            self._compare(owner)
        return self.broken

    def _compare(self, owner: int) -> None:
        if self._fingerprint(owner) != self._seals[owner]:
            self.broken.add(owner)

    def _fingerprint(self, owner: int) -> bytes:
        digest = blake2b()
        for cache in self.caches:
            for stream in self.layout.layers[owner].streams:
                digest.update(cache.arena.pages[cache.tables[owner, stream.name].pages].numpy().tobytes())
        return digest.digest()


class Watched:
    """`model` over `sequences` sequences of at most `context` tokens. After every step the arena is held to the plan."""

    def __init__(self, model: Model, precision: PrecisionChoice, sequences: int, context: int, seals: bool = False):
        self.model, self.precision, self.seals = model, precision, seals
        self.layout: CacheLayout = model.layout
        pages = self.layout.peak_pages(context, sequences, precision, chunk=context)
        self.arena = Arena(2 * pages, self.layout.page_bytes(precision))
        # twice what is needed, so that one who takes too much is found out by the count and not by its end
        self.arena.pages.fill_(0xFF)  # NaN in every float type: a row that is read before it is written shows
        self.cache = PagedCache(self.layout, precision, model.key_balance())
        self.sequences = [SequenceCache(self.layout, self.arena, precision) for _ in range(sequences)]
        self.steps = 0
        self.deviations: list[str] = []  # where the arena was not the plan
        self.foreign_writes: set[int] = set()

    @torch.inference_mode()
    def step(self, parts: Mapping[int, Sequence[int]], rows: Sequence[int] | None = None) -> Tensor:  # -> [rows, hidden]
        """Append token ids to the sequences that `parts` names; hidden states of all rows, or of `rows`."""
        caches = [self.sequences[index] for index in parts]
        counts = [len(ids) for ids in parts.values()]
        for cache, count in zip(caches, counts, strict=True):
            cache.reserve(count)
        make = WatchedStep if self.seals else PagedStep
        step = make(self.cache, caches, counts, rows)
        hidden = self.model(torch.tensor([token for ids in parts.values() for token in ids]), step)
        if isinstance(step, WatchedStep):
            self.foreign_writes |= step.written_by_others()
        for cache, count in zip(caches, counts, strict=True):
            cache.commit(count)
        self._compare_with_plan()
        return hidden

    def run(self, ids: Sequence[int], sizes: Sequence[int], last_only: bool = False) -> Tensor:  # [tokens or 1, hidden]
        """Sequence 0 from nothing to `ids`, `sizes` tokens a step; with `last_only`, rows that need no logits skip the tail."""
        outs, start = [], 0
        for size in sizes:
            final = start + size >= len(ids)
            outs.append(self.step({0: ids[start : start + size]}, ([size - 1] if final else []) if last_only else None))
            start += size
        return torch.cat(outs)

    def close(self) -> None:
        """Give all pages back, and note if they do not all come."""
        for sequence in self.sequences:
            sequence.release()
        self._compare_with_plan()
        self.arena.check_integrity()

    def _compare_with_plan(self) -> None:
        self.steps += 1
        planned = sum(self.layout.held_bytes(s.num_tokens, 1, self.precision) for s in self.sequences if s.num_pages)
        if self.arena.held_bytes != planned:
            tokens = ", ".join(f"{sequence.num_tokens:,}" for sequence in self.sequences)
            self.deviations.append(f"after {tokens} tokens {self.arena.held_bytes:,} bytes are held, planned are {planned:,}")

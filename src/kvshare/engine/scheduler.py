"""Which sequences run in the next step, and how many tokens of each: decode steps first, then prompts in chunks, in order of arrival."""

from __future__ import annotations

from collections import deque

from kvshare.cache.policy import PagePolicy
from kvshare.engine.sequence import Sequence


class Scheduler:
    """Continuous batching with chunked prefill. A step runs at most `chunk` tokens; at most `max_sequences` run at once.

    When pages run out, the youngest running sequence gives all of its pages back and is computed again later (its tokens stay the same).
    """

    def __init__(self, policy: PagePolicy, chunk: int, max_sequences: int):
        self.policy, self.chunk, self.max_sequences = policy, chunk, max_sequences
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def schedule(self) -> list[tuple[Sequence, int]]:
        """The next step's sequences with their token counts, pages reserved."""
        budget, planned = self.chunk, dict[Sequence, int]()
        for sequence in sorted(self.running, key=lambda s: s.num_uncached > 1):
            count = min(sequence.num_uncached, budget)
            if count and sequence in self.running and self._make_room(sequence, count, planned):
                sequence.cache.reserve(count)
                planned[sequence] = count
                budget -= count
        while self.waiting and budget and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            if not self.policy.can_admit(len(sequence.tokens), ((len(s.tokens), s.cache) for s in self.running)):
                break
            self.running.append(self.waiting.popleft())
            count = min(sequence.num_uncached, budget)
            sequence.cache.reserve(count)
            planned[sequence] = count
            budget -= count
        return list(planned.items())

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that finished or was cancelled, and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.cache.release()

    def _make_room(self, sequence: Sequence, count: int, planned: dict[Sequence, int]) -> bool:
        """Preempt until `count` more tokens of `sequence` have pages; False if it had to give way itself."""
        while sequence.cache.missing_pages(count) > self.policy.arena.num_free:
            victim = self.running.pop()
            planned.pop(victim, None)
            victim.cache.release()
            self.waiting.appendleft(victim)
            self.num_preemptions += 1
            if victim is sequence:
                return False
        return True

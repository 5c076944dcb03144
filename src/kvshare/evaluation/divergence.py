"""Divergence: what storing the cache in fewer bits does to a model's predictions, as KL from the predictions with the cache it had.

    KL(p || q) = sum over tokens of p log(p / q)        in nats, at each position of a text

p is the model with its reference cache, q with the encoded one. Perplexity can stay the same while predictions change; this cannot.
"""

from __future__ import annotations

import json
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvshare.cache.arena import Arena
from kvshare.cache.paged_step import PagedCache, PagedStep
from kvshare.cache.tables import SequenceCache
from kvshare.evaluation.perplexity import HEAD_ROWS
from kvshare.evaluation.replay import BlockOutputs
from kvshare.layout import PrecisionChoice
from kvshare.models.model import Model

TOGETHER = 16  # candidates whose hidden states are kept while the reference's logits are computed once for all of them

Watch = Callable[[int], None]
"""Called with how many candidates have been run on one more window."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """`kl` is the mean over `tokens` positions, `largest` the worst of them, `same_top` the share whose most probable token is the same."""

    kl: float
    largest: float
    same_top: float
    tokens: int


class Sums(NamedTuple):
    """A divergence while it is added up."""

    kl: float = 0.0
    largest: float = 0.0
    same: int = 0
    tokens: int = 0

    def plus(self, other: Sums) -> Sums:
        return Sums(self.kl + other.kl, max(self.largest, other.largest), self.same + other.same, self.tokens + other.tokens)

    def mean(self) -> Divergence:
        return Divergence(max(0.0, self.kl / self.tokens), self.largest, self.same / self.tokens, self.tokens)


Known = MutableMapping[str, Sums]
"""What was measured, by window, sample and precisions; one that lies on a disk outlives an interruption."""


def divergences(
    model: Model,
    windows: Sequence[Sequence[int]],
    reference: PrecisionChoice,
    candidates: Sequence[PrecisionChoice],
    watch: Watch | None = None,
    every: int = 1,
) -> list[Divergence]:
    """The divergence of each candidate precision of the cache from the reference's, over `every`-th positions of all windows of token ids.

    Rows go through the arena's pages and every query reads what was encoded, as in the engine. At most `HEAD_ROWS` positions of logits
    exist at once, of the reference and of one candidate.
    """
    return Comparison(model, windows, reference, every).of(candidates, watch)


class Comparison:
    """Divergences from one reference on the same text, as they are asked for: the reference runs once, and nothing is measured twice.

    A candidate that differs from the reference from some owner on runs from there on, where the model's blocks allow that.
    """

    def __init__(
        self,
        model: Model,
        windows: Sequence[Sequence[int]],
        reference: PrecisionChoice,
        every: int = 1,
        known: Known | None = None,
    ):
        self.model, self.windows, self.reference, self.every = model, windows, reference, every
        self._known: Known = {} if known is None else known
        self._expected: dict[int, Tensor] = {}  # of each window the reference's hidden states [tokens / every, hidden]
        self._outputs, self._recorded, self._can_replay = BlockOutputs(model), -1, True

    @torch.inference_mode()
    def of(self, candidates: Sequence[PrecisionChoice], watch: Watch | None = None) -> list[Divergence]:
        """As `divergences`. Interrupted, what was measured of a window is kept for the next time."""
        totals = [Sums()] * len(candidates)
        for number in range(len(self.windows)):
            keys = [self._key(number, candidate) for candidate in candidates]
            missing = {key: candidate for key, candidate in zip(keys, candidates, strict=True) if key not in self._known}
            if watch and len(missing) < len(keys):
                watch(len(keys) - len(missing))
            for start in range(0, len(missing), TOGETHER):
                self._measure(number, dict(list(missing.items())[start : start + TOGETHER]), watch)
            totals = [total.plus(self._known[key]) for total, key in zip(totals, keys, strict=True)]
        return [total.mean() for total in totals]

    def _measure(self, number: int, group: dict[str, PrecisionChoice], watch: Watch | None) -> None:
        ids, hidden = self.windows[number], []
        expected = self._reference(number, any(self._first_changed(candidate) for candidate in group.values()))
        for candidate in group.values():
            first = self._first_changed(candidate)
            spare = self._outputs.replayed(first) if self._can_replay and self._recorded == number else nullcontext()
            with spare:
                hidden.append(cached_hidden(self.model, ids, candidate, self.every))
            if watch:
                watch(1)
        for key, found in zip(group, _compare(self.model, expected, hidden), strict=True):
            self._known[key] = found

    def _reference(self, number: int, record: bool) -> Tensor:  # -> [tokens / every, hidden]
        """The reference's hidden states; with `record` its blocks' outputs are those of this window."""
        record = record and self._can_replay and self._recorded != number
        if number not in self._expected or record:
            ids = self.windows[number]
            with self._outputs.recorded() if record else nullcontext():
                self._expected[number] = cached_hidden(self.model, ids, self.reference, self.every)
            if record and self._recorded < 0:  # once: what is replayed must be what would be computed
                with self._outputs.replayed(self.model.layout.owners[-1]):
                    again = cached_hidden(self.model, ids, self.reference, self.every)
                self._can_replay = torch.equal(again, self._expected[number])
            self._recorded = number if record else self._recorded
        return self._expected[number]

    def _first_changed(self, candidate: PrecisionChoice) -> int:
        """The first owner that is stored in another precision than the reference's; 0 where none is."""
        layout = self.model.layout
        changed = (o for o in layout.owners if layout.precision_of(o, candidate) != layout.precision_of(o, self.reference))
        return next(changed, 0)

    def _key(self, number: int, candidate: PrecisionChoice) -> str:
        layout = self.model.layout
        return json.dumps([number, self.every, *(layout.precision_of(owner, candidate).name for owner in layout.owners)])


def cached_hidden(model: Model, ids: Sequence[int], precision: PrecisionChoice, every: int = 1) -> Tensor:  # -> [tokens / every, hidden]
    """Hidden states of every `every`-th token of one sequence that is run in one step with a cache in `precision`."""
    layout, count = model.layout, len(ids)
    arena = Arena(layout.peak_pages(count, 1, precision, chunk=count), layout.page_bytes(precision))
    cache = SequenceCache(layout, arena, precision)
    cache.reserve(count)
    step = PagedStep(PagedCache(layout, precision, model.key_balance()), [cache], [count], range(0, count, every))
    return model(torch.tensor(list(ids)), step)


def _compare(model: Model, expected: Tensor, found: Sequence[Tensor]) -> list[Sums]:
    """The divergence of each of `found` ([tokens, hidden] each) from `expected`, a slice of positions at a time."""
    sums = [Sums()] * len(found)
    for start in range(0, len(expected), HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        p = torch.log_softmax(model.logits(expected[rows]).float(), dim=-1)  # [positions, vocab]
        weights, top = p.exp(), p.argmax(-1)
        for index, hidden in enumerate(found):
            q = torch.log_softmax(model.logits(hidden[rows]).float(), dim=-1)
            kl = (weights * (p - q)).sum(-1, dtype=torch.float64)  # [positions]
            same = int((q.argmax(-1) == top).sum())
            sums[index] = sums[index].plus(Sums(kl.sum().item(), kl.max().item(), same, len(kl)))
    return sums

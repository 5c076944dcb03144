"""Divergence: what storing the cache in fewer bits does to a model's predictions, as KL from the predictions with the cache it had.

    KL(p || q) = sum over tokens of p log(p / q)        in nats, at each position of a text

p is the model with its reference cache, q with the encoded one. Perplexity can stay the same while predictions change; this cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvshare.cache.arena import Arena
from kvshare.cache.paged_step import PagedCache, PagedStep
from kvshare.cache.tables import SequenceCache
from kvshare.evaluation.perplexity import HEAD_ROWS
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


@torch.inference_mode()
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
    sums = [_Sum() for _ in candidates]
    for ids in windows:
        expected = cached_hidden(model, ids, reference, every)
        for start in range(0, len(candidates), TOGETHER):
            group = candidates[start : start + TOGETHER]
            _compare(model, expected, [cached_hidden(model, ids, candidate, every) for candidate in group], sums[start : start + TOGETHER])
            if watch:
                watch(len(group))
    return [found.mean() for found in sums]


def cached_hidden(model: Model, ids: Sequence[int], precision: PrecisionChoice, every: int = 1) -> Tensor:  # -> [tokens / every, hidden]
    """Hidden states of every `every`-th token of one sequence that is run in one step with a cache in `precision`."""
    layout, count = model.layout, len(ids)
    arena = Arena(layout.peak_pages(count, 1, precision, chunk=count), layout.page_bytes(precision))
    cache = SequenceCache(layout, arena, precision)
    cache.reserve(count)
    step = PagedStep(PagedCache(layout, precision, model.key_balance()), [cache], [count], range(0, count, every))
    return model(torch.tensor(list(ids)), step)


def _compare(model: Model, expected: Tensor, found: Sequence[Tensor], sums: Sequence[_Sum]) -> None:
    """Add up the divergence of each of `found` ([tokens, hidden] each) from `expected`, a slice of positions at a time."""
    for start in range(0, len(expected), HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        p = torch.log_softmax(model.logits(expected[rows]).float(), dim=-1)  # [positions, vocab]
        weights, top = p.exp(), p.argmax(-1)
        for hidden, total in zip(found, sums, strict=True):
            q = torch.log_softmax(model.logits(hidden[rows]).float(), dim=-1)
            total.add((weights * (p - q)).sum(-1, dtype=torch.float64), q.argmax(-1) == top)


class _Sum:
    """A divergence while it is added up."""

    def __init__(self) -> None:
        self.kl, self.largest, self.same, self.tokens = 0.0, 0.0, 0, 0

    def add(self, kl: Tensor, same: Tensor) -> None:  # [positions] each
        self.kl += kl.sum().item()
        self.largest = max(self.largest, kl.max().item())
        self.same += int(same.sum())
        self.tokens += len(kl)

    def mean(self) -> Divergence:
        return Divergence(max(0.0, self.kl / self.tokens), self.largest, self.same / self.tokens, self.tokens)

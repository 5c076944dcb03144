"""Every way of running gives the same: in one step, in chunks, token by token, in a ragged batch, and with the tail skipped."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from itertools import cycle

import torch
from torch import Tensor

from kvshare.cache.step import DenseStep
from kvshare.doctor.comparison import Difference, compare
from kvshare.doctor.report import Check
from kvshare.doctor.watched import Watched
from kvshare.evaluation.divergence import cached_hidden
from kvshare.layout import PrecisionChoice
from kvshare.models.model import Model

ODD_SIZES = (3, 17, 1, 64, 5, 33)
SINGLE_STEPS = 48  # at each end of the text, where one step for each token would take too long
SECONDS_FOR_SINGLE_STEPS = 30.0


@torch.inference_mode()
def one_shot(model: Model, ids: Sequence[int]) -> Tensor:  # [tokens, hidden]
    """The reference: all tokens at once, without an arena."""
    return model(torch.tensor(list(ids)), DenseStep(model.layout, [len(ids)]))


def odd_sizes(total: int) -> list[int]:
    """`ODD_SIZES` again and again until they sum to `total`."""
    sizes, left = [], total
    for size in cycle(ODD_SIZES):
        sizes.append(min(size, left))
        left -= sizes[-1]
        if not left:
            return sizes
    raise AssertionError("a cycle does not end")


class Ways:
    """The ways of running `model` on `ids`. Arenas are checked on the way: `steps`, `deviations`, `foreign_writes`."""

    def __init__(self, model: Model, ids: Sequence[int], num_begin: int, dtype: str, precision: PrecisionChoice, lossy: bool = False):
        """Where the cache is `lossy`, every way is held to one step that reads the same encoded rows, without the cache otherwise."""
        self.begin = ids[:num_begin]  # <bos>, without which some models write nonsense that amplifies every rounding
        self.model, self.ids, self.dtype, self.precision = model, ids, dtype, precision
        self.lossy = lossy
        self.reference = self._alone(ids)  # [tokens, hidden]
        self.steps = 0
        self.deviations: list[str] = []
        self.foreign_writes: set[int] = set()

    def checks(self) -> Iterator[tuple[str, Difference, str]]:
        """Name, difference from the reference, and a remark, one way after the other."""
        total = len(self.ids)
        yield "in one step, from pages", self._difference([total]), ""
        sizes = odd_sizes(total)
        yield "in chunks", self._difference(sizes), f"{len(sizes)} chunks of {min(sizes)} to {max(sizes)} tokens"
        yield "token by token", *self._single_steps()
        yield "ragged batch", self._ragged_batch(), "3 sequences of different lengths, chunks and single tokens in one step"
        yield "tail skipped", self._tail(), self._tail_remark()

    def _alone(self, ids: Sequence[int]) -> Tensor:  # [tokens, hidden]
        with torch.inference_mode():
            return cached_hidden(self.model, ids, self.precision) if self.lossy else one_shot(self.model, ids)

    def watch(self, sequences: int = 1, seals: bool = False) -> Watched:
        return Watched(self.model, self.precision, sequences, len(self.ids), seals)

    def _finish(self, watched: Watched) -> None:
        watched.close()
        self.steps += watched.steps
        self.deviations += watched.deviations
        self.foreign_writes |= watched.foreign_writes

    def _difference(self, sizes: Sequence[int]) -> Difference:
        watched = self.watch()
        hidden = watched.run(self.ids, sizes)
        self._finish(watched)
        return compare(self.model.logits, self.reference, hidden)

    def _single_steps(self) -> tuple[Difference, str]:
        """One token a step; where that would take long, only at the beginning and at the end, behind the window."""
        total, watched, outs = len(self.ids), self.watch(), []
        ends = min(SINGLE_STEPS, total // 2)
        begun = time.monotonic()
        for index in range(ends):
            outs.append(watched.step({0: self.ids[index : index + 1]}))
        seconds = (time.monotonic() - begun) / ends
        start = ends if seconds * total <= SECONDS_FOR_SINGLE_STEPS else total - ends
        if start > ends:
            outs.append(watched.step({0: self.ids[ends:start]}))
        for index in range(start, total):
            outs.append(watched.step({0: self.ids[index : index + 1]}))
        self._finish(watched)
        singles = ends + total - start
        return compare(self.model.logits, self.reference, torch.cat(outs)), f"{singles:,} of {total:,} tokens in a step of their own"

    def _ragged_batch(self) -> Difference:
        """Three sequences, each advancing by its own number of tokens a step, one of them at times by none."""
        total, numbers = len(self.ids), random.Random(0)
        others = (self.ids[total // 3 :], self.ids[total // 2 : total // 2 + max(2, total // 4)])
        texts = [self.ids, *([*self.begin, *other] for other in others)]
        references = [self.reference, *(self._alone(text) for text in texts[1:])]
        outs: list[list[Tensor]] = [[] for _ in texts]
        watched = self.watch(len(texts))
        while any(sequence.num_tokens < len(text) for sequence, text in zip(watched.sequences, texts, strict=True)):
            parts = {}
            for index, text in enumerate(texts):
                done = watched.sequences[index].num_tokens
                take = min(numbers.choice((0, 1, 1, 7, 40)), len(text) - done)
                if take:
                    parts[index] = text[done : done + take]
            if parts:
                hidden = watched.step(parts)
                for index, rows in zip(parts, hidden.split([len(part) for part in parts.values()]), strict=True):
                    outs[index].append(rows)
        self._finish(watched)
        return compare(self.model.logits, torch.cat(references), torch.cat([torch.cat(out) for out in outs]))

    def _tail(self) -> Difference:
        """Prompts of several lengths in chunks: all rows but the last skip the layers behind the last owner. Pages are sealed meanwhile."""
        difference = Difference()
        for end in (len(self.ids), len(self.ids) - 1, len(self.ids) * 2 // 3, len(self.ids) // 2 + 1):
            watched = self.watch(seals=True)
            hidden = watched.run(self.ids[:end], [end // 3, end - end // 3], last_only=True)  # of a step of one row nothing can be skipped
            self._finish(watched)
            with torch.inference_mode():
                difference.add(self.model.logits(self.reference[end - 1 : end]), self.model.logits(hidden))
        return difference

    def _tail_remark(self) -> str:
        layout = self.model.layout
        behind = len(layout.layers) - layout.tail
        return f"prompt rows end before the last {behind} of {len(layout.layers)} layers" if behind else "no layer follows the last owner"


def writes_check(ways: Ways) -> Check:
    """Whether owners' pages hashed the same before and after everything that is not their owner's append."""
    name, layout = "no reader wrote", ways.model.layout
    if ways.foreign_writes:
        return Check(name, ways.dtype, "failed", f"pages of layers {sorted(ways.foreign_writes)} changed other than by their own append")
    readers = sum(owner != index for index, owner in enumerate(layout.owner))
    what = (
        f"{readers} readers of {len(layout.owners)} owners" if readers else f"no layer reads another's cache; {len(layout.owners)} owners"
    )
    return Check(name, ways.dtype, "passed", f"{what}; pages hashed the same before and after each layer that does not own them")


def plan_check(ways: Ways) -> Check:
    """Whether the arena held what was planned after every step of every way."""
    name = "planned = allocated, running"
    if ways.deviations:
        return Check(name, ways.dtype, "failed", f"{len(ways.deviations)} of {ways.steps:,} steps: {ways.deviations[0]}")
    return Check(name, ways.dtype, "passed", f"byte for byte after each of {ways.steps:,} steps; all pages came back")

"""One forward pass over scheduled sequences: which rows need logits, the step, and the head in slices."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvshare.cache.paged_step import PagedCache, PagedStep
from kvshare.engine.decode_steps import DecodeSteps
from kvshare.engine.sampler import logprobs_of
from kvshare.engine.sequence import Sequence
from kvshare.models.model import Model

HEAD_ROWS = 64  # rows of logits that exist at once


class Runner:
    """Runs the model on a batch of (sequence, number of tokens) whose pages are reserved."""

    def __init__(self, model: Model, cache: PagedCache):
        self.model, self.cache = model, cache
        self.decode_steps = DecodeSteps(model, cache)

    def run(self, batch: list[tuple[Sequence, int]]) -> Iterator[tuple[Sequence, Tensor]]:
        """Advance the caches; yields each sequence that has no token left to run, with its next-token logits (float32 [vocab])."""
        if len(batch) <= HEAD_ROWS and all(_decodes(sequence, count) for sequence, count in batch):
            yield from self._decode([sequence for sequence, _ in batch])
            return
        tokens, kept = list[int](), list[list[int]]()
        for sequence, count in batch:
            done = sequence.cache.num_tokens
            tokens += sequence.tokens[done : done + count]
            kept.append(self._rows_with_logits(sequence, count))
        starts = [sum(count for _, count in batch[:i]) for i in range(len(batch))]
        rows = [begin + row for begin, own in zip(starts, kept, strict=True) for row in own]
        step = PagedStep(self.cache, [s.cache for s, _ in batch], [count for _, count in batch], rows)
        hidden = self.model(torch.tensor(tokens, dtype=torch.long), step)  # [rows, hidden]
        at, finals = 0, list[tuple[Sequence, int]]()
        for (sequence, count), own in zip(batch, kept, strict=True):
            first = sequence.cache.num_tokens
            self._account(sequence, count, len(own))
            sequence.cache.commit(count)
            own_hidden, at = hidden[at : at + len(own)], at + len(own)
            if sequence.request.prompt_logprobs is not None:
                self._prompt_logprobs(sequence, first, own_hidden)
            if not sequence.num_uncached:
                finals.append((sequence, at - 1))
        for slice_start in range(0, len(finals), HEAD_ROWS):
            part = finals[slice_start : slice_start + HEAD_ROWS]
            rows = [row for _, row in part]
            chosen = hidden if rows == list(range(len(hidden))) else hidden[rows]  # in a decode step every row is wanted
            logits = self.model.logits(chosen).float()  # [rows, vocab]
            for (sequence, _), row in zip(part, logits, strict=True):
                yield sequence, row

    def _decode(self, sequences: list[Sequence]) -> Iterator[tuple[Sequence, Tensor]]:
        """`run` where each sequence runs one token and wants its logits."""
        tokens = [sequence.tokens[sequence.cache.num_tokens] for sequence in sequences]
        logits = self.decode_steps.logits(tokens, [sequence.cache for sequence in sequences])
        for sequence in sequences:
            self._account(sequence, 1, 1)
            sequence.cache.commit(1)
        yield from zip(sequences, logits, strict=True)

    @staticmethod
    def _rows_with_logits(sequence: Sequence, count: int) -> list[int]:
        """The rows, of the step's `count`, that go on behind the last owner: the last one, or all where prompt logprobs are asked for."""
        recorded = sequence.request.prompt_logprobs
        if recorded is not None and len(recorded) < sequence.num_prompt:
            return list(range(count))
        return [count - 1] if count == sequence.num_uncached else []

    @staticmethod
    def _account(sequence: Sequence, count: int, kept: int) -> None:
        sequence.peak_pages = max(sequence.peak_pages, sequence.cache.num_pages)
        prompt_rows = min(count, max(0, sequence.num_prompt - sequence.cache.num_tokens))
        sequence.prompt_rows += prompt_rows
        sequence.tail_rows_skipped += max(0, prompt_rows - kept)

    def _prompt_logprobs(self, sequence: Sequence, first: int, hidden: Tensor) -> None:
        """Record the log-probabilities of the prompt tokens that rows `first ...` predict: hidden [rows, hidden]."""
        recorded, prompt = sequence.request.prompt_logprobs, sequence.request.prompt_token_ids
        assert recorded is not None
        targets = prompt[first + 1 : first + 1 + len(hidden)]
        if len(recorded) != first + 1 or not targets:  # computed again after a preemption
            return
        for start in range(0, len(targets), HEAD_ROWS):
            part = targets[start : start + HEAD_ROWS]
            logits = self.model.logits(hidden[start : start + len(part)])
            recorded.extend(logprobs_of(logits, part, sequence.params.prompt_logprobs or 0))


def _decodes(sequence: Sequence, count: int) -> bool:
    return count == 1 == sequence.num_uncached and sequence.request.prompt_logprobs is None

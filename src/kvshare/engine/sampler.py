"""Choosing the tokens of a sequence from its logits, and saying how probable they were."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Sequence

from torch import Tensor

from kvshare.engine.outputs import Logprob, TokenLogprobs
from kvshare.engine.sampling import SamplingParams
from kvshare.kernels.edges import argmax
from kvshare.kernels.sampling import draw, leading, penalise


class Sampler:
    """What is chosen for one sequence, from its logits alone: the same whatever runs beside it.

    `seed` begins its random numbers, of which each token that is not greedy takes one.
    """

    def __init__(self, params: SamplingParams, prompt: Iterable[int], seed: int):
        self.params = params
        self._random = random.Random(seed)
        self._places: dict[int, int] = {}  # of tokens in `_seen`
        self._seen, self._times = array("q"), array("q")  # tokens that penalties apply to, and how often each was chosen
        if params.repetition_penalty != 1:
            for token in prompt:
                self._see(token)
        self._counts = bool(params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty)

    @property
    def penalises(self) -> bool:
        """Whether `choose` will change the logits that it is given."""
        return len(self._seen) > 0

    def choose(self, logits: Tensor) -> int:  # float32 [vocab]
        """The next token: penalties, then greedy, or temperature, top-k, min-p and top-p in the order of Hugging Face and vLLM."""
        params = self.params
        if self.penalises:
            penalise(logits, self._seen, self._times, params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        if params.greedy:
            token = argmax(logits)
        else:
            token = draw(logits, params.temperature, params.top_k, params.top_p, params.min_p, self._random.random())
        if self._counts:
            self._times[self._see(token)] += 1
        return token

    def _see(self, token: int) -> int:
        """The place of a token among those seen."""
        place = self._places.setdefault(token, len(self._seen))
        if place == len(self._seen):
            self._seen.append(token)
            self._times.append(0)
        return place


def logprobs_of(logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprobs]:  # [rows, vocab], [rows]
    """For each row, the given token's log-probability and those of the `count` most probable."""
    return [_logprobs(row, token, count) for row, token in zip(logits.float(), tokens, strict=True)]


def _logprobs(logits: Tensor, token: int, count: int) -> TokenLogprobs:  # float32 [vocab]
    found = leading(logits, token, count)
    entry = {token: Logprob(float(logits[token]) - found.largest - found.log_sum, found.rank)}
    for place, (other, logit) in enumerate(zip(found.tokens, found.logits, strict=True)):
        entry.setdefault(other, Logprob(logit - found.largest - found.log_sum, place + 1))
    return entry

"""A request and its sequences: the tokens of one completion, its cache, and how far it has come."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

from kvshare.cache.tables import SequenceCache
from kvshare.checkpoints.incremental import IncrementalDecoder
from kvshare.engine.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from kvshare.engine.sampler import Sampler
from kvshare.engine.sampling import SamplingParams
from kvshare.engine.stopping import StopStrings


@dataclass(slots=True)
class Request:
    """One prompt and what is wanted of it."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int  # of each completion; bounded by the context
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    sequences: list[Sequence] = field(default_factory=list)
    arrival: float = field(default_factory=time.monotonic)

    def output(self) -> RequestOutput:
        completions = [sequence.output for sequence in self.sequences]
        return RequestOutput(self.request_id, self.prompt, self.prompt_token_ids, self.prompt_logprobs, completions)


class Sequence:
    """One completion. `tokens` are prompt and output; the first `cache.num_tokens` of them are cached."""

    def __init__(self, request: Request, index: int, cache: SequenceCache, decoder: IncrementalDecoder | None):
        self.request, self.params, self.cache = request, request.params, cache
        self.tokens = list(request.prompt_token_ids)
        self.output = CompletionOutput(index, logprobs=[] if request.params.logprobs is not None else None)
        self.decoder, self.stops = decoder, StopStrings(request.params.stop)
        self.sampler = Sampler(request.params, request.prompt_token_ids, _seed(request.params.seed, index))
        self.peak_pages = 0
        self.prompt_rows = 0
        self.tail_rows_skipped = 0
        self.first_token_time: float | None = None

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_uncached(self) -> int:
        """Tokens still to be run: one when decoding, more in the prompt (or after a preemption)."""
        return len(self.tokens) - self.cache.num_tokens

    @property
    def finished(self) -> bool:
        return self.output.finish_reason is not None

    def fork(self, index: int, decoder: IncrementalDecoder | None) -> Sequence:
        """Another completion of the same prompt, sharing its pages."""
        child = Sequence(self.request, index, self.cache.fork(), decoder)
        child.prompt_rows, child.tail_rows_skipped = self.prompt_rows, self.tail_rows_skipped
        return child


def _seed(seed: int | None, index: int) -> int:
    return random.SystemRandom().getrandbits(62) if seed is None else (seed + index) % (1 << 63)

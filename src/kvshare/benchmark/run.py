"""Time to first token and decode speed of a loaded model, through its engine as a server would drive it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from kvshare.benchmark.profile import PROFILED_STEPS, StepProfile, profile_steps
from kvshare.benchmark.work import step_bytes, weight_bytes
from kvshare.engine.llm import LLM
from kvshare.engine.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Measurement:
    context: int  # tokens of each prompt
    batch: int  # sequences side by side
    ttft_s: float  # until every sequence has its first token
    decode_s: float  # a step in which each sequence gets one more
    held_bytes: int  # of the cache, between steps
    peak_bytes: int  # of the cache, inside a step
    step_bytes: int | None  # that a decode step reads: weights and cached rows
    profile: StepProfile

    @property
    def prefill_tok_s(self) -> float:
        return self.context * self.batch / self.ttft_s

    @property
    def decode_tok_s(self) -> float:
        return self.batch / self.decode_s


def room(context: int, batch: int, decode: int, chunk: int) -> int:
    """Tokens that a sequence can reach: the first ones already decode while the others' prompts are read."""
    return context + decode + PROFILED_STEPS + 2 + (2 * batch * -(-context // chunk) + batch if batch > 1 else 0)


def warm_up(llm: LLM) -> None:
    """A short run that nobody times: threads start, kernels are chosen, pages of the weights are touched."""
    llm.generate([[5] * min(64, llm.max_context - 4)], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))


def measure(
    llm: LLM,
    context: int,
    batch: int,
    decode: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    timed: Callable[[Callable[[], float]], float] = lambda steps: steps(),
    attempts: int = 1,
) -> Measurement:
    """One prompt of random tokens for each sequence, then `decode` steps of all of them together, then some more under a stopwatch.

    `progress` hears of tokens. `timed` is given what takes `decode` steps and returns the seconds of one; it may call that `attempts`
    times, and returns what counts. Raises `RequestError` where `room(...)` for all attempts is more than the model's context.
    """
    engine, most = llm.engine, room(context, batch, attempts * decode, llm.engine.chunk) - context
    params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
    prompts = torch.randint(5, llm.model.vocab_size, (batch, context), generator=torch.Generator().manual_seed(context)).tolist()
    llm.arena.reset_peak()
    ids, total, weights = [], batch * context + decode, weight_bytes(llm.model)
    try:
        begun = time.perf_counter()
        for prompt in prompts:
            ids.append(engine.add(prompt, params))
        sequences = [engine.requests[request].sequences[0] for request in ids]
        while not all(sequence.output.token_ids for sequence in sequences):
            engine.step()
            progress(sum(min(context, sequence.cache.num_tokens) for sequence in sequences), total)
        ttft = time.perf_counter() - begun

        def steps() -> float:
            begun = time.perf_counter()
            for step in range(decode):
                engine.step()
                progress(batch * context + step + 1, total)
            return (time.perf_counter() - begun) / decode

        seconds = timed(steps)
        held, peak = llm.arena.held_bytes, llm.arena.peak_bytes
        profile = profile_steps(llm, context + decode, batch, weights.whole if weights else None)
    finally:
        for request in ids:
            engine.cancel(request)
    read = None if weights is None else step_bytes(weights, llm.layout, context + decode // 2, batch, engine.precision)
    return Measurement(context, batch, ttft, seconds, held, peak, read, profile)


def measure_all(
    llm: LLM, contexts: Sequence[int], batches: Sequence[int], decode: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Measurement]:
    """Every context in every batch, short ones first."""
    for batch in sorted(batches):
        for context in sorted(contexts):
            yield measure(llm, context, batch, decode, progress)

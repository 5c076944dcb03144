"""The engine: requests in, updates out, one step at a time. Single-threaded; whoever serves it from several threads queues outside."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from kvshare.cache.arena import Arena
from kvshare.cache.paged_step import PagedCache
from kvshare.cache.policy import PagePolicy
from kvshare.cache.tables import SequenceCache
from kvshare.checkpoints.tokenizer import Tokenizer
from kvshare.engine.outputs import FinishReason, Metrics, RequestOutput, Update
from kvshare.engine.runner import Runner
from kvshare.engine.sampler import logprobs_of
from kvshare.engine.sampling import SamplingParams
from kvshare.engine.scheduler import Scheduler
from kvshare.engine.sequence import Request, Sequence
from kvshare.errors import RequestError
from kvshare.layout import PrecisionChoice
from kvshare.models.model import Model


class Engine:
    """Runs requests against one model and one arena.

    `add` queues a request, `step` advances all that run by one step and returns what is new, `cancel` forgets one at once.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, arena: Arena, precision: PrecisionChoice, max_context: int, chunk: int, max_sequences: int
    ):
        self.model, self.tokenizer, self.arena, self.precision = model, tokenizer, arena, precision
        self.max_context, self.chunk = max_context, chunk
        self.policy = PagePolicy(model.layout, arena, precision, chunk)
        self.scheduler = Scheduler(self.policy, chunk, max_sequences)
        self.runner = Runner(model, PagedCache(model.layout, precision, model.key_balance()))
        self.requests: dict[int, Request] = {}
        self._unlimited = model.layout.without_sharing().without_windows()
        self._ids = itertools.count()

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def add(self, prompt: str | SequenceOf[int], params: SamplingParams) -> int:
        """Queue a prompt (text, or token ids as they are); returns the request's id.

        Raises `RequestError` for an empty or foreign prompt or one that leaves no room in the context, and `CapacityError` if the
        cache could never hold it.
        """
        text = prompt if isinstance(prompt, str) else None
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._check_tokens(tokens)
        room = self.max_context - len(tokens)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(tokens):,} tokens, but the context is {self.max_context:,}: shorten it or raise max_context"
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise RequestError(
                f"{len(tokens):,} prompt tokens and max_tokens {params.max_tokens:,} exceed the context of {self.max_context:,}: "
                f"at most {room:,} can follow"
            )
        max_tokens = params.max_tokens or room
        self.policy.check_possible(len(tokens) + max_tokens, params.n)
        request = Request(next(self._ids), text, tokens, params, max_tokens)
        request.prompt_logprobs = [None] if params.prompt_logprobs is not None else None
        sequence = Sequence(request, 0, SequenceCache(self.model.layout, self.arena, self.precision), self.tokenizer.stream())
        request.sequences.append(sequence)
        self.requests[request.request_id] = request
        self.scheduler.waiting.append(sequence)
        return request.request_id

    def cancel(self, request_id: int) -> RequestOutput | None:
        """Forget a request and free its pages now; None if it is not there any more."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return None
        for sequence in request.sequences:
            if not sequence.finished:
                self._finish(sequence, "abort", None)
        return request.output()

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """One forward pass over whatever the scheduler picked, nothing if nothing waits. Updates come in no particular order."""
        updates: list[Update] = []
        batch = self.scheduler.schedule()
        if not batch:
            return updates
        for sequence, logits in self.runner.run(batch):
            if not sequence.output.token_ids and not sequence.output.index:
                for child in self._fork_completions(sequence):
                    updates += self._advance(child, logits.clone())
            updates += self._advance(sequence, logits)
        for request in [r for r in self.requests.values() if all(s.finished for s in r.sequences)]:
            del self.requests[request.request_id]
        return updates

    def _check_tokens(self, tokens: list[int]) -> None:
        if not tokens:
            raise RequestError("the prompt is empty: give at least one token")
        outside = next((t for t in tokens if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < self.model.vocab_size), None)
        if outside is not None:
            raise RequestError(f"token id {outside!r} is outside the vocabulary of {self.model.vocab_size:,}")

    def _fork_completions(self, first: Sequence) -> list[Sequence]:
        """The other completions of a request whose prompt has just been run."""
        request = first.request
        children = []
        for index in range(len(request.sequences), request.params.n):
            child = first.fork(index, self.tokenizer.stream())
            request.sequences.append(child)
            self.scheduler.running.append(child)
            children.append(child)
        return children

    def _advance(self, sequence: Sequence, logits: Tensor) -> list[Update]:
        """Choose the next token of a sequence from its logits [vocab] and decide whether it goes on."""
        params, output = sequence.params, sequence.output
        raw = logits.clone() if params.logprobs is not None and sequence.sampler.penalises else logits
        token = sequence.sampler.choose(logits)
        logprobs = None
        if params.logprobs is not None and output.logprobs is not None:
            logprobs = logprobs_of(raw[None], [token], params.logprobs)[0]
            output.logprobs.append(logprobs)
        if sequence.first_token_time is None:
            sequence.first_token_time = time.monotonic()
        sequence.tokens.append(token)
        output.token_ids.append(token)
        is_end = token in params.stop_token_ids or (token in self.tokenizer.eos_ids and not params.ignore_eos)
        text, stop = sequence.stops.push("" if is_end or sequence.decoder is None else sequence.decoder.push(token))
        if stop is not None:
            self._finish(sequence, "stop", stop)
        elif is_end:
            text += self._rest_of_text(sequence)
            self._finish(sequence, "stop", token)
        elif len(output.token_ids) >= sequence.request.max_tokens:
            text += self._rest_of_text(sequence)
            self._finish(sequence, "length", None)
        output.text += text
        return [Update(sequence.request.request_id, text, token, logprobs, output)]

    @staticmethod
    def _rest_of_text(sequence: Sequence) -> str:
        """What decoder and stop strings still hold back, cut if it completes a stop string after all."""
        shown, stop = sequence.stops.push(sequence.decoder.finish() if sequence.decoder else "")
        return shown if stop is not None else shown + sequence.stops.finish()

    def _finish(self, sequence: Sequence, reason: FinishReason, stop: int | str | None) -> None:
        now, cache, request = time.monotonic(), sequence.cache, sequence.request
        first = sequence.first_token_time or now
        size, layout, cached = self.arena.page_bytes, self.model.layout, cache.num_tokens
        sequence.output.finish_reason, sequence.output.stop_reason = reason, stop
        sequence.output.metrics = Metrics(
            planned_bytes=layout.held_bytes(cached, 1, self.precision) if cached else 0,
            held_bytes=cache.num_pages * size,
            peak_bytes=sequence.peak_pages * size,
            kv_bytes=layout.bytes(cached, 1, self.precision),
            kv_bytes_without_sharing_and_windows=self._unlimited.bytes(cached, 1, self.precision),
            prompt_rows=sequence.prompt_rows,
            tail_rows_skipped=sequence.tail_rows_skipped,
            time_to_first_token=first - request.arrival,
            decode_seconds=now - first,
        )
        self.scheduler.remove(sequence)

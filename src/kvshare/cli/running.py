"""Running one request for somebody who watches: a bar while a long prompt is read, text that a terminal can show, Ctrl-C between steps."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvshare.checkpoints.progress import progress_bar
from kvshare.cli.units import format_bytes

if TYPE_CHECKING:
    from kvshare.engine.llm import LLM
    from kvshare.engine.outputs import CompletionOutput, RequestOutput, Update
    from kvshare.engine.sampling import SamplingParams

_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


@dataclass(slots=True)
class Interrupt:
    """Whether somebody pressed Ctrl-C since the block began."""

    requested: bool = False


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """In the block, the first Ctrl-C only sets `requested`, so that no step is torn apart; a second one raises `KeyboardInterrupt`."""
    interrupt = Interrupt()

    def handle(number: int, frame: object) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


class Run:
    """One request from its prompt to its end. Iterate over it for the updates; `output` and the times are there afterwards."""

    def __init__(self, llm: LLM, prompt: Sequence[int], params: SamplingParams, interrupt: Interrupt):
        self.llm, self.interrupt = llm, interrupt
        self.request = llm.engine.requests[llm.engine.add(prompt, params)]
        self.interrupted = False
        self._begun = time.monotonic()
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0

    def __iter__(self) -> Iterator[Update]:
        """Updates as the engine makes them. An interrupt, or closing the iterator, cancels the request and frees its pages."""
        engine, request_id = self.llm.engine, self.request.request_id
        try:
            yield from self._prefill()
            while request_id in engine.requests and not self.interrupt.requested:
                yield from engine.step()
        finally:
            self.interrupted = engine.cancel(request_id) is not None
            self.decode_seconds = time.monotonic() - self._begun - self.prefill_seconds

    def _prefill(self) -> Iterator[Update]:
        """Steps until the first token, with a bar on stderr if they take long."""
        engine, sequence = self.llm.engine, self.request.sequences[0]
        total = len(self.request.prompt_token_ids)
        updates: list[Update] = []
        with progress_bar("reading the prompt", unit="tokens") as progress:
            while not updates and not self.interrupt.requested:
                updates = engine.step()
                progress(min(total, sequence.cache.num_tokens), total)
        self.prefill_seconds = time.monotonic() - self._begun
        yield from updates

    @property
    def output(self) -> RequestOutput:
        return self.request.output()

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answers."""
        output = self.output
        return len(output.prompt_token_ids) + sum(len(completion.token_ids) for completion in output.outputs)

    @property
    def tokens_per_second(self) -> float | None:
        """Of the answers, behind their first token."""
        tokens = sum(max(0, len(completion.token_ids) - 1) for completion in self.output.outputs)
        return tokens / self.decode_seconds if tokens and self.decode_seconds > 0 else None


def cache_words(llm: LLM, completion: CompletionOutput) -> str:
    """`1.21 MB of cache (4.80 MB without sharing and windows)`, both in whole pages."""
    metrics = completion.metrics
    assert metrics is not None
    held = f"{format_bytes(metrics.held_bytes)} of cache"
    plain = llm.layout.without_sharing().without_windows()
    if plain.layers == llm.layout.layers or not metrics.held_bytes:
        return held
    tokens = metrics.prompt_rows + max(0, len(completion.token_ids) - 1)  # the last one was never run
    return f"{held} ({format_bytes(plain.held_bytes(tokens, 1, llm.engine.precision))} without sharing and windows)"


def show(text: str) -> None:
    """Write a model's text to stdout at once. A terminal gets no control characters: text must not move the cursor or set titles."""
    sys.stdout.write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()

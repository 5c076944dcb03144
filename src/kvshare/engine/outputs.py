"""What comes out of the engine: updates while it runs, and whole outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort"]


class Logprob(NamedTuple):
    """Natural logarithm of a token's probability under the unmodified logits, and its rank (1 is the most probable)."""

    logprob: float
    rank: int


TokenLogprobs = dict[int, Logprob]
"""The chosen token and the most probable ones, by token id."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Bytes and work of one finished sequence. Times are seconds on the monotonic clock."""

    planned_bytes: int  # what the layout says these tokens hold, in whole pages
    held_bytes: int  # what the arena held for them
    peak_bytes: int  # most held inside a step
    kv_bytes: int  # payload: live rows and states
    kv_bytes_without_sharing_and_windows: int
    prompt_rows: int  # prompt tokens that were computed
    tail_rows_skipped: int  # of them, those that never ran behind the last owner
    time_to_first_token: float
    decode_seconds: float  # from the first token to the last


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or string that ended it
    metrics: Metrics | None = None


@dataclass(slots=True)
class RequestOutput:
    """All completions of one prompt."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None  # the first token has none
    outputs: list[CompletionOutput]

    @property
    def metrics(self) -> Metrics | None:
        """The first completion's metrics."""
        return self.outputs[0].metrics


@dataclass(frozen=True, slots=True)
class Update:
    """What one step added to one completion. `output` is the completion so far, the same object in every update."""

    request_id: int
    text: str  # new text that no stop string can take back
    token_id: int | None  # None where text was only held back until now
    logprobs: TokenLogprobs | None
    output: CompletionOutput

    @property
    def finished(self) -> bool:
        return self.output.finish_reason is not None

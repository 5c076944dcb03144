"""OpenAI's answer objects, whole and in chunks, from the pieces that the engine gives."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from kvshare.server.prepare import Work
from kvshare.server.worker import Job, Piece

if TYPE_CHECKING:
    from kvshare.checkpoints.tokenizer import Tokenizer
    from kvshare.engine.outputs import FinishReason, TokenLogprobs

LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes this


@dataclass(slots=True)
class Part:
    """Successive pieces of one choice."""

    choice: int
    text: str = ""
    tokens: list[tuple[int, TokenLogprobs | None]] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Answer:
    """One answer: `whole` builds it at once, or `opening`, `chunks` for every batch of pieces, and `closing` in a stream.

    A subclass says how a choice of its API looks.
    """

    kind, chunk_kind, id_prefix = "", "", ""

    def __init__(self, model: str, tokenizer: Tokenizer, work: Work, job: Job):
        self._head = {"id": f"{self.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._tokenizer, self._work, self._job = tokenizer, work, job
        self._completion_tokens = 0
        self.token_text = lru_cache(4096)(self._token_text)

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        choices = [self._choice(part) for part in sorted(self._merge(pieces), key=lambda part: part.choice)]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self._usage()}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks that come before any text."""
        return []

    def chunks(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        return [
            self._chunk([self._chunk_choice(part)])
            for part in self._merge(pieces)
            if part.text or part.finish_reason or any(logprobs for _, logprobs in part.tokens)
        ]

    def closing(self) -> dict[str, Any]:
        """The chunk with the usage and no choice."""
        return {**self._chunk([]), "usage": self._usage()}

    def _choice(self, part: Part) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk_choice(self, part: Part) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": choices}

    def _merge(self, pieces: Sequence[Piece]) -> list[Part]:
        parts: dict[int, Part] = {}
        for piece in pieces:
            part = parts.setdefault(piece.choice, Part(piece.choice))
            part.text += piece.text
            part.finish_reason = piece.finish_reason
            if piece.token_id is not None:
                part.tokens.append((piece.token_id, piece.logprobs))
                self._completion_tokens += 1
        return list(parts.values())

    def _usage(self) -> dict[str, Any]:
        prompt = self._work.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
        }

    def _token_text(self, token_id: int) -> str:
        """A token as text; as the vocabulary spells it where it is only a part of a character."""
        text = self._tokenizer.decode([token_id], skip_special=False)
        return text if text and "\N{REPLACEMENT CHARACTER}" not in text else self._tokenizer.token(token_id) or f"token {token_id}"


class ChatAnswer(Answer):
    """`POST /v1/chat/completions`."""

    kind, chunk_kind, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        choices = range(self._work.params[0].n)
        return [self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]) for index in choices]

    def _choice(self, part: Part) -> dict[str, Any]:
        message = {"role": "assistant", "content": part.text, "refusal": None}
        return {"index": part.choice, "message": message, "logprobs": self._logprobs(part), "finish_reason": part.finish_reason}

    def _chunk_choice(self, part: Part) -> dict[str, Any]:
        delta = {"content": part.text} if part.text else {}
        return {"index": part.choice, "delta": delta, "logprobs": self._logprobs(part), "finish_reason": part.finish_reason}

    def _logprobs(self, part: Part) -> dict[str, Any] | None:
        count = self._work.params[0].logprobs
        if count is None:
            return None
        content = []
        for token, logprobs in part.tokens:
            best = [self._entry(other, logprobs) for other in _most_probable(logprobs, count)]
            content.append({**self._entry(token, logprobs), "top_logprobs": best})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprobs: TokenLogprobs | None) -> dict[str, Any]:
        text = self.token_text(token)
        known = self._tokenizer.decode([token], skip_special=False) == text
        return {"token": text, "bytes": list(text.encode()) if known else None, "logprob": _logprob(logprobs, token)}


class CompletionAnswer(Answer):
    """`POST /v1/completions`. A choice looks the same whole and in a chunk."""

    kind, chunk_kind, id_prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, model: str, tokenizer: Tokenizer, work: Work, job: Job):
        super().__init__(model, tokenizer, work, job)
        self._begun: set[int] = set()
        self._offsets: dict[int, int] = {}  # by choice: characters of the tokens so far

    def _choice(self, part: Part) -> dict[str, Any]:
        count = self._work.params[0].logprobs
        prompt = part.choice // self._work.params[0].n
        text, tokens = part.text, part.tokens
        if self._work.echoes is not None and part.choice not in self._begun:
            recorded = self._job.prompt_logprobs.get(prompt, ())
            text = self._work.echoes[prompt] + text
            tokens = [*zip(self._work.prompts[prompt], recorded, strict=False), *tokens]
        self._begun.add(part.choice)
        logprobs = None if count is None else self._logprobs(part.choice, tokens, count)
        return {"index": part.choice, "text": text, "logprobs": logprobs, "finish_reason": part.finish_reason}

    _chunk_choice = _choice

    def _logprobs(self, choice: int, tokens: Sequence[tuple[int, TokenLogprobs | None]], count: int) -> dict[str, Any]:
        offsets, at = [], self._offsets.get(choice, 0)
        for token, _ in tokens:
            offsets.append(at)
            at += len(self._tokenizer.decode([token]))
        self._offsets[choice] = at
        best = [
            logprobs and {self.token_text(other): _logprob(logprobs, other) for other in {*_most_probable(logprobs, count), token}}
            for token, logprobs in tokens
        ]
        return {
            "text_offset": offsets,
            "tokens": [self.token_text(token) for token, _ in tokens],
            "token_logprobs": [logprobs and _logprob(logprobs, token) for token, logprobs in tokens],
            "top_logprobs": best,
        }


def _most_probable(logprobs: TokenLogprobs | None, count: int) -> list[int]:
    """The `count` most probable tokens, in order; the chosen one is among them only if it is one of them."""
    return sorted(
        (token for token, entry in (logprobs or {}).items() if entry.rank <= count), key=lambda token: (logprobs or {})[token].rank
    )


def _logprob(logprobs: TokenLogprobs | None, token: int) -> float:
    value = logprobs[token].logprob if logprobs else LEAST_LOGPROB
    return value if value > LEAST_LOGPROB else LEAST_LOGPROB

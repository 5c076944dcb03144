"""`SamplingParams`: how the next token is chosen, and when to stop. The names are vLLM's and OpenAI's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvshare.errors import RequestError

MAX_LOGPROBS = 64
MAX_OUTPUTS = 64
MAX_STOPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Raises `RequestError`, with the field's name and bounds, for a value that makes no sense."""

    n: int = 1  # completions of each prompt; they share the prompt's cache
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 (or -1) considers all tokens
    top_p: float = 1.0
    min_p: float = 0.0  # relative to the most probable token
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over the output
    frequency_penalty: float = 0.0  # over the output, for each occurrence
    seed: int | None = None
    stop: tuple[str, ...] = ()  # strings; not part of the text returned
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = 256  # None: up to the end of the context
    ignore_eos: bool = False
    logprobs: int | None = None  # that many alternatives beside each chosen token
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "top_k", 0 if self.top_k == -1 else self.top_k)
        self._integer("n", 1, MAX_OUTPUTS)
        self._integer("top_k", 0, 1 << 20)
        self._number("temperature", 0, 100)
        self._number("top_p", 0, 1, open_below=True)
        self._number("min_p", 0, 1)
        self._number("repetition_penalty", 0, 100, open_below=True)
        self._number("presence_penalty", -2, 2)
        self._number("frequency_penalty", -2, 2)
        for name, bounds in (
            ("seed", (-(1 << 63), (1 << 63) - 1)),
            ("max_tokens", (1, 1 << 31)),
            ("logprobs", (0, MAX_LOGPROBS)),
            ("prompt_logprobs", (0, MAX_LOGPROBS)),
        ):
            if getattr(self, name) is not None:
                self._integer(name, *bounds)
        if len(self.stop) > MAX_STOPS or not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError(f"stop: takes up to {MAX_STOPS} strings that are not empty")
        if not all(isinstance(token, int) for token in self.stop_token_ids):
            raise RequestError("stop_token_ids: takes token ids (integers)")

    def _integer(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise RequestError(f"{name}: must be an integer from {least} to {most}, not {value!r}")

    def _number(self, name: str, least: float, most: float, open_below: bool = False) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
        if not is_number or not least <= value <= most or (open_below and value == least):
            bounds = f"above {least}, at most {most}" if open_below else f"from {least} to {most}"
            raise RequestError(f"{name}: must be a number {bounds}, not {value!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @staticmethod
    def from_generation_config(config: Mapping[str, Any], **overrides: Any) -> SamplingParams:
        """A model's own defaults (`generation_config.json`), with `overrides` on top; None in `overrides` means "not given"."""
        taken = {
            name: config[name] for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty") if config.get(name) is not None
        }
        if not config.get("do_sample", bool(taken)):
            taken = {"temperature": 0.0}
        return SamplingParams(**{**taken, **{name: value for name, value in overrides.items() if value is not None}})

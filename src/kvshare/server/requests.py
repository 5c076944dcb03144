"""What a client may ask: the fields of OpenAI's two generation APIs and vLLM's extensions, each with a type and a bound.

Bounds of sampling fields are `SamplingParams`' own. A field that would change the output but is not implemented is refused by name;
one that does not change it is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvshare.server.errors import ApiError

MAX_CHOICES = 64  # prompts x n of one request
MAX_MESSAGES = 4096
MAX_PARTS = 256
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKENS = 256
MAX_LOGPROBS = 20

_HARMLESS = frozenset(
    {
        "user",
        "safety_identifier",
        "metadata",
        "service_tier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "prediction",
        "parallel_tool_calls",
    }
)
"""Who asks, how it is billed, hints for speed, and what means something only together with tools."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "store": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "tool_calls": ([],),
    "annotations": ([],),
}
"""Values of unsupported fields that ask for nothing; null always does."""

_NOT_YET = frozenset(("response_format", "tools", "tool_choice", "functions", "function_call", "logit_bias", "tool_calls"))

Integer = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Name = Annotated[str, Field(min_length=1, max_length=1024)]
StopString = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]


class Fields(BaseModel):
    """No coercion: "1", 1.0 and true are not the integer 1; no NaN and no infinity."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)

    def check_extra(self, where: str = "") -> None:
        """Refuse fields that are not ours and not harmless. Raises `ApiError` with the field's name."""
        for name, value in (self.model_extra or {}).items():
            if value is None or name in _HARMLESS or value in _NEUTRAL.get(name, ()):
                continue
            path = f"{where}{name}"[:200]
            reason = "is not supported yet" if name in _NOT_YET else "is not a field that this server knows"
            raise ApiError(400, f"{path}: {reason}; leave it out", param=path, code="unsupported_parameter")


class StreamOptions(Fields):
    include_usage: bool | None = None


class GenerationRequest(Fields):
    """What both APIs have in common."""

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Integer | None = None
    stop: StopString | Annotated[list[StopString], Field(fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[Integer], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)] | None = None
    max_tokens: Integer | None = None
    ignore_eos: bool | None = None

    def sampling(self) -> dict[str, Any]:
        """The fields that `SamplingParams` has under the same name."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        same = "n temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty seed stop_token_ids ignore_eos"
        return {"stop": stop, **{name: getattr(self, name) for name in same.split()}}

    def check(self) -> None:
        """What types cannot say. Raises `ApiError`."""
        self.check_extra()
        if self.stream_options is not None:
            self.stream_options.check_extra("stream_options.")
            if not self.stream:
                raise ApiError(400, "stream_options: only allowed together with stream: true", param="stream_options")


class TextPart(Fields):
    type: Name
    text: str | None = None


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)]
    name: Name | None = None

    def for_template(self, where: str) -> dict[str, Any]:
        """As chat templates want it, text parts joined by line breaks. Raises `ApiError` for images and other parts that are not text."""
        self.check_extra(f"{where}.")
        texts = [self.content] if isinstance(self.content, str) else []
        for index, part in enumerate(self.content if isinstance(self.content, list) else []):
            place = f"{where}.content[{index}]"
            part.check_extra(f"{place}.") if part.type == "text" else None
            if part.type != "text" or part.text is None:
                reason = "a text part needs text" if part.type == "text" else f"this server reads text only, not {part.type!r:.100}"
                raise ApiError(400, f"{place}: {reason}", param=place, code="unsupported_content")
            texts.append(part.text)
        role = "system" if self.role == "developer" else self.role  # OpenAI's newer name, which no open model's template knows
        return {"role": role, "content": "\n".join(texts), **({"name": self.name} if self.name else {})}


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs: only allowed together with logprobs: true", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(400, "max_tokens: differs from max_completion_tokens; give one of them", param="max_tokens")


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Any
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, all text or all token ids. Raises `ApiError` for anything else; the ids' values are the engine's to check."""
        several = [self.prompt] if isinstance(self.prompt, str) or _all(self.prompt, int) else self.prompt
        if _all(several, str) or (_all(several, list) and all(_all(prompt, int) for prompt in several)):
            return several
        expected = "a string, a list of strings, a list of token ids or a list of such lists; not empty"
        raise ApiError(400, f"prompt: must be {expected}", param="prompt")


AnyRequest = TypeVar("AnyRequest", bound=GenerationRequest)


def parse(kind: type[AnyRequest], body: bytes) -> AnyRequest:
    """The request in a body of JSON, checked but for what only the model knows. Raises `ApiError` for the first mistake."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = _param(first["loc"])
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')[:200]}") from None
        raise ApiError(400, f"{param}: {first['msg'][:200]}", param=param) from None
    request.check()
    return request


def _all(values: Any, kind: type) -> bool:
    """Whether this is a list, not empty, of nothing but `kind`."""
    return isinstance(values, list) and bool(values) and all(isinstance(value, kind) for value in values)


def _param(location: tuple[int | str, ...]) -> str:
    """`messages[0].content` from pydantic's path, without the names that it gives to the members of a union."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step.isidentifier() and step not in ("str", "list"):
            path += f".{step}" if path else step
    return path[:200] or "body"

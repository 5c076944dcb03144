"""From a checked request to what the engine takes: token ids and sampling parameters. Runs in a thread beside the engine's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvshare.errors import RequestError
from kvshare.server.errors import ApiError
from kvshare.server.requests import MAX_CHOICES, ChatRequest, CompletionRequest, GenerationRequest

if TYPE_CHECKING:
    from kvshare.engine.llm import LLM
    from kvshare.engine.sampling import SamplingParams

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, where a completion request does not say; a chat may go on to the end of the context
MAX_PROMPT_LOGPROBS = 200_000  # log-probabilities of prompt tokens in one answer


@dataclass(frozen=True, slots=True)
class Work:
    """The prompts of a request, and how each goes on. `echoes` are the prompts' texts, where the answer repeats them."""

    prompts: list[list[int]]
    params: list[SamplingParams]
    echoes: list[str] | None = None

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)


def prepare_chat(llm: LLM, request: ChatRequest) -> Work:
    """Render the messages with the model's template. Raises `ApiError`."""
    if not llm.tokenizer.has_chat_template:
        message = "this model has no chat template, so it is a base model that continues text: use /v1/completions"
        raise ApiError(400, message, param="messages", code="no_chat_template")
    messages = [message.for_template(f"messages[{index}]") for index, message in enumerate(request.messages)]
    try:
        prompt = llm.chat_prompt(messages)
    except RequestError as error:
        raise ApiError(400, str(error), param="messages") from None
    wanted = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return Work([prompt], [_sampling(llm, request, prompt, wanted, None, logprobs=logprobs)])


def prepare_completion(llm: LLM, request: CompletionRequest) -> Work:
    """Tokenize the prompts. Raises `ApiError`."""
    given = request.prompts()
    if len(given) > MAX_CHOICES:
        raise ApiError(400, f"prompt: {len(given):,} prompts are more than {MAX_CHOICES}", param="prompt")
    prompts = [llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in given]
    recorded = request.logprobs if request.echo else None
    entries = sum(len(prompt) for prompt in prompts) * ((recorded or 0) + 1)
    if recorded is not None and entries > MAX_PROMPT_LOGPROBS:
        raise ApiError(400, f"logprobs: {entries:,} for the echoed prompt are more than {MAX_PROMPT_LOGPROBS:,}", param="logprobs")
    params = [
        _sampling(llm, request, prompt, request.max_tokens, DEFAULT_COMPLETION_TOKENS, logprobs=request.logprobs, prompt_logprobs=recorded)
        for prompt in prompts
    ]
    if len(given) * params[0].n > MAX_CHOICES:
        raise ApiError(400, f"n: {len(given)} prompts x n {params[0].n} are more than {MAX_CHOICES} completions", param="n")
    return Work(prompts, params, _texts(llm, given, prompts) if request.echo else None)


def check_context(llm: LLM, work: Work) -> None:
    """Raises `ApiError` with both numbers for a prompt that leaves no room, or whose `max_tokens` does not fit behind it."""
    for prompt, params in zip(work.prompts, work.params, strict=True):
        tokens = len(prompt) + (params.max_tokens or 1)
        if tokens > llm.max_context:
            message = (
                f"this model's context is {llm.max_context:,} tokens, but {tokens:,} were asked for: "
                f"{len(prompt):,} in the prompt and {params.max_tokens or 1:,} to follow; shorten the prompt or lower max_tokens"
            )
            raise ApiError(400, message, param="max_tokens" if len(prompt) < llm.max_context else None, code="context_length_exceeded")


def _sampling(
    llm: LLM, request: GenerationRequest, prompt: Sequence[int], wanted: int | None, default: int | None, **more: Any
) -> SamplingParams:
    """The request's own values over the model's defaults. Raises `ApiError` with the field's name for a value out of bounds."""
    room = max(1, llm.max_context - len(prompt))
    max_tokens = wanted if wanted is not None else min(default or room, room)
    try:
        return llm.default_sampling_params(max_tokens=max_tokens, **request.sampling(), **more)
    except RequestError as error:
        name = str(error).partition(":")[0]
        raise ApiError(400, str(error), param=name if name in type(request).model_fields else None) from None


def _texts(llm: LLM, given: Sequence[str | list[int]], prompts: Sequence[list[int]]) -> list[str]:
    return [own if isinstance(own, str) else llm.tokenizer.decode(ids) for own, ids in zip(given, prompts, strict=True)]

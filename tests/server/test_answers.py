"""What the real `openai` client gets is what the library gives, in every way of asking."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from server.harness import MODEL, Server

from kvshare import LLM, SamplingParams

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a wörd"}]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def chat_text(reference: LLM, params: SamplingParams = GREEDY) -> str:
    return reference.generate([reference.chat_prompt(MESSAGES)], params)[0].outputs[0].text


def test_chat_equals_the_library(server: Server, reference: LLM) -> None:
    answer = server.client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
    )
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", chat_text(reference), "length")
    prompt = len(reference.chat_prompt(MESSAGES))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (prompt, 24, prompt + 24)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_streamed_chat_equals_the_library(server: Server, reference: LLM) -> None:
    stream = server.client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_completion_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == chat_text(reference)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 24


def test_a_stream_without_options_has_no_usage(server: Server) -> None:
    chunks = list(server.client.completions.create(model=MODEL, prompt="x", max_tokens=3, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_async_client(server: Server, reference: LLM) -> None:
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
            options = {"model": MODEL, "messages": MESSAGES, "max_tokens": 24, "temperature": 0, "extra_body": {"ignore_eos": True}}
            whole = await client.chat.completions.create(**options)
            streamed = [
                chunk.choices[0].delta.content or "" async for chunk in await client.chat.completions.create(**options, stream=True)
            ]
            return whole.choices[0].message.content or "", "".join(streamed)

    assert asyncio.run(ask()) == (chat_text(reference),) * 2


@pytest.mark.parametrize("prompt", ["tell me", [10, 20, 30]], ids=["text", "token ids"])
def test_one_prompt(server: Server, reference: LLM, prompt: str | list[int]) -> None:
    answer = server.client.completions.create(model=MODEL, prompt=prompt, max_tokens=24, temperature=0, extra_body={"ignore_eos": True})
    assert [choice.text for choice in answer.choices] == [reference.generate([prompt], GREEDY)[0].outputs[0].text]


def test_several_prompts_and_choices_are_numbered_prompt_by_prompt(server: Server, reference: LLM) -> None:
    prompts = ["a", "bcd", "ef"]
    options = {"model": MODEL, "prompt": prompts, "max_tokens": 24, "temperature": 0, "n": 2, "extra_body": {"ignore_eos": True}}
    expected = [output.outputs[0].text for output in reference.generate(prompts, GREEDY) for _ in range(2)]
    answer = server.client.completions.create(**options)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 6
    assert answer.usage.completion_tokens == 6 * 24
    texts = [""] * 6
    for chunk in server.client.completions.create(**options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_eight_clients_at_once_get_what_each_gets_alone(server: Server, reference: LLM) -> None:
    prompts = ["".join(chr(97 + (i * 7 + j) % 26) for j in range(1 + 37 * i)) for i in range(8)]
    lengths = [80 - 9 * i for i in range(8)]

    def ask(index: int) -> str:
        with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
            options = {"model": MODEL, "prompt": prompts[index], "max_tokens": lengths[index], "temperature": 0}
            extra = {"extra_body": {"ignore_eos": True}}
            if index % 2:
                return "".join(chunk.choices[0].text for chunk in client.completions.create(**options, **extra, stream=True))
            return client.completions.create(**options, **extra).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(8)))
    for index, text in enumerate(together):
        alone = reference.generate([prompts[index]], SamplingParams(temperature=0, max_tokens=lengths[index], ignore_eos=True))
        assert text == alone[0].outputs[0].text


def test_seed_and_penalties_reach_the_sampler(server: Server, reference: LLM) -> None:
    fields = {"temperature": 1.3, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.25, "seed": 7, "max_tokens": 24}
    extra = {"top_k": 50, "min_p": 0.001, "repetition_penalty": 1.2, "ignore_eos": True}
    texts = [server.client.completions.create(model=MODEL, prompt="p", **fields, extra_body=extra).choices[0].text for _ in range(2)]
    expected = reference.generate(["p"], SamplingParams(**fields, **extra))[0].outputs[0].text
    assert texts == [expected, expected]
    assert expected != reference.generate(["p"], GREEDY)[0].outputs[0].text


def test_stop_string_ends_the_text_before_it(server: Server, reference: LLM) -> None:
    text = reference.generate(["tell me"], GREEDY)[0].outputs[0].text
    stop = text[5:7]
    for stream in (False, True):
        answer = server.client.completions.create(
            model=MODEL,
            prompt="tell me",
            max_tokens=24,
            temperature=0,
            stop=[stop, "never"],
            stream=stream,
            extra_body={"ignore_eos": True},
        )
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_stop_token_ends_the_text(server: Server, reference: LLM) -> None:
    tokens = reference.generate(["tell me"], GREEDY)[0].outputs[0].token_ids
    answer = server.client.completions.create(
        model=MODEL, prompt="tell me", max_tokens=24, temperature=0, extra_body={"ignore_eos": True, "stop_token_ids": [tokens[4]]}
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == tokens.index(tokens[4]) + 1


def test_chat_logprobs(server: Server, reference: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3)
    expected = reference.generate([reference.chat_prompt(MESSAGES)], params)[0].outputs[0]
    options = {"model": MODEL, "messages": MESSAGES, "max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}}
    answer = server.client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    streamed = list(server.client.chat.completions.create(**options, logprobs=True, top_logprobs=3, stream=True))
    assert answer.choices[0].logprobs is not None
    whole = answer.choices[0].logprobs.content or []
    pieces = [entry for chunk in streamed if (own := chunk.choices[0].logprobs) for entry in own.content or []]
    for content in (whole, pieces):
        assert len(content) == 6
        for entry, token, logprobs in zip(content, expected.token_ids, expected.logprobs or [], strict=True):
            assert entry.logprob == pytest.approx(logprobs[token].logprob, abs=1e-4)
            assert [other.logprob for other in entry.top_logprobs] == pytest.approx(
                sorted((other.logprob for other in logprobs.values()), reverse=True), abs=1e-4
            )
            if entry.bytes is not None:
                assert bytes(entry.bytes).decode() == entry.token
    bare = server.client.chat.completions.create(**options, logprobs=True)
    assert bare.choices[0].logprobs is not None
    assert [entry.top_logprobs for entry in bare.choices[0].logprobs.content or []] == [[]] * 6


def test_echo_with_logprobs_scores_the_prompt(server: Server, reference: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, logprobs=2, prompt_logprobs=2)
    expected = reference.generate(["scored"], params)[0]
    answer = server.client.completions.create(
        model=MODEL, prompt="scored", max_tokens=2, temperature=0, echo=True, logprobs=2, extra_body={"ignore_eos": True}
    )
    choice = answer.choices[0]
    assert choice.text == "scored" + expected.outputs[0].text
    assert choice.logprobs is not None
    assert (choice.logprobs.tokens or [])[:6] == list("scored")
    assert (choice.logprobs.text_offset or [])[:7] == list(range(7))
    first, *scores = choice.logprobs.token_logprobs or []
    assert first is None
    rows = [*(expected.prompt_logprobs or [])[1:], *(expected.outputs[0].logprobs or [])]
    tokens = [*expected.prompt_token_ids[1:], *expected.outputs[0].token_ids]
    assert scores == pytest.approx([row[token].logprob for row, token in zip(rows, tokens, strict=True) if row], abs=1e-4)


def test_echo_repeats_token_ids_as_text(server: Server, reference: LLM) -> None:
    ids = reference.tokenizer.encode("again")
    answer = server.client.completions.create(model=MODEL, prompt=[ids, ids], max_tokens=1, echo=True, stream=True)
    starts = {chunk.choices[0].index: chunk.choices[0].text for chunk in reversed(list(answer))}
    assert [text[:5] for _, text in sorted(starts.items())] == ["again"] * 2


def test_text_parts_are_joined_by_lines(server: Server) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    texts = [
        server.client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": content}], max_tokens=8, temperature=0)
        .choices[0]
        .message.content
        for content in (parts, "one\ntwo")
    ]
    assert texts[0] == texts[1]


def test_an_answer_can_be_sent_back_as_a_message(server: Server) -> None:
    first = server.client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=4)
    messages = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "go on"}]
    assert server.client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4).choices  # pyright: ignore[reportArgumentType]


def test_a_completion_has_16_tokens_unless_told(server: Server) -> None:
    answer = server.client.completions.create(model=MODEL, prompt="x", temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_models(server: Server) -> None:
    (entry,) = server.client.models.list().data
    assert entry.id == MODEL
    assert server.http.get("/health").json() == {"status": "ok"}

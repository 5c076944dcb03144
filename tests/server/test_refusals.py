"""Requests that cannot be answered: each gets OpenAI's envelope with the field's name and the numbers, and costs nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server.harness import CONTEXT, LONG, MODEL, Server, load_tiny, serving

from kvshare.engine.sampling import MAX_OUTPUTS

USER = {"role": "user", "content": "hi"}
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "x", "max_tokens": 2}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [USER], "max_tokens": 2}


def refused(server: Server, path: str, body: bytes | dict[str, Any], status: int = 400) -> dict[str, Any]:
    """The error of a request that must be refused."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(answer.content) < 2000
    return error


SAMPLING = {
    "n": [0, -1, MAX_OUTPUTS + 1, 1 << 70, True, "1", 1.5, []],
    "temperature": [-0.1, 1e9, True, "1", {}],
    "top_p": [0, -1, 1.01, True],
    "top_k": [-2, 1 << 40, True, 0.5],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1, 1e9],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "seed": [1 << 63, True, "s"],
    "stop": ["", [""], [1], 5, ["s"] * 17, "s" * 257, {}],
    "stop_token_ids": [5, [True], ["a"], [1] * 257],
    "max_tokens": [0, -1, True, 1 << 62, "5"],
    "ignore_eos": [1, "yes"],
    "stream": [1, "yes"],
    "stream_options": [{"include_usage": True}, 1],
    "model": [None, "", 5],
}


@pytest.mark.parametrize("field", SAMPLING)
def test_fields_out_of_bounds_are_refused_by_name(server: Server, field: str) -> None:
    for value in SAMPLING[field]:
        for path, good in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
            error = refused(server, path, {**good, field: value})
            assert error["param"].partition("[")[0] == field
            assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "prompt", [None, 5, [], [[]], [5, "a"], ["a", 5], [[1], "a"], [[1.5]], [["a"]], {}, [1.5], ["a"] * 65, [[1]] * 65], ids=repr
)
def test_prompts_of_no_known_shape(server: Server, prompt: Any) -> None:
    assert refused(server, "/v1/completions", {**COMPLETION, "prompt": prompt})["param"] == "prompt"


@pytest.mark.parametrize("prompt", ["", [True], [-1], [10**9], [1 << 70]], ids=repr)
def test_prompts_that_the_engine_refuses(server: Server, prompt: Any) -> None:
    refused(server, "/v1/completions", {**COMPLETION, "prompt": prompt})


def test_a_stream_that_is_refused_has_a_status_of_its_own(server: Server) -> None:
    for _ in range(20):
        refused(server, "/v1/completions", {**COMPLETION, "prompt": [10**9], "stream": True})


def test_one_bad_prompt_refuses_all(server: Server) -> None:
    refused(server, "/v1/completions", {**LONG, "prompt": [[1], [2], [10**9]]})
    server.assert_idle()


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hi", "messages"),
        ([5], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "messages[0].role"),
        ([USER, {"role": "user", "content": 5}], "messages[1].content"),
        ([USER, {"role": "assistant", "content": None}], "messages[1].content"),
        ([{**USER, "mood": "bad"}], "messages[0].mood"),
        ([{**USER, "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]}], "messages[0].content[0].cache_control"),
        ([USER, {"role": "system", "content": "late"}], "messages"),
        ([USER] * 4097, "messages"),
    ],
)
def test_messages(server: Server, messages: Any, param: str) -> None:
    assert refused(server, "/v1/chat/completions", {**CHAT, "messages": messages})["param"] == param


def test_an_image_is_refused_by_name(server: Server) -> None:
    content = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]
    error = refused(server, "/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": content}]})
    assert "'image_url'" in error["message"]


def test_what_the_template_refuses_is_said(server: Server) -> None:
    error = refused(server, "/v1/chat/completions", {**CHAT, "messages": [USER, {"role": "system", "content": "late"}]})
    assert "a system message can only come first" in error["message"]


@pytest.mark.parametrize("field", ["response_format", "tools", "logit_bias", "functions", "tool_choice", "cache_salt", "temprature"])
def test_fields_that_would_change_the_output_are_refused(server: Server, field: str) -> None:
    for path, good in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        error = refused(server, path, {**good, field: {"a": 1}})
        assert (error["param"], error["code"]) == (field, "unsupported_parameter")


def test_fields_that_change_nothing_are_accepted(server: Server) -> None:
    harmless = {"user": "u", "service_tier": "auto", "metadata": {"a": "b"}, "store": False, "response_format": {"type": "text"}}
    neutral = {"tools": None, "logit_bias": {}, "tool_choice": "none", "seed": None, "stop": None, "n": None, "stream": None}
    for path, good in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        assert server.http.post(path, json={**good, **harmless, **neutral}).status_code == 200


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/completions", "logprobs", 21),
        ("/v1/completions", "logprobs", True),
        ("/v1/completions", "echo", 1),
        ("/v1/completions", "suffix", "tail"),
        ("/v1/completions", "best_of", 2),
        ("/v1/chat/completions", "top_logprobs", 3),
        ("/v1/chat/completions", "top_logprobs", 21),
        ("/v1/chat/completions", "logprobs", 3),
        ("/v1/chat/completions", "max_completion_tokens", 0),
        ("/v1/chat/completions", "max_tokens", 5),
    ],
)
def test_fields_of_one_api(server: Server, path: str, field: str, value: Any) -> None:
    good = COMPLETION if path == "/v1/completions" else {"model": MODEL, "messages": [USER], "max_completion_tokens": 4}
    assert refused(server, path, {**good, field: value})["param"] == field


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(server: Server) -> None:
    error = refused(server, "/v1/completions", {**COMPLETION, "prompt": "x" * 40_000})
    assert error["code"] == "context_length_exceeded"
    assert f"{CONTEXT:,}" in error["message"]
    assert "40,000" in error["message"]
    with pytest.raises(openai.BadRequestError, match="32,768 tokens, but 32,769 were asked for"):
        server.client.completions.create(model=MODEL, prompt="x", max_tokens=CONTEXT)


def test_echoed_logprobs_are_bounded(server: Server) -> None:
    assert refused(server, "/v1/completions", {**COMPLETION, "prompt": "x" * 20_000, "echo": True, "logprobs": 20})["param"] == "logprobs"


def test_another_model_does_not_exist(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.completions.create(model="gpt-9", prompt="x")
    assert caught.value.code == "model_not_found"
    assert MODEL in caught.value.message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model":"tiny","prompt":"x"} x',
        b'{"model":"tiny","prompt":"\\ud800"}',
        b'{"model":"tiny","prompt":"x","temperature":NaN}',
        b'{"model":"tiny","prompt":"x","temperature":-Infinity}',
        b'{"model":"tiny","prompt":"x","temperature":1e999}',
        b'{"model":"tiny","prompt":"x","n":1' + b"0" * 5000 + b"}",
        b'{"model":"tiny","prompt":[1' + b"0" * 5000 + b"]}",
        b"[" * 1_000_000,
        b'{"model":"tiny","prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model":"tiny","prompt":"x","user":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    ],
    ids=lambda body: repr(body[:40]),
)
def test_bodies_that_are_no_request(server: Server, body: bytes) -> None:
    refused(server, "/v1/completions", body)


def test_json_needs_its_content_type(server: Server) -> None:
    answer = server.http.post("/v1/completions", content=json.dumps(COMPLETION), headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_other_paths_and_methods(server: Server) -> None:
    for method, path, status in (
        ("GET", "/nope", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
        ("DELETE", "/v1/models", 405),
    ):
        answer = server.http.request(method, path)
        assert answer.status_code == status, path
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def small(checkpoint: Path) -> Iterator[Server]:
    """A context so short that no request takes long, whatever it asks for."""
    with serving(lambda: load_tiny(checkpoint, max_context=64)) as server:
        server.wait_until_loaded()
        yield server
        server.assert_idle()


NASTY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 80), 1 << 80),
    st.sampled_from([-1, 0, 1 << 31, (1 << 31) - 1, 1 << 62, 1 << 63, -(1 << 63), 10**100]),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.one_of(st.integers(-(1 << 70), 1 << 70), st.text(max_size=3), st.none()), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
FIELDS = [*SAMPLING, "logprobs", "top_logprobs", "echo", "prompt", "messages", "max_completion_tokens"]
FIELDS += ["tools", "user", "best_of", "suffix", "anything"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]), fields=st.dictionaries(st.sampled_from(FIELDS), NASTY, max_size=4)
)
def test_any_fields_are_answered_or_refused(small: Server, path: str, fields: dict[str, Any]) -> None:
    good = COMPLETION if path == "/v1/completions" else CHAT
    before = psutil.Process().memory_info().rss
    answer = small.http.post(path, content=json.dumps({**good, **fields}), headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert psutil.Process().memory_info().rss - before < 100e6


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200))
def test_any_bytes_are_refused(server: Server, body: bytes) -> None:
    refused(server, "/v1/completions", body)

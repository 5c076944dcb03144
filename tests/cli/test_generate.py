"""`kvshare generate` on a tiny checkpoint: where prompts come from, what is printed where, and what a user's mistakes say."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from cli.command import Command

from kvshare import LLM
from kvshare.engine.engine import Engine
from kvshare.engine.outputs import Update


def test_json_holds_what_the_library_returns(command: Command, tiny: Path) -> None:
    found = json.loads(command("generate", tiny, "once upon", "--max-tokens", 40, "--json").out)
    llm = LLM(tiny, progress=False)
    expected = llm.generate("once upon", llm.default_sampling_params(max_tokens=40))[0]
    completion, metrics = expected.outputs[0], expected.metrics
    assert metrics is not None
    assert (found["text"], found["token_ids"]) == (completion.text, completion.token_ids)
    assert found["prompt_token_ids"] == expected.prompt_token_ids
    assert found["finish_reason"] == "length"
    assert found["usage"] == {"prompt_tokens": 9, "completion_tokens": 40, "total_tokens": 49}
    assert found["kv_bytes"]["planned"] == found["kv_bytes"]["held"] == llm.layout.held_bytes(48, 1, "fp32")
    assert found["kv_bytes"]["total"] == llm.layout.bytes(48, 1, "fp32")
    assert found["kv_bytes"]["without_sharing_and_windows"] == 48 * 6 * 2 * 2 * 8 * 4
    assert found["kv_bytes"]["tail_rows_skipped"] == 8


def test_text_streams_to_stdout_and_the_rest_to_stderr(command: Command, tiny: Path) -> None:
    result = command("generate", tiny, "once upon", "--max-tokens", 40)
    text = json.loads(command("generate", tiny, "once upon", "--max-tokens", 40, "--json").out)["text"]
    assert result.status == 0
    assert result.out == text + "\n"
    assert str(tiny) in result.err
    assert "without sharing and windows" in result.err
    assert "8 of 9 prompt rows skipped the last 2 layers" in result.err


def test_what_makes_decoding_slow_is_said(command: Command, tiny: Path) -> None:
    """float32 queries and rows in bfloat16 meet in plain torch, and such steps cannot be replayed."""
    slow = command("generate", tiny, "once upon", "--max-tokens", 8, "--ignore-eos", "--dtype", "float32", "--kv-dtype", "rot4+16")
    assert "attention: float32 queries meet bf16 rows in plain torch" in slow.err
    assert "decode steps are not replayed (the model asks for the step's spans)" in slow.err
    fast = command("generate", tiny, "once upon", "--max-tokens", 8, "--ignore-eos", "--dtype", "float32", "--kv-dtype", "rot4")
    assert fast.status == slow.status == 0
    assert "plain torch" not in fast.err
    assert "replayed" not in fast.err


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_prompt_from_file_and_stdin_is_the_argument(command: Command, tiny: Path, tmp_path: Path, ending: str) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(("zwei\nZeilen" + ending).encode())
    expected = json.loads(command("generate", tiny, "zwei\nZeilen", "--max-tokens", 4, "--json").out)
    from_file = json.loads(command("generate", tiny, "--file", file, "--max-tokens", 4, "--json").out)
    from_stdin = json.loads(command("generate", tiny, "--max-tokens", 4, "--json", stdin=file.read_bytes()).out)
    assert from_file["prompt_token_ids"] == from_stdin["prompt_token_ids"] == expected["prompt_token_ids"]


def test_chat_template_is_applied_only_when_asked_for(command: Command, tiny: Path) -> None:
    plain = json.loads(command("generate", tiny, "hi", "--max-tokens", 2, "--json").out)
    asked = json.loads(command("generate", tiny, "hi", "--max-tokens", 2, "--json", "--chat").out)
    assert len(plain["prompt_token_ids"]) == 2
    assert asked["prompt_token_ids"] == LLM(tiny, progress=False).chat_prompt([{"role": "user", "content": "hi"}])


def test_several_answers_and_logprobs(command: Command, tiny: Path) -> None:
    options = ("--n", 3, "--temperature", 1.5, "--seed", 1, "--max-tokens", 12, "--logprobs", 2)
    found = json.loads(command("generate", tiny, "hi", *options, "--json").out)
    again = json.loads(command("generate", tiny, "hi", *options, "--json").out)
    texts = [completion["token_ids"] for completion in found["completions"]]
    assert texts == [completion["token_ids"] for completion in again["completions"]]
    assert len({tuple(tokens) for tokens in texts}) == 3
    assert found["usage"]["completion_tokens"] == sum(map(len, texts))
    first = found["logprobs"][0]
    assert first[0]["token_id"] == found["token_ids"][0]
    assert 2 <= len(first) <= 3
    assert all(entry["logprob"] <= 0 for entry in first)
    printed = command("generate", tiny, "hi", *options[:-2])
    assert printed.out == "".join(completion["text"] + "\n" for completion in found["completions"])


def test_stop_string_and_default_length(command: Command, tiny: Path) -> None:
    whole = json.loads(command("generate", tiny, "hi", "--json", "--ignore-eos").out)
    assert len(whole["token_ids"]) == 256
    stop = whole["text"][20:23]
    stopped = json.loads(command("generate", tiny, "hi", "--json", "--ignore-eos", "--stop", stop).out)
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == whole["text"][: whole["text"].index(stop)]


def test_default_length_gives_way_to_the_context(command: Command, tiny: Path) -> None:
    found = json.loads(command("generate", tiny, "x" * 20, "--max-context", 32, "--ignore-eos", "--json").out)
    assert len(found["token_ids"]) == 12


def test_ctrl_c_ends_cleanly_between_steps(command: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, step = [], Engine.step

    def step_then_interrupt(engine: Engine) -> list[Update]:
        steps.append(engine)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        return step(engine)

    monkeypatch.setattr(Engine, "step", step_then_interrupt)
    result = command("generate", tiny, "hi", "--json", "--ignore-eos")
    found = json.loads(result.out)
    assert result.status == 130
    assert "interrupted" in result.err
    assert found["finish_reason"] == "abort"
    assert len(found["token_ids"]) == len(steps) == 5
    assert steps[0].arena.num_held == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hi", "--file", "x"), "give one of them"),
        (("hi", "--logprobs", 1), "--logprobs needs --json"),
        (("hi", "--temperature", -1), "temperature: must be a number from 0 to 100"),
        (("hi", "--max-context", "many"), "4096, 128k"),
        (("x" * 40, "--max-context", 32), "the prompt has 40 tokens, but the context is 32"),
        (("--file", "no such file"), "No such file"),
        (("",), "the prompt is empty"),
    ],
)
def test_mistakes_are_one_line_and_status_2(command: Command, tiny: Path, arguments: tuple[object, ...], message: str) -> None:
    result = command("generate", tiny, *arguments)
    assert result.status == 2
    assert message in result.err
    assert "Traceback" not in result.err
    assert result.out == ""


def test_bytes_that_are_no_text_are_refused(command: Command, tiny: Path) -> None:
    result = command("generate", tiny, stdin=b"ab\xff")
    assert result.status == 2
    assert "stdin is no UTF-8 text (byte 2)" in result.err

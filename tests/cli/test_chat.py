"""`kvshare chat`: through a pipe inside the test's process, and in a pseudo-terminal as a person uses it."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli.command import Command
from fixtures import tiny_llama
from safetensors.torch import load_file, save_file

import kvshare
from kvshare import LLM, SamplingParams


def answers(directory: Path, *messages: str, system: str | None = None, max_tokens: int = 20) -> list[str]:
    """What the library answers to the messages of one conversation."""
    llm, history, found = LLM(directory, progress=False), [], []
    if system:
        history.append({"role": "system", "content": system})
    for message in messages:
        history.append({"role": "user", "content": message})
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        found.append(llm.generate(llm.chat_prompt(history), params)[0].outputs[0].text)
        history.append({"role": "assistant", "content": found[-1]})
    return found


def test_every_line_of_a_pipe_is_a_message_with_history(command: Command, tiny: Path) -> None:
    result = command("chat", tiny, "--max-tokens", 20, stdin="hi\nand you?\n")
    assert result.status == 0
    assert result.out == "".join(answer + "\n" for answer in answers(tiny, "hi", "and you?"))
    assert result.err.count(" of 512 · ") == 2
    assert "without sharing and windows" in result.err


def test_system_prompt_and_clear(command: Command, tiny: Path) -> None:
    result = command("chat", tiny, "--max-tokens", 20, stdin="hi\n/clear\n/system Be brief.\nhi\n/clear\nhi\n/system -\n/clear\nhi\n")
    plain, brief = answers(tiny, "hi")[0], answers(tiny, "hi", system="Be brief.")[0]
    assert plain != brief
    assert result.out == f"{plain}\n{brief}\n{brief}\n{plain}\n"
    assert command("chat", tiny, "--max-tokens", 20, "--system", "Be brief.", stdin="hi").out == brief + "\n"


def test_save_writes_messages_and_never_over_a_file(command: Command, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    result = command("chat", tiny, "--max-tokens", 20, stdin=f"hi\n/save {file}\n/save {file}\n/save\n/save {tmp_path}/no/file\n")
    assert json.loads(file.read_text())["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": answers(tiny, "hi")[0]},
    ]
    for message in ("exists and was not touched", "needs the name of a file", "cannot be written"):
        assert message in result.err


def test_a_continued_line_is_one_message(command: Command, tiny: Path) -> None:
    result = command("chat", tiny, "--max-tokens", 20, stdin="one\\\ntwo\n")
    assert result.out == answers(tiny, "one\ntwo")[0] + "\n"


def test_unknown_commands_are_named_and_paths_are_messages(command: Command, tiny: Path) -> None:
    result = command("chat", tiny, "--max-tokens", 20, stdin="/nope\n/usr/bin is what?\n/quit\nnever read\n")
    assert "/nope is no command: /help lists them" in result.err
    assert result.out == answers(tiny, "/usr/bin is what?")[0] + "\n"


def test_a_message_beyond_the_context_is_explained_and_not_taken(command: Command, tiny: Path) -> None:
    result = command("chat", tiny, "--max-tokens", 20, "--max-context", 64, stdin=f"{'x' * 100}\nhi\n")
    assert re.search(r"has 1\d\d tokens, but the context holds 64", result.err)
    assert "The message was not taken" in result.err
    assert result.out == answers(tiny, "hi")[0] + "\n"


def test_an_answer_that_fills_the_context_says_so(command: Command, tiny: Path) -> None:
    result = command("chat", tiny, "--max-context", 40, stdin="hi\n")
    assert "context 40 of 40" in result.err
    assert "the context is full, /clear starts afresh" in result.err


def test_a_base_model_continues_one_growing_text(command: Command, tiny_base: Path) -> None:
    result = command("chat", tiny_base, "--max-tokens", 20, stdin="once\nthen\n/system x\n")
    llm, params = LLM(tiny_base, progress=False), SamplingParams(temperature=0, max_tokens=20)
    first = llm.generate("once", params)[0].outputs[0].text
    second = llm.generate(f"once{first}\nthen", params)[0].outputs[0].text
    assert result.out == f"{first}\n{second}\n"
    assert "has no chat template" in result.err
    assert "no place for a system prompt" in result.err


def test_system_option_on_a_base_model_is_refused(command: Command, tiny_base: Path) -> None:
    result = command("chat", tiny_base, "--system", "x", stdin="hi\n")
    assert (result.status, result.out) == (2, "")
    assert "no place for a system prompt" in result.err


class Terminal:
    """A `kvshare chat` in a pseudo-terminal."""

    def __init__(self, process: subprocess.Popen[bytes], master: int):
        self.process, self.master, self.seen = process, master, ""

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Everything up to and including the pattern; fails with what was shown instead."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen, re.DOTALL)):
            ready = select.select([self.master], [], [], max(0, end - time.monotonic()))[0]
            assert ready, f"{pattern!r} never came; the terminal shows {self.seen[-500:]!r}"
            self.seen += os.read(self.master, 65536).decode(errors="replace")
        shown, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return shown


@contextmanager
def terminal(directory: Path) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(Path(kvshare.__file__).parents[1]), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kvshare", "chat", str(directory)]
    process = subprocess.Popen(command, env=environment, preexec_fn=lambda: os.login_tty(slave))  # with it, Ctrl-C becomes a signal
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        process.kill()
        process.wait()
        os.close(master)


@pytest.fixture(scope="module")
def long_winded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose answers do not end before Ctrl-C does it."""
    directory = tiny_llama(tmp_path_factory.mktemp("long"), max_position_embeddings=200_000)
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][256:] = 0  # the tied head now gives special tokens, the end among them, a logit of 0
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_in_a_terminal_ctrl_c_stops_the_answer_and_a_paste_is_one_message(long_winded: Path, tmp_path: Path) -> None:
    with terminal(long_winded) as chat:
        chat.wait_for("Ctrl-D leaves.*> ")
        chat.send("hi\n")
        chat.wait_for("hi\r\n.{60}")
        chat.send("\x03")  # in the answer
        assert "stopped]" in chat.wait_for(r"\[.*context [\d,]+ of 200,000.*\].*> ")
        chat.send("never sent")
        chat.wait_for("never sent")
        time.sleep(0.2)  # readline must be waiting again: between two keys Ctrl-C counts only with the next one
        chat.send("\x03")
        chat.wait_for("Ctrl-D or /quit leaves.*> ")
        chat.send("/clear\n")
        chat.wait_for("starts afresh.*> ")
        chat.send("\x1b[200~one\ntwo\nthree\x1b[201~\n")  # as a terminal brackets a paste
        chat.wait_for("three.{60}")
        chat.send("\x03")
        chat.wait_for(r"stopped\].*> ")
        chat.send(f"/save {tmp_path / 'talk.json'}\n")
        chat.wait_for("saved to .*> ")
        chat.send("\x04")
        assert chat.process.wait(30) == 0
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [message["content"] for message in messages if message["role"] == "user"] == ["one\ntwo\nthree"]

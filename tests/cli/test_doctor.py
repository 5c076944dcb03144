"""`kvshare doctor`: the table, the JSON and the exit status; what is checked is tested in tests/doctor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli.command import Command
from torch import Tensor

from kvshare.cache.step import Step
from kvshare.models.llama import Llama


def test_a_sound_model_gets_status_0_and_a_table(command: Command, tiny: Path) -> None:
    result = command("doctor", tiny)
    assert result.status == 0
    assert "all good: 10 checks passed, 1 not compared" in result.out
    assert str(tiny) in result.out
    assert "✗" not in result.out


def test_a_failed_check_gets_status_1_and_stands_out(command: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Llama.forward

    def depends_on_the_chunk(self: Llama, tokens: Tensor, step: Step) -> Tensor:
        hidden = forward(self, tokens, step)
        return hidden.roll(1, 1) if len(tokens) == 1 else hidden

    monkeypatch.setattr(Llama, "forward", depends_on_the_chunk)
    result = command("doctor", tiny)
    assert result.status == 1
    assert "✗  token by token" in result.out
    assert "checks failed" in result.out
    found = command("doctor", tiny, "--json")
    assert found.status == 1
    assert json.loads(found.out)["passed"] is False


def test_json_has_every_check_with_its_numbers(command: Command, tiny: Path) -> None:
    result = command("doctor", tiny, "--json", "--tokens", 60)
    report = json.loads(result.out)
    assert (result.status, report["passed"], report["num_tokens"]) == (0, True, 60)
    chunks = next(check for check in report["checks"] if check["name"] == "in chunks")
    assert chunks["status"] == "passed"
    assert 0 <= chunks["measured"] <= chunks["bound"] < 1


def test_text_is_taken_from_a_file(command: Command, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("x" * 70)
    assert json.loads(command("doctor", tiny, "--json", "--text", file).out)["num_tokens"] == 70
    file.write_text("short")
    result = command("doctor", tiny, "--text", file)
    assert result.status == 2
    assert "the text has 5" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "20"), "--text and --tokens need a model"),
        (("no-such-model",), "is no path that exists"),
        (("demo", "--text", "no such file"), "No such file"),
        (("demo", "--tokens", "100000"), "bounded by the context"),
    ],
)
def test_mistakes_are_one_line_and_status_2(command: Command, arguments: tuple[str, ...], message: str) -> None:
    result = command("doctor", *arguments)
    assert result.status == 2
    assert message in result.err
    assert "Traceback" not in result.err


def test_without_a_model_the_machine_is_described(command: Command) -> None:
    found = json.loads(command("doctor", "--json").out)
    assert found["threads"]["cores"] >= 1
    assert found["packages"]["torch"]
    assert set(found["weights"]) == {"smollm2", "gemma3-270m"}
    assert isinstance(found["kernels"]["built"], bool)
    text = command("doctor").out
    assert "native kernels" in text
    assert "weights: smollm2" in text

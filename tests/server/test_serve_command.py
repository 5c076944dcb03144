"""`kvshare serve` as its users start it: a process, flags and variables, Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from fixtures import tiny_llama

SOURCE = Path(__file__).parents[2] / "src"


def command(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "COLUMNS": "200", **variables}
    return subprocess.Popen([sys.executable, "-m", "kvshare", "serve", *arguments], stderr=subprocess.PIPE, text=True, env=environment)


def lines_until(process: subprocess.Popen[str], what: str) -> Iterator[str]:
    assert process.stderr is not None
    for line in process.stderr:
        yield line
        if what in line:
            return
    raise AssertionError(f"it ended without saying {what!r}")


def test_serve_answers_and_stops(tmp_path: Path) -> None:
    checkpoint = tiny_llama(tmp_path)
    process = command(
        str(checkpoint),
        "--port",
        "0",
        "--max-model-len",
        "128",
        KVSHARE_API_KEY="sk-1",
        KVSHARE_SERVED_MODEL_NAME="small",
        KVSHARE_KV_MEMORY="400kB",
    )
    try:
        said = "".join(lines_until(process, "ready"))
        assert str(checkpoint) in said
        assert "97 pages of 4,096 bytes; context 128 tokens" in said
        address = re.search(r"ready: (http://127\.0\.0\.1:\d+/v1)", said)
        assert address is not None
        with openai.OpenAI(base_url=address.group(1), api_key="sk-1", max_retries=0) as client:
            assert [entry.id for entry in client.models.list()] == ["small"]
            answer = client.chat.completions.create(model="small", messages=[{"role": "user", "content": "hi"}], max_tokens=4)
            assert answer.choices[0].message.content is not None
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key="sk-2").models.list()
    finally:
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=30)
    assert "Traceback" not in rest
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no/such/model", "--port", "0"), "no/such/model"),
        (("demo", "--host", "256.1.1.1"), "cannot listen on 256.1.1.1:8000"),
        (("demo", "--port", "0", "--api-key", ""), "--api-key"),
        (("demo", "--port", "70000"), "65535"),
        (("demo", "--port", "0", "--max-num-seqs", "0"), "max-num-seqs"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], said: str) -> None:
    process = command(*arguments)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said in errors
    assert "Traceback" not in errors


def test_the_server_listens_before_torch_is_imported() -> None:
    modules = "kvshare.cli.serve, kvshare.server.app, kvshare.server.run"
    check = f"import sys, {modules}; print({{'torch', 'transformers', 'numpy'}} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env=environment, check=True).stdout == "set()\n"

"""`kvshare plan` as a user calls it: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

SOURCE = str(Path(__file__).parents[2] / "src")
HEAVY = ("torch", "transformers", "numpy", "matplotlib", "gguf", "huggingface_hub")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([SOURCE, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "120", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run([sys.executable, "-m", "kvshare", *arguments], capture_output=True, text=True, env=env, check=False)


def planned(*arguments: str) -> dict[str, Any]:
    result = run("plan", *arguments, "--json")
    return json.loads(result.stdout)["models"][0]


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["plan", "--help"], ["plan", "gemma-4-E2B", "--memory", "24GB", "--for", "vllm"], ["plan", "gemma-4-E2B", "--json"]],
)
def test_planning_imports_nothing_heavy(arguments: list[str]):
    code = f"""
import sys
sys.argv = ["kvshare", *{arguments!r}]
from kvshare.cli.main import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
found = [name for name in {HEAVY!r} if name in sys.modules]
assert not found, found
"""
    env = {**os.environ, "PYTHONPATH": SOURCE}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert result.returncode == 0, result.stderr


def test_help_imports_no_verb():
    code = "import sys; sys.argv = ['kvshare', '--help']\nfrom kvshare.cli.main import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "assert 'kvshare.cli.plan' not in sys.modules"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": SOURCE}, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "plan" in result.stdout


def test_version():
    from kvshare import __version__

    assert run("--version").stdout.strip() == f"kvshare {__version__}"


def test_json_has_the_promised_keys_and_integers():
    model = planned("gemma-4-E2B", "--context", "128k", "--batch", "8", "--memory", "24GB")
    integers = {"context", "batch", "held_bytes", "peak_bytes", "weight_bytes", "max_context", "max_batch"}
    assert {"model", "kv_dtype", "kv_bytes", "kv_bytes_without"} | integers <= set(model)
    assert all(type(model[key]) is int for key in integers)
    assert set(model["kv_bytes"]) == {"total", "full", "window", "shared", "compressed", "indexer", "state"}
    assert set(model["kv_bytes_without"]) == {"sharing", "windows", "both"}
    assert all(type(count) is int for count in (*model["kv_bytes"].values(), *model["kv_bytes_without"].values()))
    assert model["kv_bytes"]["total"] == 8 * 811_597_824 == sum(count for kind, count in model["kv_bytes"].items() if kind != "total")
    assert (model["model"], model["context"], model["batch"], model["kv_dtype"]) == ("gemma-4-E2B", 131_072, 8, "bf16")
    assert model["kv_bytes"]["total"] <= model["held_bytes"] <= model["peak_bytes"]


def test_json_is_all_that_is_printed_and_holds_every_model():
    result = run("plan", "gemma-4-E2B", "Llama-3.1-8B", "DeepSeek-V4.1-Flash", "--json")
    document = json.loads(result.stdout)
    assert list(document) == ["models"]
    assert [model["model"] for model in document["models"]] == ["gemma-4-E2B", "Llama-3.1-8B", "DeepSeek-V4.1-Flash"]
    assert document["models"][2]["weight_bytes"] is None
    assert document["models"][0]["max_context"] is None
    assert result.stderr == ""


class TestExitStatus:
    def test_0_where_it_fits(self):
        assert run("plan", "gemma-4-E2B", "--memory", "24GB").returncode == 0

    def test_1_where_it_does_not_with_the_numbers(self):
        result = run("plan", "gemma-4-31B", "--memory", "24GB")
        assert result.returncode == 1
        assert result.stderr.startswith("kvshare: gemma-4-31B does not fit: weights 61,394,690,560 B")
        assert "gemma-4-31B" in result.stdout

    def test_1_where_one_of_several_does_not(self):
        assert run("plan", "gemma-4-E2B", "gemma-4-31B", "--memory", "24GB", "--json").returncode == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["gemma-4-E2B", "--context", "12z"], "'12z' is not a number of tokens"),
            (["gemma-4-E2B", "--memory", "24XB"], "'24XB' is not a size in memory"),
            (["gemma-4-E9B"], "did you mean gemma-4-E"),
            (["./nothing.json"], "./nothing.json does not exist"),
            (["./nothing.gguf"], "./nothing.gguf does not exist"),
            (["nobody/nothing"], "the hub cannot be reached"),
            (["gemma-4-E2B", "--plot", "cache.pdf"], "must end in .svg or .png"),
            (["gemma-4-E2B", "--plot", "nowhere/cache.png"], "the directory nowhere does not exist"),
            (["gemma-4-E2B", "--kv-dtype", "int8", "--for", "sglang"], "SGLang stores no int8 cache"),
            (["gemma-4-E2B", "--json", "--for", "vllm"], "--json and --for cannot be combined"),
            (["DeepSeek-V4.1-Flash", "--memory", "24GB"], "the weights are not counted"),
        ],
    )
    def test_2_for_a_wrong_command_in_one_line(self, arguments: list[str], message: str, tmp_path: Path):
        result = run("plan", *arguments, HF_HUB_CACHE=str(tmp_path))
        assert result.returncode == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert result.stdout == ""

    @pytest.mark.parametrize("arguments", [[], ["--batch", "0", "gemma-4-E2B"], ["--kv-dtype", "int3", "gemma-4-E2B"], ["--bogus"]])
    def test_2_for_a_usage_error(self, arguments: list[str]):
        assert run("plan", *arguments).returncode == 2

    def test_2_for_an_unknown_verb(self):
        assert run("plam").returncode == 2


def test_the_longest_context_fits_and_one_token_more_does_not(tmp_path: Path):
    config = {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    memory = ("--memory", "24GB")
    longest = planned(str(path), *memory)["max_context"]
    assert planned(str(path), *memory, "--context", str(longest))["fits"]
    assert not planned(str(path), *memory, "--context", str(longest + 1))["fits"]
    largest = planned(str(path), *memory, "--context", "1k")["max_batch"]
    assert planned(str(path), *memory, "--context", "1k", "--batch", str(largest))["fits"]
    assert not planned(str(path), *memory, "--context", "1k", "--batch", str(largest + 1))["fits"]


def test_names_are_found_in_any_case():
    assert planned("GEMMA-4-e2b")["model"] == "gemma-4-E2B"


def test_a_config_without_a_name_is_planned_and_the_assumption_printed(tmp_path: Path):
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 2, "num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 64})
    )
    result = run("plan", str(tmp_path), "--context", "1000")
    assert result.returncode == 0
    assert f"{tmp_path.name}: 1,000 tokens" in result.stdout
    assert "note: model_type is missing: assumed plain grouped-query attention" in result.stdout
    assert "note: the weights are not counted" in result.stdout


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "holds a list"), ("\x00\xff", "is not JSON")])
def test_a_config_that_is_no_object_is_refused(text: str, message: str, tmp_path: Path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    result = run("plan", str(tmp_path))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr


def test_a_cached_config_of_the_hub_serves_offline(tmp_path: Path):
    repository = tmp_path / "models--somebody--something"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 64})
    )
    result = run("plan", "somebody/something", HF_HUB_CACHE=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "somebody/something: 131,072 tokens" in result.stdout


class Hub(BaseHTTPRequestHandler):
    """A hub on this machine with one repository, which has nothing but a config; it remembers what was asked for."""

    asked: ClassVar[list[tuple[str, str]]] = []

    def answer(self, body: bytes) -> None:
        found = self.path == "/somebody/something/resolve/main/config.json"
        self.asked.append((self.command, self.path))
        self.send_response(200 if found else 404)
        self.send_header("ETag", '"1234"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(body) if found else 0))
        self.end_headers()
        if found and self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer(CONFIG)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


CONFIG = json.dumps({"model_type": "llama", "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 64}).encode()


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_of_a_hub_name_only_the_config_is_fetched(hub: str, tmp_path: Path):
    result = run("plan", "somebody/something", HF_ENDPOINT=hub, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")
    assert result.returncode == 0, result.stderr
    assert "somebody/something: 131,072 tokens" in result.stdout
    assert {path for _, path in Hub.asked if path.startswith("/somebody/")} == {"/somebody/something/resolve/main/config.json"}


def test_a_repository_that_the_hub_does_not_have(hub: str, tmp_path: Path):
    result = run("plan", "somebody/nothing", HF_ENDPOINT=hub, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="0")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "somebody/nothing has no config.json that can be read (404)" in result.stderr


def test_a_hub_that_cannot_be_reached_is_one_line_at_once(tmp_path: Path):
    result = run("plan", "google/gemma-4-E2B-it", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="0")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "the hub cannot be reached" in result.stderr
    assert "did you mean gemma-4-E2B" in result.stderr


def test_several_models_stand_side_by_side_at_any_width():
    for columns in ("60", "100", "200"):
        result = run("plan", "gemma-4-E2B", "gemma-4-E4B", "Llama-3.1-8B", "DeepSeek-V4.1-Flash", COLUMNS=columns)
        for text in ("gemma-4-E2B", "DeepSeek-V4.1-Flash", "0.812 GB", "2.168 GB", "17.180 GB", "13.153 GB"):
            assert text in result.stdout
        assert "…" not in result.stdout


def test_what_each_kind_of_layer_stores_is_printed():
    lines = run("plan", "gemma-4-E2B").stdout.splitlines()
    rows = [" ".join(line.split()) for line in lines]
    assert "12 sliding window k, v: 1 x 256, window 512 512 6.29 MB" in rows
    assert "3 full attention k, v: 1 x 512 131,072 0.805 GB" in rows
    assert "16 sliding window, reading layer 13 nothing 0 B" in rows
    assert "4 full attention, reading layer 14 nothing 0 B" in rows
    assert any(row.startswith("one more token 6,144 B") for row in rows)
    assert any(row.startswith("without either 5.637 GB 6.95 times as much") for row in rows)

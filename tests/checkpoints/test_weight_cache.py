"""Quantized weights are made once and mapped ever after; a file that is not whole, or of other weights, is never believed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints.gguf_writing import TYPES, quantized, random_model, write_gguf
from fixtures import tiny_llama

from kvshare.checkpoints import Checkpoint, open_checkpoint
from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.checkpoints.progress import Notice, Progress, ignore
from kvshare.checkpoints.quantized_weights import quantize
from kvshare.models import build_model

HEAD = "model.embed_tokens.weight"
KILLED = """
import sys, time
from tests_weight_cache import quantized_at_load

def stop_in_the_middle(done, total):
    if done > total / 2:
        print("writing", flush=True)
        time.sleep(600)

quantized_at_load(sys.argv[1], progress=stop_in_the_middle)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVSHARE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "tiny", dtype="bfloat16")


PLAIN = "weights: 6 layers stay plain: rows of 48 numbers are not whole blocks of 32 (blocks.0.mlp.down, ...)"


def test_layers_that_stay_plain_are_named(tiny: Path) -> None:
    checkpoint, lines = open_checkpoint(tiny), list[str]()
    quantize(build_model(checkpoint.config, torch.bfloat16), checkpoint, "int8", cached=False, notice=lines.append)
    assert lines[0] == PLAIN


def quantized_at_load(
    where: Path | str, precision: str = "int4", cached: bool = True, progress: Progress | None = None, notice: Notice = ignore
) -> Checkpoint:
    checkpoint = open_checkpoint(where)
    model = build_model(checkpoint.config, torch.bfloat16)
    return quantize(model, checkpoint, precision, cached=cached, progress=progress, notice=lambda line: line == PLAIN or notice(line))


def blocks(checkpoint: Checkpoint, name: str = HEAD) -> PackedBlocks:
    packed = checkpoint.packed(name)
    assert packed is not None
    return packed


def test_the_second_load_maps_what_the_first_one_wrote(tiny: Path, cache: Path) -> None:
    lines, again = [], []
    first = quantized_at_load(tiny, notice=lines.append)
    (file,) = cache.iterdir()
    written = file.stat()
    assert len(lines) == 1
    assert lines[0].startswith("weights: int4, ")
    assert lines[0].endswith(f" mapped from {file}")
    second = quantized_at_load(tiny, progress=lambda *_: pytest.fail("quantized again"), notice=again.append)
    assert again == lines
    assert file.stat() == written
    in_memory = quantized_at_load(tiny, cached=False)
    for name in (HEAD, "model.layers.3.mlp.up_proj.weight"):
        assert blocks(first, name).type.name == "Q4_1"
        assert torch.equal(blocks(first, name).blocks, blocks(second, name).blocks)
        assert torch.equal(blocks(first, name).blocks, blocks(in_memory, name).blocks)
    assert list(cache.iterdir()) == [file]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_the_blocks_are_the_mapped_file(tiny: Path, cache: Path) -> None:
    checkpoint = quantized_at_load(tiny)
    address = blocks(checkpoint).blocks.data_ptr()
    (file,) = cache.iterdir()
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= address < high:
            assert line.endswith(str(file))
            return
    raise AssertionError("mapped nowhere")


def test_each_precision_has_a_file(tiny: Path, cache: Path) -> None:
    assert {blocks(quantized_at_load(tiny, precision)).type.name for precision in ("int4", "int8")} == {"Q4_1", "Q8_0"}
    assert len(list(cache.iterdir())) == 2


def test_a_table_that_is_read_by_the_row_is_quantized_too(tmp_path: Path, cache: Path) -> None:
    random_model("gemma4_text").save_pretrained(tmp_path / "gemma4")
    checkpoint = quantized_at_load(tmp_path / "gemma4")
    table, plain = blocks(checkpoint, "model.embed_tokens_per_layer.weight"), open_checkpoint(tmp_path / "gemma4")
    rows = torch.tensor([5, 90, 5])
    expected = plain.get("model.embed_tokens_per_layer.weight")[rows]
    assert (table.rows(rows) - expected).square().mean() < 0.01 * expected.square().mean()
    assert checkpoint.packed("model.norm.weight") is None
    assert torch.equal(checkpoint.get("model.norm.weight"), plain.get("model.norm.weight"))


def test_blocks_of_a_gguf_file_stay_what_they_are(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", random_model("qwen3"), quantized(TYPES.Q5_0))
    assert blocks(quantized_at_load(path, "int8")).type.name == "Q5_0"
    assert not cache.exists()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is not sound"),
        (lambda file: file.write_bytes(b"something else"), "is not sound"),
        (lambda file: file.write_bytes(b""), "is not sound"),
        (lambda file: file.write_bytes(file.read_bytes().replace(b"Q4_1", b"Q4_0")), "made of other files, or by another version"),
        (lambda file: file.write_bytes(file.read_bytes().replace(b'"U8"', b'"I8"', 1)), "holds other tensors"),
    ],
    ids=["truncated", "foreign", "empty", "other types", "other tensors"],
)
def test_a_file_that_is_not_sound_is_made_again_and_that_is_said(damage: object, reason: str, tiny: Path, cache: Path) -> None:
    expected = blocks(quantized_at_load(tiny)).blocks.clone()
    (file,) = cache.iterdir()
    damage(file)  # type: ignore[operator]
    lines: list[str] = []
    assert torch.equal(blocks(quantized_at_load(tiny, notice=lines.append)).blocks, expected)
    assert reason in lines[0]
    assert lines[0].endswith("the weights are quantized again")
    assert list(cache.iterdir()) == [file]


def test_weights_that_changed_are_quantized_again_in_the_same_place(tiny: Path, cache: Path) -> None:
    old = quantized_at_load(tiny)
    before = blocks(old).blocks.clone()
    tiny_llama(tiny, hidden_size=64, dtype="bfloat16")
    lines: list[str] = []
    assert blocks(quantized_at_load(tiny, notice=lines.append)).shape == (261, 64)
    assert "made of other files" in lines[0]
    assert len(list(cache.iterdir())) == 1
    assert torch.equal(blocks(old).blocks, before), "who mapped the old file keeps it"


def test_a_process_killed_while_it_writes_leaves_nothing_that_is_believed(tiny: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "tests_weight_cache.py").write_text(Path(__file__).read_text())
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1]), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tiny)], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    (unfinished,) = cache.iterdir()
    assert unfinished.name.endswith(".unfinished")
    lines: list[str] = []
    found = quantized_at_load(tiny, notice=lines.append)
    assert len(lines) == 1, "nothing waits for the dead"
    assert torch.equal(blocks(found).blocks, blocks(quantized_at_load(tiny, cached=False)).blocks)
    assert [file.suffix for file in cache.iterdir()] == [".safetensors"]


def test_a_second_process_waits_and_takes_what_the_first_one_wrote(tiny: Path, cache: Path) -> None:
    """Two openings of one file exclude each other as two processes do."""
    waiting, progressed, taken = threading.Event(), list[int](), list[Checkpoint]()

    def load_second() -> None:
        notice = lambda line: waiting.set() if "another process" in line else None  # noqa: E731
        taken.append(quantized_at_load(tiny, progress=lambda done, total: progressed.append(done), notice=notice))

    thread = threading.Thread(target=load_second)

    def start_second(done: int, total: int) -> None:
        if not waiting.is_set():
            thread.start()
            assert waiting.wait(60)

    found = quantized_at_load(tiny, progress=start_second)
    thread.join(60)
    assert not progressed, "quantized twice"
    assert torch.equal(blocks(found).blocks, blocks(taken[0]).blocks)
    assert len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_said_and_memory_is_used(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVSHARE_CACHE", str(tmp_path / "file"))
    lines: list[str] = []
    checkpoint = quantized_at_load(tiny, notice=lines.append)
    assert blocks(checkpoint).blocks.shape[0] == 261
    assert "cannot be written" in lines[0]
    assert "set KVSHARE_CACHE to another directory" in lines[0]
    assert lines[1].endswith("in memory")


def test_a_full_disk_is_noticed_before_anything_is_written(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    lines: list[str] = []
    quantized_at_load(tiny, notice=lines.append)
    assert "10 are free" in lines[0]
    assert list(cache.iterdir()) == []

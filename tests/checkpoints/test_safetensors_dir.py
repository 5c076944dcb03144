"""Directories of safetensors: names of every way of saving, shards and their index, and refusals of what is broken or foreign."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from kvshare.checkpoints import open_checkpoint
from kvshare.errors import CheckpointError, ConfigError

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 4, "num_attention_heads": 2}
TENSORS = {"model.embed_tokens.weight": torch.arange(12.0).view(3, 4), "model.norm.weight": torch.ones(4), "lm_head.weight": torch.eye(4)}


def write(path: Path, tensors: Mapping[str, Tensor] = TENSORS, config: Mapping[str, Any] = CONFIG, **more: str) -> Path:
    path.mkdir(exist_ok=True)
    save_file(dict(tensors), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    for name, text in more.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def write_shards(path: Path, index: Mapping[str, Any] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    weight_map = {}
    for number, (name, tensor) in enumerate(TENSORS.items()):
        file = f"model-{number + 1:05}-of-{len(TENSORS):05}.safetensors"
        save_file({name: tensor}, path / file)
        weight_map[name] = file
    (path / "model.safetensors.index.json").write_text(json.dumps(index if index is not None else {"weight_map": weight_map}))
    return path


def test_a_directory_gives_its_tensors_config_and_origin(tmp_path: Path):
    checkpoint = open_checkpoint(write(tmp_path / "m", generation_config__json='{"eos_token_id": [1, 106]}'))
    assert checkpoint.names() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(checkpoint.get(name), tensor)
        assert checkpoint.get(name, torch.bfloat16).dtype == torch.bfloat16
        assert checkpoint.packed(name) is None
    assert checkpoint.config == CONFIG
    assert checkpoint.generation_config == {"eos_token_id": [1, 106]}
    assert "model.safetensors" in checkpoint.origin


def test_tensors_are_views_of_the_mapped_file(tmp_path: Path):
    checkpoint = open_checkpoint(write(tmp_path / "m"))
    first, again = (checkpoint.get("model.norm.weight") for _ in range(2))
    assert first.data_ptr() == again.data_ptr()


def test_shards_are_found_through_the_index(tmp_path: Path):
    checkpoint = open_checkpoint(write_shards(tmp_path / "m"))
    assert all(torch.equal(checkpoint.get(name), tensor) for name, tensor in TENSORS.items())
    assert "3 safetensors files" in checkpoint.origin


@pytest.mark.parametrize(
    "saved",
    [
        {"model.language_model.layers.0.w": 1, "model.language_model.norm.weight": 2, "lm_head.weight": 3, "model.vision_tower.x": 4},
        {
            "language_model.model.layers.0.w": 1,
            "language_model.model.norm.weight": 2,
            "language_model.lm_head.weight": 3,
            "vision_tower.x": 4,
        },
        {"model.layers.0.w": 1, "model.norm.weight": 2, "lm_head.weight": 3, "model.embed_audio.x": 4},
    ],
    ids=["multimodal", "multimodal of transformers 4", "text only"],
)
def test_wrappers_names_are_taken_off_and_towers_skipped(saved: dict[str, int], tmp_path: Path):
    config = {"model_type": "gemma4", "text_config": {**CONFIG, "model_type": "gemma4_text"}}
    checkpoint = open_checkpoint(write(tmp_path / "m", {name: torch.tensor([float(value)]) for name, value in saved.items()}, config))
    found = {name: int(checkpoint.get(name)) for name in checkpoint.names()}
    assert found == {"model.layers.0.w": 1, "model.norm.weight": 2, "lm_head.weight": 3}
    assert checkpoint.skipped == (list(saved)[-1],)
    assert checkpoint.config["model_type"] == "gemma4_text"


def test_two_names_for_one_tensor_are_refused(tmp_path: Path):
    tensors = {"model.norm.weight": torch.ones(4), "model.language_model.norm.weight": torch.ones(4)}
    with pytest.raises(CheckpointError, match=r"both stand for 'model\.norm\.weight'"):
        open_checkpoint(write(tmp_path / "m", tensors))


def test_an_unknown_name_is_one_clear_error(tmp_path: Path):
    checkpoint = open_checkpoint(write(tmp_path / "m"))
    for ask in (checkpoint.get, checkpoint.shape, checkpoint.packed):
        with pytest.raises(CheckpointError, match="no tensor 'nothing' among the 3"):
            ask("nothing")


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        {"quant_method": "gptq"},
        {"quant_method": "awq"},
        {"bits": 4},
    ],
)
def test_other_quantizations_are_refused_with_what_loads(quantization: dict[str, Any], tmp_path: Path):
    method = quantization.get("quant_method", "unnamed")
    with pytest.raises(CheckpointError, match=rf"quantization '{method}'.* does not load\. What loads: safetensors in .*Q6_K"):
        open_checkpoint(write(tmp_path / "m", config={**CONFIG, "quantization_config": quantization}))


def test_8_bit_floats_without_a_word_about_their_scales_are_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"holds F8_E4M3 tensors, but config\.json has no quantization_config"):
        open_checkpoint(write(tmp_path / "m", {**TENSORS, "w": torch.ones(4).to(torch.float8_e4m3fn)}))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {"w": "../../etc/passwd"}}, "not the name of a file beside it"),
        ({"weight_map": {"w": 3}}, "not the name of a file beside it"),
        ({"weight_map": {"w": "model-00009-of-00009.safetensors"}}, "does not exist: the download is incomplete"),
        ({"weight_map": {"w": "model-00001-of-00003.safetensors"}}, "the index says that it holds 'w'"),
    ],
)
def test_an_index_that_lies_is_refused(index: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_shards(tmp_path / "m", index))


def test_pickles_are_refused_and_never_opened(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").symlink_to("/nonexistent")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\).* are refused"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, ConfigError, "config.json.* does not exist"),
        ({"config.json": "{"}, ConfigError, "is not JSON"),
        ({"config.json": "[]"}, ConfigError, "holds a list"),
        ({"config.json": "{}"}, CheckpointError, "no model.safetensors, no model.safetensors.index.json and no GGUF"),
        (
            {"config.json": "{}", "a.safetensors": "", "b.safetensors": ""},
            CheckpointError,
            "2 safetensors files but no model.safetensors.index.json",
        ),
        ({"config.json": "{}", "model.safetensors": "<html>"}, CheckpointError, r"no sound safetensors file \(6 bytes\)"),
        ({"config.json": "{}", "a.gguf": "", "b.gguf": ""}, CheckpointError, "holds 2 GGUF files: name one of a.gguf, b.gguf"),
    ],
)
def test_what_is_missing_or_foreign_is_said(files: dict[str, str], error: type[Exception], message: str, tmp_path: Path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        open_checkpoint(tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path):
    data = (write(tmp_path / "m") / "model.safetensors").read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / "m" / "model.safetensors").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="no sound safetensors file"):
            open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 60]},
        {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "X99", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [4, 20]},
    ],
    ids=["shape", "beyond the end", "overflow", "backwards", "negative", "dtype", "gap"],
)
def test_a_header_that_lies_is_refused(entry: dict[str, Any], tmp_path: Path):
    write(tmp_path / "m")
    header = json.dumps({"w": entry}).encode()
    (tmp_path / "m" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(CheckpointError, match="no sound safetensors file"):
        open_checkpoint(tmp_path / "m")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_flipped_bytes_in_a_header_give_one_clear_error_or_sound_tensors(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    path = write(tmp_path_factory.getbasetemp() / "flipped")
    content = bytearray((path / "model.safetensors").read_bytes())
    header_bytes = 8 + struct.unpack("<Q", content[:8])[0]
    for at in data.draw(st.lists(st.integers(0, header_bytes - 1), min_size=1, max_size=3)):
        content[at] = data.draw(st.integers(0, 255))
    (path / "model.safetensors").write_bytes(content)
    try:
        checkpoint = open_checkpoint(path)
        tensors = [checkpoint.get(name) for name in checkpoint.names()]
    except CheckpointError:
        return
    assert sum(tensor.nbytes for tensor in tensors) <= len(content)

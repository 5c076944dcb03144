"""Loading fills a model with what it declares, checks before it reads, and keeps in the file what may stay there."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints.gguf_writing import random_model
from safetensors.torch import save_file
from torch import Tensor, nn

from kvshare.checkpoints import Checkpoint, open_checkpoint
from kvshare.checkpoints.source import Source
from kvshare.checkpoints.weights import load_weights
from kvshare.errors import CheckpointError
from kvshare.models import build_model

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 4,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 4,
}
TENSORS = {
    "embed": torch.randn(6, 4),
    "q": torch.randn(4, 4),
    "k": torch.randn(2, 4),
    "expert.0": torch.randn(3, 4),
    "expert.1": torch.randn(3, 4),
    "scalar": torch.randn(1),
    "ids": torch.arange(6).view(3, 2),
    "table": torch.randn(6, 8).bfloat16(),
}


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(6, 4))
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding  # tied
        self.qk = nn.Parameter(torch.empty(6, 4))
        self.experts = nn.Parameter(torch.empty(2, 3, 4))
        self.table = nn.Parameter(torch.empty(6, 8))
        self.register_buffer("scalar", torch.empty(1))
        self.register_buffer("ids", torch.empty(3, 2, dtype=torch.int64))
        self.register_buffer("scratch", torch.empty(1), persistent=False)

    memory_mapped = frozenset({"table"})
    keep_float32 = frozenset({"scalar"})

    def weight_sources(self) -> Mapping[str, Source]:
        return {
            "embedding": Source(("embed",)),
            "head.weight": Source(("embed",)),
            "qk": Source(("q", "k")),
            "experts": Source(("expert.0", "expert.1"), torch.stack),
            "table": Source(("table",)),
            "scalar": Source(("scalar",)),
            "ids": Source(("ids",)),
        }


def part() -> Part:
    with torch.device("meta"):
        return Part()


def checkpoint(path: Path, tensors: Mapping[str, Tensor] = TENSORS, config: Mapping[str, Any] = CONFIG) -> Checkpoint:
    save_file(dict(tensors), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return open_checkpoint(path)


def test_every_parameter_gets_its_tensors_in_the_models_dtype(tmp_path: Path):
    model = part()
    unread = load_weights(model, checkpoint(tmp_path), torch.bfloat16)
    assert unread == ()
    assert torch.equal(model.embedding, TENSORS["embed"].bfloat16())
    assert torch.equal(model.qk, torch.cat([TENSORS["q"], TENSORS["k"]]).bfloat16())
    assert torch.equal(model.experts, torch.stack([TENSORS["expert.0"], TENSORS["expert.1"]]).bfloat16())
    assert torch.equal(model.scalar, TENSORS["scalar"]), "named in keep_float32"
    assert torch.equal(model.ids, TENSORS["ids"]), "integers stay integers"
    assert isinstance(model.qk, nn.Parameter)


def test_tied_parameters_stay_one(tmp_path: Path):
    model = part()
    load_weights(model, checkpoint(tmp_path), torch.float32)
    assert model.head.weight is model.embedding


def test_a_mapped_table_stays_in_the_file_in_its_own_dtype(tmp_path: Path):
    model, opened = part(), checkpoint(tmp_path)
    load_weights(model, opened, torch.float32)
    assert model.table.dtype == torch.bfloat16
    assert model.table.data_ptr() == opened.get("table").data_ptr()


def test_progress_counts_each_byte_once(tmp_path: Path):
    seen: list[tuple[int, int]] = []
    model = part()
    load_weights(model, checkpoint(tmp_path), torch.float32, lambda done, total: seen.append((done, total)))
    sizes = [tensor.nbytes for name, tensor in model.state_dict().items() if name not in ("head.weight", "table")] + [6 * 8 * 4]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (sum(sizes), sum(sizes))


def test_missing_tensors_are_listed_before_anything_is_read(tmp_path: Path):
    some = {name: tensor for name, tensor in TENSORS.items() if name not in ("q", "ids")}
    model = part()
    with pytest.raises(CheckpointError, match=r"2 tensors of this model are missing: ids, q$"):
        load_weights(model, checkpoint(tmp_path, some), torch.float32)
    assert model.embedding.is_meta


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("embed", (5, 4), r"embed \[5, 4\] for a parameter of shape \[6, 4\]"),
        ("k", (2, 5), r"q \[4, 4\] \+ k \[2, 5\] for a parameter of shape \[6, 4\]"),
        ("expert.1", (3, 3), r"expert.0 \[3, 4\] \+ expert.1 \[3, 3\] for a parameter of shape \[2, 3, 4\]"),
    ],
)
def test_shapes_are_compared_before_anything_is_read(name: str, shape: tuple[int, ...], message: str, tmp_path: Path):
    model = part()
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, checkpoint(tmp_path, {**TENSORS, name: torch.zeros(shape)}), torch.float32)
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_tensors_that_nobody_reads_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        unread = load_weights(part(), checkpoint(tmp_path, {**TENSORS, "mtp.0.norm": torch.ones(1)}), torch.float32)
    assert unread == ("mtp.0.norm",)
    assert "mtp.0.norm" in caplog.text


class Watched:
    """A checkpoint that notes which tensors were read."""

    def __init__(self, inner: Checkpoint):
        self.inner, self.read = inner, set[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        self.read.add(name)
        return self.inner.get(name, dtype)


def test_dead_keys_and_values_of_sharing_layers_are_neither_read_nor_reported(tmp_path: Path):
    oracle = random_model("gemma4_text")
    oracle.save_pretrained(tmp_path)
    config = oracle.config
    published = dict(oracle.state_dict())
    published.pop("lm_head.weight")
    for layer in range(config.num_hidden_layers - config.num_kv_shared_layers, config.num_hidden_layers):
        for name in ("k_proj", "v_proj", "k_norm"):  # what released files hold for layers that never use them
            published[f"model.layers.{layer}.self_attn.{name}.weight"] = torch.full((3, 3), torch.nan)
    save_file(published, tmp_path / "model.safetensors")
    watched = Watched(open_checkpoint(tmp_path))
    model = build_model(watched.config, torch.float32)
    assert load_weights(model, watched, torch.float32) == ()  # type: ignore[arg-type]
    assert {name for name in published if name not in watched.read and name not in oracle.state_dict()} == {
        name for name in published if tuple(published[name].shape) == (3, 3)
    }


def test_a_models_own_mistake_is_not_blamed_on_the_file(tmp_path: Path):
    class Forgetful(Part):
        def weight_sources(self) -> Mapping[str, Source]:
            return {name: source for name, source in super().weight_sources().items() if name != "qk"}

    with torch.device("meta"):
        model = Forgetful()
    with pytest.raises(TypeError, match=r"Forgetful.weight_sources\(\) and its state_dict\(\) differ in qk"):
        load_weights(model, checkpoint(tmp_path), torch.float32)


@pytest.mark.parametrize("family", ["llama", "gemma4_text"])
def test_a_multimodal_save_loads_like_the_text_model(family: str, tmp_path: Path):
    """transformers itself loads nothing from the multimodal names of Gemma 4 when it is asked for the text model."""
    model: transformers.PreTrainedModel = random_model(family)
    text, wrapped = tmp_path / "text", tmp_path / "wrapped"
    model.save_pretrained(text)
    wrapped.mkdir()
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    if not model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = model.state_dict()["lm_head.weight"]
    save_file({**tensors, "model.vision_tower.patch.weight": torch.ones(2)}, wrapped / "model.safetensors")
    (wrapped / "config.json").write_text(json.dumps({"model_type": "outer", "text_config": json.loads((text / "config.json").read_text())}))
    models = []
    for path in (text, wrapped):
        opened = open_checkpoint(path)
        loaded = build_model(opened.config, torch.float32)
        assert load_weights(loaded, opened, torch.float32) == ()
        models.append(loaded)
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name]), name

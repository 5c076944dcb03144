"""What a user may type for a model, and what is said when it is nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from checkpoints.gguf_writing import random_model, write_gguf

from kvshare.checkpoints import open_checkpoint
from kvshare.checkpoints.resolve import locate
from kvshare.errors import CheckpointError


def test_a_directory_a_gguf_file_and_a_directory_with_one_are_opened(tmp_path: Path):
    model = random_model("llama")
    model.save_pretrained(tmp_path / "directory")
    (tmp_path / "holder").mkdir()
    file = write_gguf(tmp_path / "holder" / "model.gguf", model)
    assert str(tmp_path / "directory") in open_checkpoint(tmp_path / "directory").origin
    assert open_checkpoint(str(file)).origin == open_checkpoint(tmp_path / "holder").origin == str(file)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nothing-like-it", r"'nothing-like-it' is no path that exists, no name that kvshare knows \(demo, smollm2, gemma3-270m\)"),
        ("./no/such/model.gguf", "is no path that exists"),
        ("no/model.gguf", "is no path that exists"),
        ("{here}/x.safetensors", "is one file of a checkpoint: name the directory"),
        ("{here}/x.bin", r"is neither a directory nor a \.gguf file"),
    ],
)
def test_what_names_nothing_is_refused_with_what_would(where: str, message: str, tmp_path: Path):
    for name in ("x.safetensors", "x.bin"):
        (tmp_path / name).write_text("")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(where.format(here=tmp_path))


def test_a_revision_of_what_is_not_on_the_hub_is_refused(tmp_path: Path):
    for where in (tmp_path, "smollm2"):
        with pytest.raises(CheckpointError, match="has no revision 'main'"):
            open_checkpoint(where, revision="main")


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's own cache in an empty directory, and no hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_hub_name_is_found_in_the_hubs_cache_without_a_network(offline_hub: Path):
    snapshot = offline_hub / "models--organisation--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    random_model("llama").save_pretrained(snapshot)
    (snapshot / "Q8").mkdir()
    write_gguf(snapshot / "Q8" / "model.gguf", random_model("llama"))
    assert locate("organisation/model") == locate("organisation/model", "main") == snapshot
    assert locate("organisation/model/Q8/model.gguf") == snapshot / "Q8" / "model.gguf"
    assert "model.embed_tokens.weight" in open_checkpoint("organisation/model").names()


def test_a_hub_that_cannot_be_reached_is_said_with_the_remedy(offline_hub: Path):
    with pytest.raises(
        CheckpointError, match=r"organisation/model is not in the local cache and the hub cannot be reached .*give its path"
    ):
        open_checkpoint("organisation/model")


def test_planning_a_gguf_file_imports_neither_torch_nor_numpy(tmp_path: Path):
    path = write_gguf(tmp_path / "model.gguf", random_model("gemma4_text"))
    code = (
        "import sys; from kvshare.checkpoints.gguf_config import config_from_gguf; from kvshare.layout import layout_from_config;"
        f"layout_from_config(config_from_gguf({str(path)!r})).bytes(1000);"
        "print(sorted({'torch', 'numpy', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.stdout.strip() == "[]"

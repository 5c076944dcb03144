"""From what a user typed to the files it means: a directory, a GGUF file, an installed package, the bundled demo, a hub name."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from kvshare.checkpoints.checkpoint import Checkpoint
from kvshare.checkpoints.packages import PACKAGES, packaged_file
from kvshare.errors import CheckpointError

DEMO = "demo"
_HUB_NAME = re.compile(r"(\w[\w.-]*/[\w.-]+?(?<!\.gguf)(?<!\.safetensors))(?:/([\w./-]+\.gguf))?")
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "chat_template.jinja"]
_HUB_DUPLICATES = ["*/*", "consolidated*"]  # subfolders and the same weights in the vendor's own naming


def open_checkpoint(where: str | Path, revision: str | None = None) -> Checkpoint:
    """The checkpoint that `where` names; `revision` is a hub branch, tag or commit.

    In this order: a path that exists, `demo`, a package's name (`smollm2`, `gemma3-270m`), a hub name (`organisation/model`,
    or `organisation/model/file.gguf` for one GGUF file of a repository).
    Raises `CheckpointError` where nothing is found, or what is found is broken or in a format that does not load.
    """
    path = locate(where, revision)
    if path.is_dir():
        from kvshare.checkpoints.safetensors_dir import open_directory

        return open_directory(path)
    from kvshare.checkpoints.gguf_file import GGUFCheckpoint

    return GGUFCheckpoint(path)


def locate(where: str | Path, revision: str | None = None) -> Path:
    """The directory or GGUF file that `where` names, fetched or put together where that is needed. Raises `CheckpointError`."""
    path, name = Path(where).expanduser(), str(where)
    on_hub = None if path.exists() else _HUB_NAME.fullmatch(name)
    if revision is not None and on_hub is None:
        raise CheckpointError(f"{name!r} is no hub name (organisation/model), so it has no revision {revision!r}")
    if path.exists():
        return _local(path)
    if name == DEMO:
        return Path(str(files("kvshare") / "demo" / "checkpoint"))
    if name in PACKAGES:
        return packaged_file(name)
    if on_hub is not None:
        return _fetch(on_hub[1], on_hub[2], revision)
    known = ", ".join((DEMO, *PACKAGES))
    raise CheckpointError(f"{name!r} is no path that exists, no name that kvshare knows ({known}) and no hub name (organisation/model)")


def _local(path: Path) -> Path:
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if not found or any(path.glob("*.safetensors")):
            return path
        if len(found) > 1:
            raise CheckpointError(f"{path} holds {len(found)} GGUF files: name one of {', '.join(file.name for file in found)}")
        return found[0]
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is one file of a checkpoint: name the directory, which also holds config.json and the tokenizer")
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path} is neither a directory nor a .gguf file")
    return path


def _fetch(name: str, file: str | None, revision: str | None) -> Path:
    """A hub repository, or one file of it, in the hub's cache. Honours HF_HUB_OFFLINE, HF_HOME and HF_TOKEN, as huggingface_hub does."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        if file is not None:
            return Path(hf_hub_download(name, file, revision=revision))
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_DUPLICATES))
    except GatedRepoError:
        problem = "is gated: accept its terms on its page and set HF_TOKEN"
    except RepositoryNotFoundError:
        problem = "does not exist on the hub, or is private: set HF_TOKEN"
    except RevisionNotFoundError:
        problem = f"has no revision {revision!r}"
    except LocalEntryNotFoundError:
        problem = (
            "is not in the local cache and the hub cannot be reached (HF_HUB_OFFLINE is set, or there is no network): "
            "copy its directory to this machine and give its path"
        )
    except EntryNotFoundError:
        problem = f"has no file {file}"
    except OSError as error:
        problem = f"could not be fetched: {error}"
    raise CheckpointError(f"{name} {problem}")

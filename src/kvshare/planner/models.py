"""From what a user types to a config: a bundled name, a directory, a `config.json`, a GGUF file, or a name on the Hugging Face hub."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from kvshare.errors import ConfigError
from kvshare.layout.config import read_config

_CONFIGS = resources.files("kvshare.planner") / "configs"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model's config, the name that reports use, where the figures come from, and what an engine would load."""

    name: str
    config: Mapping[str, Any]
    source: str
    repository: str


def bundled_names() -> list[str]:
    """Names of the released models whose configs come with kvshare."""
    return sorted(entry.name.removesuffix(".json") for entry in _CONFIGS.iterdir() if entry.name.endswith(".json"))


def resolve(model: str) -> ModelConfig:
    """The config that `model` names. Raises `ConfigError` (field `model`) with the nearest bundled names where there is none."""
    path = Path(model).expanduser()
    if path.exists():
        return _from_path(path, _name_of(path))
    bundled = {name.casefold(): name for name in bundled_names()}
    if model.casefold() in bundled:
        return _bundled(bundled[model.casefold()])
    if path.suffix in (".json", ".gguf") or model.startswith((".", "/", "~")):
        raise ConfigError("model", f"{model} does not exist")
    if model.count("/") == 1:
        return _from_hub(model)
    from kvshare.checkpoints.resolve import DEMO, PACKAGES, locate

    if model in (DEMO, *PACKAGES):
        return _from_path(locate(model), model)
    names = ", ".join((*bundled_names(), DEMO, *PACKAGES))
    raise ConfigError("model", f"{model!r} is no file, directory, hub name or known model{_suggestion(model)} (known: {names})")


def _name_of(path: Path) -> str:
    """A directory's name, also for the config.json in it; else the file's name without its suffix."""
    if path.is_dir() or path.name == "config.json":
        return (path if path.is_dir() else path.parent).resolve().name
    return path.stem


def _from_path(path: Path, name: str) -> ModelConfig:
    if path.is_dir() and not (path / "config.json").exists():
        path = next(iter(sorted(path.glob("*.gguf"))), path)
    if path.suffix != ".gguf":
        return ModelConfig(name, read_config(path), str(path), str(path))
    from kvshare.checkpoints.gguf_config import config_from_gguf

    return ModelConfig(name, config_from_gguf(path), f"metadata of {path}", str(path))


def _bundled(name: str) -> ModelConfig:
    config = json.loads((_CONFIGS / f"{name}.json").read_text())
    return ModelConfig(name, config, config["_source"], config["_repository"])


def _from_hub(repository: str) -> ModelConfig:
    """Only the config is fetched. The hub is asked once (huggingface_hub retries for half a minute); offline, a cached copy serves."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hint = _suggestion(repository)
    try:
        get_hf_file_metadata(hf_hub_url(repository, "config.json"))
        path = hf_hub_download(repository, "config.json")
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = (
            "needs a token (HF_TOKEN), or does not exist" if status in (401, 403) else f"has no config.json that can be read ({status})"
        )
        raise ConfigError("model", f"{repository} {reason}{hint}") from None
    except HFValidationError as error:
        raise ConfigError("model", f"{repository} is no name of the hub: {error}{hint}") from None
    except Exception as error:  # of the HTTP library below huggingface_hub, which is not the same in all of its versions
        cached = try_to_load_from_cache(repository, "config.json")
        if not isinstance(cached, str):
            reason = f"{repository} is not in the local cache, and the hub cannot be reached ({str(error).partition(chr(10))[0]})"
            raise ConfigError("model", f"{reason}{hint}") from None
        path = cached
    return ModelConfig(repository, read_config(path), f"config.json of {repository} on the hub", repository)


def _suggestion(model: str) -> str:
    """The bundled names nearest to what was typed, by their own names and those that their repositories have."""
    known = {name.casefold(): name for name in bundled_names()}
    known |= {_bundled(name).repository.casefold(): name for name in bundled_names()}
    near = dict.fromkeys(known[match] for match in difflib.get_close_matches(model.casefold(), known, n=4, cutoff=0.5))
    return f"; did you mean {' or '.join(near)}?" if near else ""

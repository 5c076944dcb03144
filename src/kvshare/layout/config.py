"""Reading a model's config: the one place where fields of a `config.json` are looked up, checked and complained about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvshare.errors import ConfigError

_MISSING = object()


def read_config(path: str | Path) -> dict[str, Any]:
    """The config of a directory or a `config.json`, as the file has it. Raises `ConfigError` where it is no JSON object."""
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError("config.json", f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("config.json", f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError("config.json", f"{path} holds a {type(config).__name__}, not an object")
    return config


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config: `text_config` of a multimodal one, with what only the outer level says."""
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return dict(config)
    outer = {key: config[key] for key in ("quantization_config", "tie_word_embeddings", "kv_sharing") if key in config}
    return {**outer, **inner, "model_type": inner.get("model_type", config.get("model_type"))}


class Fields:
    """A config whose fields are read with their types and bounds; whatever is wrong is refused with the field's name."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config

    def has(self, name: str) -> bool:
        return self.config.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        value = self.config.get(name)
        return default if value is None else value

    def integer(self, name: str, default: Any = _MISSING, least: int = 1) -> int:
        """An integer field of at least `least`; a missing one is refused unless there is a default."""
        value = self.config.get(name)
        if value is None:
            if default is _MISSING:
                raise ConfigError(name, "missing from the config")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(name, f"must be an integer, not {value!r}")
        if value < least:
            raise ConfigError(name, f"must be at least {least}, not {value}")
        return value

    def list_of(self, name: str, length: int, kinds: type | tuple[type, ...]) -> list[Any] | None:
        """A list with one entry a layer, or None where the config has none."""
        value = self.config.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(entry, kinds) for entry in value):
            raise ConfigError(name, f"must be a list with one entry for each of the {length} layers")
        if len(value) != length:
            raise ConfigError(name, f"has {len(value)} entries for {length} layers (num_hidden_layers)")
        return value

    def choice(self, name: str, value: Any, choices: Mapping[Any, Any]) -> Any:
        if value not in choices:
            raise ConfigError(name, f"unknown value {value!r}: known are {', '.join(map(str, choices))}")
        return choices[value]

"""Reading a model's config: the one place where fields of a `config.json` are looked up, checked and complained about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvshare.errors import ConfigError


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
    """The language model's part of a config: `text_config` of a multimodal one, with what only the outer level says.

    A drafter (`gemma4_assistant`) nests an ordinary text config but is another architecture: there the outer `model_type` counts.
    """
    inner, outer_type = config.get("text_config"), config.get("model_type")
    if not isinstance(inner, Mapping):
        return dict(config)
    outer = {key: config[key] for key in _OUTER_FIELDS if key in config}
    drafter = isinstance(outer_type, str) and outer_type.endswith("_assistant")
    return {**outer, **inner, "model_type": outer_type if drafter else inner.get("model_type", outer_type)}


_OUTER_FIELDS = (
    "quantization_config",
    "tie_word_embeddings",
    "kv_sharing",
    "kv_sharing_projections",
    "backbone_hidden_size",
    "use_ordered_embeddings",
    "num_centroids",
    "centroid_intermediate_top_k",
)


class Fields:
    """A config whose fields are read with their types and bounds; whatever is wrong is refused with the field's name."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.warnings: list[str] = []  # what had to be assumed, for people

    def assume(self, name: str, value: int, reason: str) -> int:
        """An integer field, or `value` with a warning where the config leaves it out."""
        if not self.has(name):
            self.warnings.append(f"{name} is missing: assumed {value} ({reason})")
        return self.integer(name, value)

    def has(self, name: str) -> bool:
        return self.config.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        value = self.config.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """An integer field of at least `least`; a missing one is refused unless there is a default."""
        value = self.config.get(name, default)
        value = default if value is None else value
        if value is None:
            raise ConfigError(name, "missing from the config")
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(name, f"must be an integer, not {value!r}")
        if value < least:
            raise ConfigError(name, f"must be at least {least}, not {value}")
        return value

    def optional_integer(self, name: str) -> int | None:
        """An integer field, or None where the config has none."""
        return self.integer(name) if self.has(name) else None

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

    def mapping(self, name: str) -> Mapping[str, Any]:
        """A field that is an object; empty where the config has none."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise ConfigError(name, f"must be an object, not {value!r}")
        return value

    def per_layer(self, name: str, length: int) -> list[int]:
        """An integer for each layer, from a list or from one number for all."""
        if not isinstance(self.config.get(name), list):
            return [self.integer(name)] * length
        values = self.list_of(name, length, int) or []
        for value in values:
            if isinstance(value, bool) or value < 1:
                raise ConfigError(name, f"must be at least 1 in every layer, not {value!r}")
        return values

    def choice(self, name: str, value: Any, choices: Mapping[str, Any]) -> Any:
        """What `choices` maps the value of a field to; a value that it does not know is refused."""
        if not isinstance(value, str) or value not in choices:
            raise ConfigError(name, f"unknown value {value!r}: known are {', '.join(map(str, choices))}")
        return choices[value]

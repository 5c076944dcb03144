"""Which precision each owner's rows are cached in, as people give it: a name, a mapping, or a file that `kvshare tune` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvshare.errors import ConfigError
from kvshare.layout.cache_layout import CacheLayout, PrecisionChoice
from kvshare.layout.rows import NEWEST, PRECISIONS, precision_named

FIELD = "kv_dtype"


def read_precision(given: str | Path | Mapping[int, str], layout: CacheLayout, default: str = "bf16") -> PrecisionChoice:
    """The choice that `given` stands for, checked against the layout that it is meant for: a name, or one for every layer (its owner's).

    A mapping has the layer index of owners, and -1 for those it leaves out (else `default`). A file is a JSON object whose field "kv_dtype"
    is such a mapping, with the indices as text. Raises `ConfigError` for unknown names, files that are something else, and layers that
    own nothing.
    """
    if isinstance(given, str) and given.partition(NEWEST)[0] in PRECISIONS:
        name = precision_named(given).name
        layout.stored_in(name)
        return name
    choice = given if isinstance(given, Mapping) else _read_file(Path(given))
    for layer, name in choice.items():
        precision_named(name)
        if layer != -1 and layer not in layout.owners:
            owners = ", ".join(map(str, layout.owners))
            raise ConfigError(FIELD, f"layer {layer} owns no cache, so it has no precision: the owners of this model are {owners}")
    rest = choice.get(-1, default)
    every = {layer: choice.get(owner, rest) for layer, owner in enumerate(layout.owner)}  # readers too: plans without sharing ask for them
    layout.stored_in(every)
    return every


def describe_precision(choice: PrecisionChoice, layout: CacheLayout) -> str:
    """What stands in front of "cache": `int8`, or `int8 (12), int4 (3) owners'` where owners differ."""
    if isinstance(choice, str):
        return choice
    names = [layout.precision_of(owner, choice).name for owner in layout.owners]
    order = {name: place for place, name in enumerate(PRECISIONS)}
    counts = {name: names.count(name) for name in sorted(set(names), key=lambda name: (order[precision_named(name).codec], name))}
    if len(counts) == 1:
        return names[0]
    words = [f"{name} ({count})" for name, count in counts.items()]
    return f"{', '.join(words)} owners'"


def _read_file(path: Path) -> Mapping[int, str]:
    if path.suffix != ".json" and not path.is_file():
        names = ", ".join(PRECISIONS)
        raise ConfigError(FIELD, f"{str(path)!r} is neither a precision ({names}) nor a .json file that kvshare tune wrote")
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(FIELD, f"{path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(FIELD, f"{path} is not JSON: {error}") from None
    entries = content.get(FIELD) if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries.values()):
        raise ConfigError(FIELD, f"{path} has no object {FIELD!r} of layers and precisions: kvshare tune -o writes one")
    try:
        return {int(layer): name for layer, name in entries.items()}
    except ValueError:
        raise ConfigError(FIELD, f"{path}: the keys of {FIELD!r} must be layer indices, not {', '.join(map(repr, entries))}") from None

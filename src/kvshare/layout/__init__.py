"""From a model's config to its cache: what each layer stores, and which layer it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvshare.errors import ConfigError
from kvshare.layout.cache_layout import KINDS, CacheLayout, LayerCache, PrecisionChoice, State, Stream
from kvshare.layout.config import Fields, read_config, text_config
from kvshare.layout.rows import PRECISIONS, Precision

__all__ = [
    "KINDS",
    "KV_FORMS",
    "PRECISIONS",
    "CacheLayout",
    "LayerCache",
    "Precision",
    "PrecisionChoice",
    "State",
    "Stream",
    "layout_from_config",
    "read_config",
]

KV_FORMS = ("plain", "compact", "v-only")
"""How Gemma 4's K = V layers are stored: both; V and the rotated quarter of K (37.5 % less); V alone (50 % less)."""


def layout_from_config(config: Mapping[str, Any], kv_form: str = "plain") -> CacheLayout:
    """The layout of the model that a `config.json` (as a mapping, `text_config` nested or not) describes.

    Raises `ConfigError`, with the field's name, for architectures that are not known and for fields that are missing or
    contradict each other. What had to be assumed stands in the layout's `warnings`.
    """
    from kvshare.layout.rules import rule_for

    if kv_form not in KV_FORMS:
        raise ConfigError("kv_layout", f"unknown form {kv_form!r}: choose one of {', '.join(KV_FORMS)}")
    fields = Fields(text_config(config))
    layout = rule_for(fields)(fields, kv_form)
    if fields.has("kv_sharing") and list(layout.owner) != fields.get("kv_sharing"):
        raise ConfigError("kv_sharing", f"{layout.model_type} takes no owner map: what its layers store cannot be read by another layer")
    return layout

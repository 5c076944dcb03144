"""One file for each family of rules that turn a config into a layout; `rule_for` finds the rule of a config."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvshare.layout.cache_layout import CacheLayout
from kvshare.layout.config import Fields
from kvshare.layout.rules import deepseek, gemma, plain, zaya

Rule = Callable[[Fields, str], CacheLayout]
"""A rule takes the fields of a text config and the K = V form (`plain`, `compact`, `v-only`)."""

_GEMMA = ("gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")

RULES: Mapping[str, Rule] = {
    **dict.fromkeys((name for name in plain.PATTERNS if name), plain.grouped_queries),
    "openelm": plain.openelm,
    **dict.fromkeys(_GEMMA, gemma.shared_by_type),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), gemma.drafter),
    "zaya": zaya.convolutional,
    **dict.fromkeys(("deepseek_v3", "deepseek_v32"), deepseek.latent),
    "deepseek_v4": deepseek.compressed,
    **dict.fromkeys(("deepseek_v41", "deepseek_v41_text"), deepseek.cross_layer),
}
"""The rule of each `model_type`."""


def rule_for(fields: Fields) -> Rule:
    """The rule that reads these fields. Raises `ConfigError` for an architecture that is not known."""
    model_type = fields.get("model_type")
    if model_type is None:
        return deepseek.latent if fields.has("kv_lora_rank") and fields.has("index_head_dim") else plain.unnamed
    return fields.choice("model_type", model_type, RULES)

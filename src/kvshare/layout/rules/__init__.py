"""One file for each family of rules that turn a config into a layout; `RULES` maps a config's `model_type` to its rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvshare.layout.cache_layout import CacheLayout
from kvshare.layout.config import Fields
from kvshare.layout.rules import gemma, plain

Rule = Callable[[Fields, str], CacheLayout]
"""A rule takes the fields of a text config and the K = V form (`plain`, `compact`, `v-only`)."""

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "gemma3n", "gemma3n_text"), gemma.shared_by_type),
    **dict.fromkeys(("gemma3", "gemma3_text"), gemma.shared_by_type),
    **dict.fromkeys(("llama", "mistral", "qwen3"), plain.grouped_queries),
}

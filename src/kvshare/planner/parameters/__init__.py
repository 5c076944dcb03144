"""How many weights a model has, from its config alone: one file for each family of counters.

Counted is what a forward pass of the text model reads: no vision or audio towers, no draft layers, no dead key and value projections of
layers that read another layer's cache, no buffers (routers' correction tables). Tests compare with transformers' modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvshare.errors import ConfigError
from kvshare.layout import CacheLayout
from kvshare.layout.config import Fields
from kvshare.planner.parameters import deepseek, gemma, plain, zaya
from kvshare.planner.parameters.counted import Parameters

__all__ = ["COUNTERS", "Parameters", "count_parameters"]

Counter = Callable[[Fields, CacheLayout], Parameters]
"""Counts from the fields of a text config and the layout (which knows heads, widths and readers)."""

COUNTERS: Mapping[str, Counter] = {
    **dict.fromkeys(plain.FEATURES, plain.count),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), gemma.count_gemma3),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), gemma.count_gemma3n),
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), gemma.count_gemma4),
    "zaya": zaya.count,
    **dict.fromkeys(("deepseek_v3", "deepseek_v32"), deepseek.count_latent),
    "deepseek_v4": deepseek.count_compressed,
}
"""The counter of each `model_type`."""


def count_parameters(fields: Fields, layout: CacheLayout) -> Parameters:
    """The weights of this model. Raises `ConfigError` where the family has no counter or a field is missing."""
    if layout.model_type not in COUNTERS:
        raise ConfigError("model_type", f"{layout.model_type} has no counter, only a cache layout")
    return COUNTERS[layout.model_type](fields, layout)

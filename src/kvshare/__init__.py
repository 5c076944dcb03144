"""kvshare: run, serve and size language models whose key-value cache is structured."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvshare.engine.llm import LLM
    from kvshare.engine.sampling import SamplingParams
    from kvshare.errors import KVShareError
    from kvshare.layout import CacheLayout, layout_from_config
    from kvshare.planner import plan

__version__ = "0.1.0"

_EXPORTS = {
    "CacheLayout": "kvshare.layout",
    "layout_from_config": "kvshare.layout",
    "KVShareError": "kvshare.errors",
    "LLM": "kvshare.engine.llm",
    "SamplingParams": "kvshare.engine.sampling",
    "plan": "kvshare.planner",
}

__all__ = ["LLM", "CacheLayout", "KVShareError", "SamplingParams", "__version__", "layout_from_config", "plan"]


def __getattr__(name: str) -> Any:
    """The public API, imported when it is first touched: `import kvshare` alone brings in neither torch nor numpy."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'kvshare' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)

"""The directory for what kvshare can make again: joined packages, quantized weights."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$KVSHARE_CACHE`, else `kvshare` in the user's cache (`$XDG_CACHE_HOME`, `~/.cache`)."""
    if own := os.environ.get("KVSHARE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvshare"

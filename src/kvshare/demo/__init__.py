"""The small trained model that comes with kvshare (`checkpoint/`, see README.md there), and text that it has not seen."""

from __future__ import annotations

from importlib.resources import files


def sample_text() -> str:
    """Twenty kilobytes of the King James Bible, a verse a line: the beginning of the Epistle to the Hebrews. Public domain."""
    return (files("kvshare") / "demo" / "text.txt").read_text(encoding="utf-8")

"""The result of counting."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of weights. `per_layer_tables` (Gemma's per-layer embeddings) are read a few rows a token and can stay on disk."""

    resident: int
    per_layer_tables: int = 0

    @property
    def total(self) -> int:
        return self.resident + self.per_layer_tables

"""One kernel at a time: what it is measured by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Timed = Callable[..., float]
"""Seconds that a piece of work takes: `kvshare.benchmark.machine.median_seconds` with a clock."""


@dataclass(frozen=True, slots=True)
class Result:
    kernel: str
    work: str
    seconds: float
    amount: int  # bytes that must be read, or operations that must be done
    limit: Literal["read", "gemm"]  # what bounds it, and is its unit
    other: str  # what it is compared with
    other_seconds: float

    @property
    def speed(self) -> float:
        """10^9 bytes or operations a second."""
        return self.amount / self.seconds / 1e9

    @property
    def speedup(self) -> float:
        return self.other_seconds / self.seconds

"""Where a decode step's time goes: products, attention, small operations, and what is left to Python and torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvshare.engine.llm import LLM
from kvshare.kernels.stopwatch import Stopwatch

PROFILED_STEPS = 8  # more decode steps, behind those that are timed as a whole


class Part(NamedTuple):
    """Of a decode step."""

    name: str
    seconds: float
    calls: int | None = None  # of native kernels
    read: int | None = None  # bytes, at the least

    @property
    def gb_s(self) -> float | None:
        """10^9 bytes a second."""
        return self.read / self.seconds / 1e9 if self.read and self.seconds else None


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Seconds and native calls of one decode step, and the bytes that it must read."""

    step_s: float
    products_s: float  # in native kernels: weights times activations,
    attention_s: float  # cached rows,
    small_s: float  # and norms, rotations, activations, appends
    products: int  # native calls
    attentions: int
    smalls: int
    weight_bytes: int | None
    cache_bytes: int  # rows that readers read again count again

    @property
    def other_s(self) -> float:
        """Python, and torch's own operations: all of a step without the kernels."""
        return max(0.0, self.step_s - self.products_s - self.attention_s - self.small_s)

    @property
    def parts(self) -> tuple[Part, Part, Part, Part]:
        """What adds up to the step."""
        return (
            Part("products", self.products_s, self.products, self.weight_bytes),
            Part("attention", self.attention_s, self.attentions, self.cache_bytes),
            Part("small operations", self.small_s, self.smalls),
            Part("Python and torch", self.other_s),
        )


def profile_steps(llm: LLM, context: int, batch: int, weights: int | None) -> StepProfile:
    """Take `PROFILED_STEPS` steps with what runs in the engine: `batch` sequences of `context` tokens; `weights`: bytes that each reads."""
    stopwatch, begun = Stopwatch(), time.perf_counter()
    with stopwatch.running():
        for _ in range(PROFILED_STEPS):
            llm.engine.step()
    step, laps = (time.perf_counter() - begun) / PROFILED_STEPS, stopwatch.laps
    rows = llm.layout.read_bytes(context + PROFILED_STEPS // 2, batch, llm.engine.precision)
    return StepProfile(
        step,
        laps.products.seconds / PROFILED_STEPS,
        laps.attention.seconds / PROFILED_STEPS,
        laps.small.seconds / PROFILED_STEPS,
        laps.products.calls // PROFILED_STEPS,
        laps.attention.calls // PROFILED_STEPS,
        laps.small.calls // PROFILED_STEPS,
        weights,
        rows,
    )


def profile_from(row: Mapping[str, Any]) -> StepProfile | None:
    """The profile in a measurement as JSON; None where it has none."""
    return StepProfile(**row["profile"]) if row.get("profile") else None

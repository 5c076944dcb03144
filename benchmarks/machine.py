"""What this machine can do right now: read bandwidth and the peak of a bf16 matrix product, measured in the round they are quoted in."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Machine:
    read_gb_s: float  # 10^9 bytes a second, summing one GiB
    gemm_gflop_s: float  # 10^9 bf16 operations a second, 2048 x 2048 x 2048


def median_seconds(work: Callable[[], object], repeats: int = 7, clock: Callable[[], float] = time.perf_counter) -> float:
    work()
    times = []
    for _ in range(repeats):
        begun = clock()
        work()
        times.append(clock() - begun)
    return statistics.median(times)


def measure(clock: Callable[[], float] = time.perf_counter) -> Machine:
    """Takes about two seconds and one GiB."""
    words = torch.ones(1 << 28, dtype=torch.float32)
    read = words.nbytes / median_seconds(words.sum, clock=clock) / 1e9
    del words
    left, right = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    return Machine(read, 2 * 2048**3 / median_seconds(lambda: left @ right, clock=clock) / 1e9)

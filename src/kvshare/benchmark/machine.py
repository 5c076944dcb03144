"""What this machine can do right now: read bandwidth and the peak of a bf16 matrix product, measured in the round they are quoted in."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from kvshare.huge_pages import empty_huge

GEMM_SIZE = 2048


@dataclass(frozen=True, slots=True)
class Machine:
    read_gb_s: float  # 10^9 bytes a second, summing one GiB in huge pages
    gemm_gflop_s: float  # 10^9 bf16 operations a second, x Wᵀ of 2048 x 2048 x 2048


def median_seconds(work: Callable[[], object], repeats: int = 7, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that `work` takes, after one call that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        begun = clock()
        work()
        times.append(clock() - begun)
    return statistics.median(times)


def measure(clock: Callable[[], float] = time.perf_counter) -> Machine:
    """With torch's threads; takes about two seconds and one GiB."""
    words = empty_huge(1 << 30).view(torch.float32).fill_(1)
    read = words.nbytes / median_seconds(words.sum, clock=clock) / 1e9
    del words
    left, right = (torch.randn(GEMM_SIZE, GEMM_SIZE).bfloat16() for _ in range(2))
    return Machine(read, 2 * GEMM_SIZE**3 / median_seconds(lambda: F.linear(left, right), clock=clock) / 1e9)


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the processor calls itself."""
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())

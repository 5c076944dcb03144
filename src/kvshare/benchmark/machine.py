"""What this machine can do right now: read bandwidth and the peak of a bf16 matrix product, measured in the round they are quoted in."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from kvshare import kernels
from kvshare.huge_pages import empty_huge
from kvshare.kernels.read_memory import PATTERNS, read_memory

READ_BYTES = 1 << 30  # far more than the caches hold
PROBED_BYTES = 256 << 20  # several times what they hold
PRODUCTS = ((2048, 2048, 2048), (512, 12288, 1536), (512, 1536, 12288))  # rows, outputs, inputs


@dataclass(frozen=True, slots=True)
class Machine:
    read_gb_s: float  # 10^9 bytes a second, reading one GiB in huge pages in whichever way is the fastest
    gemm_gflop_s: float  # 10^9 bf16 operations a second, x Wᵀ of whichever of `PRODUCTS` is the fastest

    def best_of(self, other: Machine) -> Machine:
        """The limits where both were measured: before and after something."""
        return Machine(max(self.read_gb_s, other.read_gb_s), max(self.gemm_gflop_s, other.gemm_gflop_s))


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
    read = read_speed(empty_huge(READ_BYTES).fill_(1), clock)
    return Machine(read / 1e9, max(_product_speed(*shape, clock) for shape in PRODUCTS) / 1e9)


def read_speed(memory: Tensor, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second in the fastest way to read `memory`, uint8 in one piece: whole MiB, a power of two of them from 16 on."""
    return memory.nbytes / min(median_seconds(way, 5, clock) for way in _ways_to_read(memory))


class ReadProbe:
    """The read bandwidth at this moment, cheaply enough to ask for it around every measurement; keeps 256 MiB."""

    def __init__(self) -> None:
        self._ways = _ways_to_read(empty_huge(PROBED_BYTES).fill_(1))

    def __call__(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """10^9 bytes a second, the best of two readings in each way: some 50 ms with torch's threads."""
        times = []
        for way in self._ways * 2:
            begun = clock()
            way()
            times.append(clock() - begun)
        return PROBED_BYTES / min(times) / 1e9


def _ways_to_read(memory: Tensor) -> list[Callable[[], object]]:
    ways: list[Callable[[], object]] = [memory.view(torch.float32).sum]
    if kernels.available():
        ways += [partial(read_memory, memory, pattern) for pattern in PATTERNS]
    return ways


def _product_speed(rows: int, outputs: int, inputs: int, clock: Callable[[], float]) -> float:
    x, weight = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
    return 2 * rows * outputs * inputs / median_seconds(lambda: F.linear(x, weight), 5, clock)


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the processor calls itself."""
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())

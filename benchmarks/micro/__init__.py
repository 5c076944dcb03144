"""One kernel at a time: what it is measured by."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from kvshare.benchmark.machine import median_seconds


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds that pieces of work take."""

    clock: Callable[[], float] = time.perf_counter

    def __call__(self, work: Callable[[], object], repeats: int = 7) -> float:
        return median_seconds(work, repeats, self.clock)

    def alone(self, work: Callable[[], object], repeats: int = 5) -> float:
        """On one thread: what a core brings, however many share the memory."""
        with one_thread():
            return self(work, repeats)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, slots=True)
class Result:
    kernel: str
    work: str
    seconds: float
    amount: int  # bytes that must be read, or operations that must be done
    limit: Literal["read", "gemm"]  # what bounds it, and is its unit
    other: str  # what it is compared with
    other_seconds: float
    alone_seconds: float | None = None  # on one thread
    other_alone_seconds: float | None = None

    @property
    def speed(self) -> float:
        """10^9 bytes or operations a second."""
        return self.amount / self.seconds / 1e9

    @property
    def alone_speed(self) -> float | None:
        return None if self.alone_seconds is None else self.amount / self.alone_seconds / 1e9

    @property
    def speedup(self) -> float:
        return self.other_seconds / self.seconds

    @property
    def alone_speedup(self) -> float | None:
        return self.other_alone_seconds / self.alone_seconds if self.other_alone_seconds and self.alone_seconds else None

"""Reading memory and nothing else, as fast as it goes: what a bandwidth is measured with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvshare.kernels.native import module


class ReadPattern(NamedTuple):
    """Blocks of `streams` runs of `run` bytes are read one after the other, the runs of a block side by side."""

    streams: int  # 1, 4, 8 or 16
    run: int  # a multiple of 64
    ahead: int = 0  # bytes before its turn that a line is asked for; 0: the processor finds out itself


PATTERNS = (
    ReadPattern(1, 16 << 10),
    ReadPattern(4, 16 << 10, 512),
    ReadPattern(4, 1 << 20, 512),
    ReadPattern(8, 1 << 20),
    ReadPattern(16, 1 << 10),
)
"""Each the fastest one on some machine, or at some time."""


def read_memory(memory: Tensor, pattern: ReadPattern) -> int:  # contiguous, whole blocks
    """The sum of its 64-bit words modulo 2^64, each thread reading a part. Raises `ValueError` where `pattern` does not divide it."""
    return module().read_memory(memory.data_ptr(), memory.nbytes, *pattern)


def reference_read_memory(memory: Tensor) -> int:  # contiguous
    """`read_memory` in plain torch, to the bit."""
    return int(memory.view(torch.int64).sum()) % 2**64

"""Memory for the temporaries of recorded calls: a tensor's place is free for calls recorded later as soon as nobody holds the tensor."""

from __future__ import annotations

import ctypes
import weakref
from bisect import insort

import torch
from torch import Tensor

_LINE = 64  # bytes; every tensor begins at a multiple


class ScratchFullError(Exception):
    """The temporaries of one recording do not fit."""


class Scratch:
    """One buffer, handed out from its begin, which several recordings may use as long as they are not run at the same time.

    What is never handed out costs no memory. It must outlive every call that was recorded with an address in it.
    """

    def __init__(self, capacity: int):
        self._memory = torch.empty(capacity + _LINE, dtype=torch.uint8)
        self._base = -(-self._memory.data_ptr() // _LINE) * _LINE
        self._capacity = capacity
        self._used: list[tuple[int, int]] = []  # first byte and end of what is handed out, in order
        self.peak_bytes = 0

    def like(self, x: Tensor) -> Tensor:
        """A tensor of the shape, strides and type of `x`, with no contents. Raises `ScratchFullError`."""
        begin = self._take(_extent(x))
        memory = (ctypes.c_char * _extent(x)).from_address(self._base + begin)
        weakref.finalize(memory, self._give_back, begin).atexit = False  # the storage holds `memory`, whatever views there are
        return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, x.stride())

    def holds(self, x: Tensor) -> bool:
        return self._base <= x.data_ptr() < self._base + self._capacity

    def alias(self, x: Tensor) -> Tensor:
        """The same place for calls that run again: holding it keeps it from nobody."""
        memory = (ctypes.c_char * _extent(x)).from_address(x.data_ptr())
        return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, x.stride())

    def _take(self, num_bytes: int) -> int:
        size, begin = -(-num_bytes // _LINE) * _LINE, 0
        for first, end in self._used:
            if first - begin >= size:
                break
            begin = end
        if begin + size > self._capacity:
            raise ScratchFullError(f"temporaries of more than {self._capacity:,} bytes")
        insort(self._used, (begin, begin + size))
        self.peak_bytes = max(self.peak_bytes, begin + size)
        return begin

    def _give_back(self, begin: int) -> None:
        self._used = [block for block in self._used if block[0] != begin]


def _extent(x: Tensor) -> int:
    """Bytes from the first number of `x` to its last."""
    return (1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))) * x.element_size()

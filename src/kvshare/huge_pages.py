"""Memory in large pages, for what is read from end to end again and again: weights and the cache."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


def empty_huge(num_bytes: int) -> Tensor:
    """Fresh memory, zero until it is written: uint8 [num_bytes]; in huge pages where it is large and the system has them."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or num_bytes < HUGE_PAGE:
        return torch.empty(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(advice)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping alive
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + num_bytes]

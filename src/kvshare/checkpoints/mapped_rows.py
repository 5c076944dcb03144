"""Tables of which a few rows are read at a time, far from each other: what the kernel is told about them, where they are mapped files.

A page that is not in memory is fetched with all that the device's readahead takes along (128 KiB, often some MiB), which is right for
weights that are read from end to end. From a table that is read by the row it fetches a hundred times what is asked for, one wait a row.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache

from torch import Tensor

from kvshare.kernels.native import available, module

_RANDOM, _WILL_NEED = getattr(mmap, "MADV_RANDOM", None), getattr(mmap, "MADV_WILLNEED", None)  # absent where there is no madvise


def expect_random_reads(table: Tensor) -> None:  # [entries, ...] contiguous
    """From now on fetch only the pages that are asked for."""
    if _RANDOM is not None:
        advise(table.data_ptr(), table.nbytes, _RANDOM)


def prefetch_rows(table: Tensor, rows: Tensor) -> None:  # [entries, ...] contiguous, int64 [n]
    """Begin to fetch these rows, all at once and without waiting. Costs about a microsecond for each row that is there already."""
    if _WILL_NEED is None or not table.is_contiguous():
        return
    start, row_bytes = table.data_ptr(), table.stride(0) * table.element_size()
    if available():
        rows = rows.contiguous()
        module().prefetch_rows(start, row_bytes, rows.data_ptr(), len(rows))
        return
    for row in rows.tolist():
        advise(start + row * row_bytes, row_bytes, _WILL_NEED)


def advise(address: int, length: int, advice: int) -> None:
    """Advice about the pages that hold these bytes. It is only advice: whether the kernel takes it is not looked at."""
    begin = address // mmap.PAGESIZE * mmap.PAGESIZE
    _madvise()(begin, address + length - begin, advice)


@cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function

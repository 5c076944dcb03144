"""Where weights that every step reads from end to end lie in memory: huge pages, in which a processor streams faster than in a mapped file.

A file's pages are 4 KiB each, and hardware prefetching stops at the end of every one. Kernels multiplied weights a fifth faster from
anonymous memory in pages of 2 MiB (`docs/benchmarks.md`). Tables of which a step reads a few rows stay where they are in the file.
Blocks are interleaved on the way: the same bytes, in the order in which the products read them.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import psutil
import torch
from torch import Tensor

from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.checkpoints.mapped_rows import advise
from kvshare.huge_pages import empty_huge
from kvshare.kernels.interleaved_blocks import InterleavedBlocks, interleave

LEAST_BYTES = 64 << 10  # smaller tensors are not worth a copy
_LINE = 64  # bytes; where a tensor begins
_BLOCK_BYTES = 128 << 20  # that are taken from the system at once


class ResidentMemory:
    """Copies of tensors behind one another in huge pages, as long as a share `left_free` of the machine's memory stays free.

    `refused_bytes` is what found no room and stayed where it was.
    """

    def __init__(self, left_free: float = 0.25) -> None:
        self.left_free, self.refused_bytes = left_free, 0
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0

    def hold(self, tensor: Tensor) -> Tensor:
        """The same tensor in this memory; itself where it is small or lies on a device, or where memory is short."""
        place = self._room_for(tensor)
        return tensor if place is None else place.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def hold_blocks(self, packed: PackedBlocks) -> PackedBlocks | InterleavedBlocks:
        """The same matrix in this memory, in the order that the kernels like best; itself where a tensor would stay where it is."""
        place = self._room_for(packed.blocks)
        return packed if place is None else interleave(packed, place)

    def _room_for(self, tensor: Tensor) -> Tensor | None:  # uint8 [tensor.nbytes]
        if tensor.nbytes < LEAST_BYTES or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return None
        if self._used + tensor.nbytes > len(self._block) and not self._grow(tensor.nbytes):
            self.refused_bytes += tensor.nbytes
            return None
        place = self._block[self._used : self._used + tensor.nbytes]
        self._used += -(-tensor.nbytes // _LINE) * _LINE
        return place

    def _grow(self, num_bytes: int) -> bool:
        size = max(_BLOCK_BYTES, num_bytes)
        memory = psutil.virtual_memory()
        if memory.available - size < self.left_free * memory.total:
            return False
        self._block, self._used = empty_huge(size), 0
        return True


def forget_pages() -> None:
    """Let go of what this process has in memory of mapped weights; what is still read comes back from the system's cache."""
    mappings = Path("/proc/self/smaps")
    if not mappings.exists() or not hasattr(mmap, "MADV_DONTNEED"):
        return
    begin, end, is_weights = 0, 0, False
    for line in mappings.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if not fields[0].endswith(":"):  # a mapping: addresses, permissions, offset, device, inode and, if it is a file, the path
            begin, end = (int(address, 16) for address in fields[0].split("-"))
            is_weights = len(fields) == 6 and fields[5].endswith((".gguf", ".safetensors"))
        elif is_weights and fields[:2] == ["Anonymous:", "0"]:  # nothing was written to it, so nothing can be lost
            advise(begin, end - begin, mmap.MADV_DONTNEED)
